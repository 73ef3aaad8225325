"""What ssh itself would do for a destination: `ssh -G` evaluates ~/.ssh/config, Match blocks, -i, -o and -F, so that
phaul reaches a host exactly as the operator's `ssh HOST` does (ssh(1), ssh_config(5))."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asyncssh.encryption import get_encryption_algs
from asyncssh.kex import get_kex_algs
from asyncssh.mac import get_mac_algs

from phaul.errors import ConnectError, UsageError

if TYPE_CHECKING:
    from phaul.config import SshSettings

_HOST = re.compile(r"[A-Za-z0-9_.%:-]+")
_USER = re.compile(r"[^\s@:/\\\"'-][^\s:/\\\"']*")


@dataclass(frozen=True)
class Destination:
    """[USER@]HOST[:PORT], an IPv6 address in brackets where a port follows."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Read one from the command line; UsageError says what is wrong with it."""
        user, at, rest = text.rpartition("@")
        match = re.fullmatch(r"\[([0-9A-Fa-f:.%a-z]+)\](?::(\d+))?", rest) or re.fullmatch(r"([^:]+)(?::(\d+))?", rest)
        bare_address = match is None and rest.count(":") > 1
        host, port = (rest, None) if bare_address else (match[1], match[2]) if match else ("", None)
        if not _HOST.fullmatch(host) or host.startswith("-") or (at and not _USER.fullmatch(user)):
            raise UsageError(f"{text!r} is not [USER@]HOST[:PORT]")
        if port is not None and not 0 < int(port) < 65536:
            raise UsageError(f"{text!r}: a port is 1 to 65535")
        return cls(host, user if at else None, int(port) if port else None)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host and self.port else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")


@dataclass(frozen=True)
class SshOptions:
    """What the operator said about ssh: flags or settings. Durations in seconds."""

    identity: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    config: str = ""
    connect_timeout: float = 15.0
    keepalive: float = 5.0
    remote_command: str = "phaul"

    @classmethod
    def of(cls, settings: SshSettings) -> SshOptions:
        """As the settings say, flags among them."""
        return cls(**{name: getattr(settings, name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Resolved:
    """How ssh would connect."""

    host: str
    port: int
    user: str
    identities: tuple[str, ...]
    certificates: tuple[str, ...]
    identities_only: bool
    agent: str | None
    known_hosts: tuple[Path, ...]
    strict: str  # yes, ask, accept-new or no
    host_key_alias: str | None
    proxy_command: tuple[str, ...]
    family: int
    bind_address: str | None
    ciphers: tuple[str, ...]
    key_exchanges: tuple[str, ...]
    macs: tuple[str, ...]


async def resolve(destination: Destination, options: SshOptions) -> Resolved:
    """Ask ssh. UsageError carries its own words about an option or a file that it does not accept."""
    command = ["ssh", "-G"]
    command += ["-F", options.config] if options.config else []
    command += [part for identity in options.identity for part in ("-i", identity)]
    command += [part for option in options.options for part in ("-o", option)]
    command += ["-p", str(destination.port)] if destination.port else []
    command += ["-l", destination.user] if destination.user else []
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            "--",
            destination.host,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise ConnectError(
            "ssh is not installed here", advice="install it: apt install openssh-client, dnf install openssh-clients"
        ) from error
    out, err = await process.communicate()
    if process.returncode:
        lines = [line for line in err.decode(errors="replace").splitlines() if not line.startswith("Pseudo-terminal")]
        raise UsageError("ssh: " + "; ".join(lines), advice="see ssh_config(5)")
    return _resolved(out.decode(errors="replace"), destination, options)


def _resolved(text: str, destination: Destination, options: SshOptions) -> Resolved:
    """Read the output of ssh -G: a keyword in lower case and its value on each line."""
    said: dict[str, list[str]] = {}
    for line in text.splitlines():
        keyword, _, value = line.partition(" ")
        said.setdefault(keyword.lower(), []).append(value)

    def one(keyword: str, default: str = "") -> str:
        return said.get(keyword, [default])[0]

    host, port, user = one("hostname", destination.host), int(one("port", "22")), one("user")
    tokens = {"%": "%", "h": host, "p": str(port), "r": user, "n": destination.host, "d": str(Path.home())}
    tokens["u"] = os.environ.get("USER", user)
    known = f"{one('userknownhostsfile')} {one('globalknownhostsfile')}".split()
    alias, bind = one("hostkeyalias", "none"), one("bindaddress", "none")
    return Resolved(
        host=host,
        port=port,
        user=user,
        identities=_existing(said.get("identityfile", []), tokens),
        certificates=_existing(said.get("certificatefile", []), tokens),
        identities_only=one("identitiesonly") == "yes",
        agent=_agent(one("identityagent", "SSH_AUTH_SOCK"), tokens),
        known_hosts=tuple(Path(_expand(name, tokens)) for name in known if name != "none"),
        strict={"true": "yes", "false": "no", "off": "no"}.get(mode := one("stricthostkeychecking", "ask"), mode),
        host_key_alias=None if alias == "none" else alias,
        proxy_command=_proxy(one("proxycommand", "none"), one("proxyjump", "none"), tokens, options),
        family={"inet": 2, "inet6": 10}.get(one("addressfamily"), 0),
        bind_address=None if bind == "none" else bind,
        ciphers=_common(one("ciphers"), get_encryption_algs()),
        key_exchanges=_common(one("kexalgorithms"), get_kex_algs()),
        macs=_common(one("macs"), get_mac_algs()),
    )


def _expand(text: str, tokens: dict[str, str]) -> str:
    expanded = re.sub(r"%(.)", lambda match: tokens.get(match[1], match[0]), text)
    return os.path.expanduser(expanded)


def _existing(names: list[str], tokens: dict[str, str]) -> tuple[str, ...]:
    """ssh names all of its default keys; those that are not there count for nothing, as with ssh."""
    paths = [_expand(name, tokens) for name in names if name != "none"]
    return tuple(path for path in paths if os.path.exists(path))


def _agent(value: str, tokens: dict[str, str]) -> str | None:
    if value == "none":
        return None
    if value == "SSH_AUTH_SOCK":
        return os.environ.get("SSH_AUTH_SOCK") or None
    return os.environ.get(value[1:]) if value.startswith("$") else _expand(value, tokens)


def _proxy(command: str, jump: str, tokens: dict[str, str], options: SshOptions) -> tuple[str, ...]:
    """ProxyJump is what ssh makes of it: another ssh with -W, which sees the same configuration."""
    if command != "none":
        return ("/bin/sh", "-c", "exec " + _expand(command, tokens))
    if jump == "none":
        return ()
    before, _, last = jump.rpartition(",")
    config = ("-F", options.config) if options.config else ()
    hops = ("-J", before) if before else ()
    target = Destination.parse(last.removeprefix("ssh://"))
    whom = (*(("-l", target.user) if target.user else ()), *(("-p", str(target.port)) if target.port else ()))
    return ("ssh", *config, *hops, *whom, "-W", f"[{tokens['h']}]:{tokens['p']}", "--", target.host)


def _common(wanted: str, supported: list[bytes]) -> tuple[str, ...]:
    """The operator's list of algorithms, without those that asyncssh lacks. An empty list is asyncssh's own choice."""
    have = {name.decode() for name in supported}
    return tuple(name for name in wanted.split(",") if name in have)

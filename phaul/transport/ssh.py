"""The SSH connection to the other host: who it is, who we are there, and starting phaul on it.

Every way in which this fails has its own words and its own exit status: not reached (10), host key or login (11),
phaul not found there or one that we cannot talk to (12).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shlex
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import asyncssh

from phaul.errors import AuthenticationError, ConnectError, PhaulError, VersionError
from phaul.transport import hello as greeting
from phaul.transport.control import StreamLink
from phaul.transport.hello import Agreement, Hello
from phaul.transport.ssh_config import Destination, Resolved, SshOptions, resolve

_NOT_FOUND, _NO_SUDO = 87, 88  # exit statuses of _LAUNCH that no shell, sudo or phaul uses
_STDERR_KEPT = 16384  # bytes
_KEEPALIVES_MISSED = 3

# %s is the command, quoted. Paths beside PATH: where pip and pipx may put it, which sshd's PATH leaves out.
_LAUNCH = """\
for p in %s "$HOME/.local/share/phaul/bin/phaul" /opt/phaul/bin/phaul "$HOME/.local/bin/phaul"; do
  p=$(command -v "$p") || continue
  [ "$(id -u)" = 0 ] && exec "$p" agent --stdio
  command -v sudo >/dev/null || exit 88
  LC_ALL=C exec sudo -n "$p" agent --stdio
done
exit 87
"""


class Connection:
    """An authenticated connection to another host. Use `connect`."""

    def __init__(
        self, ssh: asyncssh.SSHClientConnection, destination: Destination, options: SshOptions, host: str = ""
    ) -> None:
        self._ssh = ssh
        self.destination = destination
        self.host = host or destination.host  # as ssh_config(5) resolves it: HostName
        self.options = options

    @property
    def name(self) -> str:
        """The host as the operator named it."""
        return self.destination.host

    @property
    def addresses(self) -> tuple[str, str]:
        """Our address and the other host's, as the connection's socket has them; empty behind a proxy command."""
        ours, theirs = (self._ssh.get_extra_info(key) for key in ("sockname", "peername"))
        return (ours[0] if ours else "", theirs[0] if theirs else "")

    async def run(self, command: str, *, stdin: bytes = b"", timeout: float) -> tuple[int, bytes, bytes]:
        """Run a shell command to its end: exit status, stdout, stderr. A death by signal counts as -1."""
        try:
            async with asyncio.timeout(timeout):
                done = await self._ssh.run(command, input=stdin, encoding=None, check=False)
        except (OSError, asyncssh.Error) as error:
            raise self._broken(error) from error
        status = -1 if done.exit_status is None else done.exit_status
        return status, _as_bytes(done.stdout), _as_bytes(done.stderr)

    async def forward(self, host: str, port: int) -> int:
        """A port on our loopback that leads to `host`:`port` as the other host sees it (--tunnel)."""
        try:
            listener = await self._ssh.forward_local_port("127.0.0.1", 0, host, port)
        except (OSError, asyncssh.Error) as error:
            raise self._broken(error) from error
        return listener.get_port()

    async def start_agent(self, ours: Hello) -> RemoteAgent:
        """Start `phaul agent --stdio` there, as root, and exchange hellos with it."""
        command = "exec /bin/sh -c " + shlex.quote(_LAUNCH % shlex.quote(self.options.remote_command))
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.options.connect_timeout):
                process = await self._ssh.create_process(command, encoding=None)
                errors = _Tail(process.stderr)
                try:
                    theirs = await greeting.receive(process.stdout)
                except ConnectError as error:
                    raise await self._explain(process, errors, error) from error
                agreement = greeting.agree(ours, theirs, str(self.destination))
                process.stdin.write(ours.line())
        except TimeoutError as error:
            waited = time.monotonic() - started
            raise ConnectError(f"phaul on {self.name} said nothing within {waited:.0f} s") from error
        except (OSError, asyncssh.Error) as error:
            raise self._broken(error) from error
        return RemoteAgent(process, errors, theirs, agreement)

    async def close(self) -> None:
        """End the connection; remote processes see the end of their input."""
        self._ssh.close()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                await self._ssh.wait_closed()

    async def _explain(
        self, process: asyncssh.SSHClientProcess[bytes], errors: _Tail, error: ConnectError
    ) -> PhaulError:
        """Why no agent came up: from the exit status of _LAUNCH, and what sudo or the shell said."""
        status = await _exit_status(process)
        text = await errors.text()
        user = self.destination.user or "the user"
        if status == _NOT_FOUND:
            return VersionError(
                f"phaul is not installed on {self.name} (looked for {self.options.remote_command!r})",
                advice=f"phaul deploy {self.destination} installs it there; or say where it is: [ssh] remote_command",
            )
        if status == _NO_SUDO or text.startswith("sudo:") or "\nsudo:" in text:
            said = f" ({text.splitlines()[-1]})" if text else ": there is no sudo"
            return AuthenticationError(
                f"{user} may not become root on {self.name}{said}",
                advice="log in as root, or allow it in sudoers: USER ALL=(root) NOPASSWD: /path/to/phaul agent *",
            )
        if status is None:
            return ConnectError(f"{error}{_said(text)}")
        return VersionError(f"phaul on {self.name} did not start: exit status {status}{_said(text)}")

    def _broken(self, error: Exception) -> ConnectError:
        return ConnectError(f"the connection to {self.name} broke: {_reason(error)}")


@dataclass
class RemoteAgent:
    """A running `phaul agent --stdio` on the other host, past its hello."""

    process: asyncssh.SSHClientProcess[bytes]
    errors: _Tail
    hello: Hello
    agreement: Agreement

    async def last_words(self) -> str:
        """What it said on stderr, for an error that its end explains."""
        return _said(await self.errors.text())

    def link(self) -> StreamLink:
        """The frames that follow the hellos."""
        return StreamLink(self.process.stdout, self.process.stdin)


class _Tail:
    """Collects the end of a stream that must be read so that it does not fill up."""

    def __init__(self, reader: asyncssh.SSHReader[bytes]) -> None:
        self._kept = bytearray()
        self._task = asyncio.create_task(self._read(reader))

    async def text(self) -> str:
        """What was said, once the stream has ended or nothing more comes for a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await asyncio.shield(self._task)
        return bytes(self._kept).decode(errors="replace").strip()

    async def _read(self, reader: asyncssh.SSHReader[bytes]) -> None:
        with contextlib.suppress(asyncssh.Error, OSError):
            while data := await reader.read(4096):
                self._kept += data
                del self._kept[:-_STDERR_KEPT]


class _Client(asyncssh.SSHClient):
    """Decides about host keys that known_hosts does not have, as StrictHostKeyChecking says, and keeps the last."""

    def __init__(self, resolved: Resolved, known: bytes) -> None:
        self._resolved = resolved
        self._known = known
        self.offered: asyncssh.SSHKey | None = None
        self.changed = False

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Called only for a key that is not among the trusted ones."""
        self.offered = key
        matched = asyncssh.match_known_hosts(self._known, host, addr, None if port == 22 else port)
        self.changed = bool(matched[0])
        if self.changed or self._resolved.strict not in ("accept-new", "no"):
            return False
        self._remember(host, port, key)
        return True

    def _remember(self, host: str, port: int, key: asyncssh.SSHKey) -> None:
        """Append the key to the first known_hosts file, as ssh does; that it cannot be kept is no reason to fail."""
        if not self._resolved.known_hosts:
            return
        path = self._resolved.known_hosts[0]
        name = host if port == 22 else f"[{host}]:{port}"
        encoded = base64.b64encode(key.public_data).decode()
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{name} {key.get_algorithm()} {encoded}\n")


@contextlib.asynccontextmanager
async def connect(destination: Destination, options: SshOptions) -> AsyncIterator[Connection]:
    """Connect and log in, as `ssh` would."""
    resolved = await resolve(destination, options)
    known = b"".join(_content(path) for path in resolved.known_hosts)
    client = _Client(resolved, known)
    arguments = _arguments(resolved, options, known)
    try:
        async with asyncio.timeout(options.connect_timeout), _keys_of_agent(resolved) as keys:
            arguments |= {"client_keys": keys, "agent_path": None} if keys else {}
            ssh, _ = await asyncssh.create_connection(lambda: client, **arguments)
    except asyncssh.HostKeyNotVerifiable as error:
        raise _host_key_error(destination, resolved, client) from error
    except asyncssh.PermissionDenied as error:
        tried = ", ".join(resolved.identities) or "no key file"
        raise AuthenticationError(
            f"{destination.host} does not let {resolved.user} in: {error.reason} "
            f"(tried {tried}{' and the ssh agent' if resolved.agent else '; no ssh agent'})",
            advice=f"make `ssh {destination}` work without a password: ssh-copy-id, ssh-add, or -i KEY",
        ) from error
    except TimeoutError as error:
        where = f"{resolved.host} port {resolved.port}"
        raise ConnectError(
            f"{where} did not answer within {options.connect_timeout:g} s",
            advice="is it up, and is its port open? [ssh] connect_timeout is the limit",
        ) from error
    except (OSError, asyncssh.Error) as error:
        raise ConnectError(
            f"cannot connect to {resolved.host} port {resolved.port}: {_reason(error)}",
            advice=f"try: ssh {destination}",
        ) from error
    except (asyncssh.KeyImportError, ValueError) as error:
        raise AuthenticationError(f"ssh to {destination}: {error}") from error
    connection = Connection(ssh, destination, options, resolved.host)
    try:
        yield connection
    finally:
        await connection.close()


@contextlib.asynccontextmanager
async def _keys_of_agent(resolved: Resolved) -> AsyncIterator[list[asyncssh.SSHKeyPair]]:
    """The keys that only an ssh agent has, where there is no key file: without any, asyncssh asks no agent."""
    if resolved.identities or not resolved.agent:
        yield []
        return
    try:
        agent = await asyncssh.connect_agent(resolved.agent)
        found = list(await agent.get_keys())
    except (OSError, ValueError):
        yield []
        return
    async with agent:
        yield found


def _arguments(resolved: Resolved, options: SshOptions, known: bytes) -> dict[str, Any]:
    """What asyncssh is told: everything, so that it reads no configuration of its own."""
    given: dict[str, Any] = {
        "host": resolved.host,
        "port": resolved.port,
        "username": resolved.user,
        "config": None,
        "known_hosts": known,
        "host_key_alias": resolved.host_key_alias,
        "client_keys": list(resolved.identities) or None,
        "client_certs": list(resolved.certificates) or (),
        "ignore_encrypted": True,
        "agent_path": resolved.agent,
        "proxy_command": list(resolved.proxy_command) or None,
        "family": resolved.family,
        "password_auth": False,
        "kbdint_auth": False,
        "keepalive_interval": options.keepalive,
        "keepalive_count_max": _KEEPALIVES_MISSED,
        "connect_timeout": options.connect_timeout,
        "login_timeout": options.connect_timeout,
        "compression_algs": None,  # page streams compress by themselves, the rest is small
    }
    if resolved.bind_address:
        given["local_addr"] = (resolved.bind_address, 0)
    if resolved.identities_only:
        given["agent_identities"] = list(resolved.identities) or None
    algorithms = {"encryption_algs": resolved.ciphers, "kex_algs": resolved.key_exchanges, "mac_algs": resolved.macs}
    given.update({name: list(value) for name, value in algorithms.items() if value})
    return given


def _host_key_error(destination: Destination, resolved: Resolved, client: _Client) -> AuthenticationError:
    if client.offered is None:
        return AuthenticationError(f"{destination.host} offers no host key that can be verified")
    fingerprint = f"{client.offered.get_algorithm()} {client.offered.get_fingerprint()}"
    name = resolved.host if resolved.port == 22 else f"[{resolved.host}]:{resolved.port}"
    if client.changed:
        return AuthenticationError(
            f"the host key of {destination.host} is not the known one: it offers {fingerprint}",
            advice="somebody may be in between. If the host was installed anew: "
            f"ssh-keygen -R {shlex.quote(name)}, then ssh {destination}",
        )
    return AuthenticationError(
        f"the host key of {destination.host} is not known: {fingerprint}",
        advice=f"compare it and accept it once with ssh {destination}, or use -o StrictHostKeyChecking=accept-new",
    )


async def _exit_status(process: asyncssh.SSHClientProcess[bytes]) -> int | None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2):
            await process.wait_closed()
    return process.exit_status


def _content(path: Any) -> bytes:
    """A known_hosts file; ssh, too, goes on without one that is not there."""
    try:
        return bytes(path.read_bytes()) + b"\n"
    except OSError:
        return b""


def _reason(error: Exception) -> str:
    """An error in few words; asyncio's "Connect call failed (...)" hides the system's own."""
    if isinstance(error, OSError) and error.errno and error.errno > 0 and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _said(text: str) -> str:
    return f"; it said {text[-300:]!r}" if text else ""


def _as_bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else str(data or "").encode()

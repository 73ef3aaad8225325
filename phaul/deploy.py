"""`phaul deploy`: phaul on the other host, over SSH, the same as here.

Nothing is needed there but Python 3.11 or newer, root (or sudo without a password), and room for a virtual environment;
in particular no network but SSH. Done again, it changes nothing.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import phaul
from phaul import bundle, unpacking
from phaul.config import Settings
from phaul.errors import AuthenticationError, PhaulError
from phaul.transport import hello, relay, ssh
from phaul.transport.ssh_config import Destination, SshOptions

PREFIX = "/opt/phaul"
LINK = "/usr/local/bin/phaul"
_ASK = 20.0  # seconds for a question
_SEND = 900.0  # seconds for sending and unpacking
_NO_PYTHON = 89  # the exit status of _LOOK

# Prints the first usable interpreter's facts as JSON. %s are names to try, those that we would like best first.
_LOOK = """\
for p in %s; do
  command -v "$p" >/dev/null || continue
  exec "$p" -c 'import json, os, platform, sys; print(json.dumps({"python": os.path.realpath(sys.executable),
"version": sys.version_info[:2], "machine": platform.machine(), "uid": os.getuid()}))'
done
exit 89
"""


@dataclass(frozen=True)
class There:
    """What the other host has. `python` is the path of its interpreter."""

    python: str
    version: tuple[int, int]
    machine: str
    uid: int


@dataclass(frozen=True)
class Deployed:
    """What was done. `did` is empty where all was there: installed, switched, linked."""

    host: str
    version: str
    python: str
    command: str
    did: tuple[str, ...]
    sent: int
    warning: str = ""


async def deploy(destination: Destination, settings: Settings, *, prefix: str = PREFIX) -> Deployed:
    """Bring it there. PhaulError if it cannot be, with nothing changed."""
    options = SshOptions.of(settings.ssh)
    async with ssh.connect(destination, options) as connection:
        there = await _look(connection)
        _check(there, connection.name)
        with bundle.bundle(there.version) as content:
            digest, link = content.digest, LINK if prefix == PREFIX else ""
            sent = b"" if await _has(connection, there, f"{prefix}/versions/{digest}/complete") else content.archive()
        said = await _unpack(connection, there, [prefix, digest, link], sent)
        warning = str(said["warning"]) or await _try(connection, options, str(said["command"]))
    did = tuple(str(said["did"]).split())
    return Deployed(connection.name, phaul.__version__, there.python, str(said["command"]), did, len(sent), warning)


async def _look(connection: ssh.Connection) -> There:
    ours = sys.version_info[1]
    newer = [f"python3.{minor}" for minor in range(ours + 4, bundle.OLDEST_PYTHON[1] - 1, -1) if minor != ours]
    names = [f"python3.{ours}", *newer, "python3"]
    status, out, err = await connection.run(_in_shell(_LOOK % " ".join(names)), timeout=_ASK)
    if status == _NO_PYTHON:
        raise PhaulError(f"there is no Python on {connection.name}", advice=_WANTED)
    try:
        said = json.loads(out.splitlines()[-1])
        major, minor = said["version"]
        return There(str(said["python"]), (int(major), int(minor)), str(said["machine"]), int(said["uid"]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        words = err.decode(errors="replace").strip()[-300:]
        raise PhaulError(f"Python on {connection.name} does not work: exit status {status}; {words}") from error


_WANTED = "install Python 3.11 or newer there (apt install python3, dnf install python3.11)"


def _check(there: There, host: str) -> None:
    if there.version < bundle.OLDEST_PYTHON:
        version = ".".join(map(str, there.version))
        raise PhaulError(f"{there.python} on {host} is Python {version}, which is too old", advice=_WANTED)
    if there.machine != platform.machine():
        raise PhaulError(f"{host} is a {there.machine}, this host a {platform.machine()}: programs cannot move there")


def _in_shell(text: str) -> str:
    """Whatever shell the user has."""
    return "exec /bin/sh -c " + shlex.quote(text)


def _as_root(there: There, command: str) -> str:
    return _in_shell(f"exec {command}" if there.uid == 0 else f"LC_ALL=C exec sudo -n {command}")


async def _has(connection: ssh.Connection, there: There, path: str) -> bool:
    status, _, err = await connection.run(_as_root(there, f"test -e {shlex.quote(path)}"), timeout=_ASK)
    text = err.decode(errors="replace").strip()
    if status and text.startswith("sudo:"):
        raise AuthenticationError(
            f"{connection.destination.user or 'the user'} may not become root on {connection.name} ({text})",
            advice="log in as root, or allow sudo without a password for the time of `phaul deploy`",
        )
    return status == 0


async def _unpack(connection: ssh.Connection, there: There, arguments: list[str], sent: bytes) -> dict[str, object]:
    text = Path(unpacking.__file__).read_text()
    command = shlex.join([there.python, "-I", "-c", text, *arguments])
    status, out, err = await connection.run(_as_root(there, command), stdin=sent, timeout=_SEND)
    if status:
        said = err.decode(errors="replace").strip()[-600:]
        where = "what was there before is in use"
        raise PhaulError(f"installing phaul on {connection.name} failed: {said}", where=where)
    answer = json.loads(out.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


async def _try(connection: ssh.Connection, options: SshOptions, command: str) -> str:
    """Start it as a migration would. What an operator has to know if it is not the one that comes up."""
    try:
        agent = await connection.start_agent(hello.local(relay.FEATURES))
        agent.process.close()
    except PhaulError as error:
        return f"`{options.remote_command}` there does not start it: {error}; [ssh] remote_command = {command!r} does"
    return ""

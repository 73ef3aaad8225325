"""`phaul agent --stdio`: stands between a byte stream (SSH, or a pipe from `phaul`) and the agent on this host.

It dies with its stream; the agent does not. The agent listens on a unix socket in the run directory and lives in a
session of its own under its keeper, so that a lost connection, terminal or sshd ends nothing, and a relay that is
started later with the same migration finds it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from phaul.desk import Desk
from phaul.errors import PhaulError, UsageError
from phaul.transport import hello as greeting
from phaul.transport.control import StreamLink

LAYERS = "haul-layers"  # a file system of layers is mounted there, and filled (phaul.haul.overlay)
ATTRIBUTES = "haul-attributes"  # so are file attributes set (phaul.haul.attributes)
FEATURES = frozenset({LAYERS, ATTRIBUTES})  # abilities beyond protocol 1 that this phaul has
ROLES = ("source", "destination")

_ID = re.compile(r"[0-9a-z][0-9a-z-]{7,63}")
_GREETING_TIMEOUT = 30.0  # seconds
_CHUNK = 1 << 18

# Starts the agent of a role and a migration so that it outlives us; it accepts on the listener, which it inherits.
# Returns what ends it at once, as long as it has not been asked for anything.
Launcher: TypeAlias = Callable[[str, str, socket.socket], Callable[[], None] | None]


def socket_path(run_directory: Path, migration: str, role: str) -> Path:
    """Where the agent of a migration listens. The id has been checked: it comes from elsewhere."""
    if not _ID.fullmatch(migration) or role not in ROLES:
        raise UsageError(f"not a migration: {role!r} {migration!r:.80}")
    return run_directory / f"{migration}.{role}.sock"


def peer_is_root(connection: socket.socket) -> bool:
    """Whether the process at the other end of a unix socket is root (SO_PEERCRED, unix(7))."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == 0)


class Agents:
    """The agents that a relay starts, and its connections to them until one is asked for."""

    def __init__(self, run_directory: Path, launch: Launcher) -> None:
        self._run_directory = run_directory
        self._launch = launch
        self._ready: dict[tuple[str, str], socket.socket] = {}
        self._ends: dict[tuple[str, str], Callable[[], None]] = {}

    def start(self, role: str, migration: str) -> None:
        """Have an agent come up that will soon be asked for. It ends when we do without asking for it."""
        if (role, migration) not in self._ready:
            self._ready[role, migration] = self._connect(role, migration)

    def take(self, role: str, migration: str) -> socket.socket:
        """A connection to the agent of a migration; it is started if it is not there."""
        ready = self._ready.pop((role, migration), None)
        if ready is not None and _alive(ready):
            return ready
        if ready is not None:
            ready.close()
        return self._connect(role, migration)

    def close(self) -> None:
        """Let go of agents that nobody asked for."""
        for (role, migration), connection in self._ready.items():
            connection.close()
            if (role, migration) in self._ends:
                self._ends[role, migration]()
                socket_path(self._run_directory, migration, role).unlink(missing_ok=True)
        self._ready.clear()

    def _connect(self, role: str, migration: str) -> socket.socket:
        path = socket_path(self._run_directory, migration, role)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):  # refused: its owner is dead, the name is left over
                with _listener(path) as listener:
                    end = self._launch(role, migration, listener)
                if end is not None:
                    self._ends[role, migration] = end
                connection.connect(str(path))
        except BaseException:
            connection.close()
            raise
        return connection


def _alive(connection: socket.socket) -> bool:
    """Whether the other end is still there."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _listener(path: Path) -> socket.socket:
    """Listen at a path that only root reaches. A name left over by a dead agent is taken over."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    temporary = path.with_suffix(f".{os.getpid()}")
    listener.bind(str(temporary))
    temporary.chmod(0o600)
    listener.listen(8)
    temporary.rename(path)  # atomic: whoever connects finds a socket that is listened to
    return listener


async def serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    desk: Desk,
    run_directory: Path,
    features: frozenset[str],
    launch: Launcher,
) -> None:
    """Greet, answer at the desk, then be the agent's that is asked for, until the stream ends."""
    writer.write(greeting.local(features).line())
    await writer.drain()
    async with asyncio.timeout(_GREETING_TIMEOUT):
        await greeting.receive(reader)
    with contextlib.closing(Agents(run_directory, launch)) as agents:
        wanted = await desk.serve(StreamLink(reader, writer), agents.start)
        connection = agents.take(*wanted) if wanted is not None else None
    if connection is not None:
        await _bridge(reader, writer, *await asyncio.open_connection(sock=connection))


async def _bridge(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    agent_reader: asyncio.StreamReader,
    agent_writer: asyncio.StreamWriter,
) -> None:
    """Copy both ways. The end of our stream is passed on; the agent's end is ours."""
    inward = asyncio.create_task(_copy(reader, agent_writer))
    try:
        await _copy(agent_reader, writer)
    finally:
        inward.cancel()
        await asyncio.gather(inward, return_exceptions=True)
        agent_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


async def stdio() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """This process's stdin and stdout as streams; they must be pipes, sockets or terminals."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    try:
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
        transport, protocol = await loop.connect_write_pipe(  # the protocol that tells when all is written
            lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), sys.stdout.buffer
        )
    except ValueError as error:
        raise PhaulError("an agent speaks through pipes: it is started by phaul, not by hand") from error
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)

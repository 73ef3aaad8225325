"""Code of ours that runs inside namespaces of a tree.

Where a thread will do, `objects.places.inside` is quicker. User and pid namespaces can only be joined by a process of
one thread, and what a mount of proc, mqueue or tmpfs shows, and who owns it, is up to where its mounter is. So a fresh
process of Python joins, and then calls functions for us:

    with Worker(place.descriptors, names=("user", "pid", "mnt"), modules=(__name__,)) as worker:
        worker.call(make_mounts, [...], Descriptor(fd))

It imports modules before it joins: afterwards it sees other files. Arguments and results are what JSON knows, bytes,
and descriptors. It knows nothing of the engine's native library. When it is through, or when we die, it ends, and
leaves nothing but what it has made.
"""

from __future__ import annotations

import array
import base64
import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from phaul_engine.errors import EngineError

_HEAD = struct.Struct("<QI")  # bytes of text, descriptors
_MOST = 200  # descriptors in one message (SCM_MAX_FD is 253)
_PR_SET_DUMPABLE = 4
_LAST = ("pid", "user")  # what the last two steps of joining are: a child of ours is born into it; it takes our rights


@dataclass(frozen=True)
class Descriptor:
    """A descriptor among arguments or results: a number in the table of whoever holds it. Whoever receives one closes
    it; the sender's stays open."""

    fd: int


class InsideError(EngineError):
    """A function failed inside; `errno` is 0 unless it was an OSError."""

    errno: int = 0


class Worker:
    """A process in namespaces: descriptors by kind, of which it joins `names` (all of them by default). With `root`, a
    descriptor of a directory, that is its root directory. In a user namespace it is root, if there is one."""

    def __init__(
        self,
        namespaces: Mapping[str, int],
        *,
        names: Sequence[str] | None = None,
        modules: Sequence[str] = (),
        root: int | None = None,
    ) -> None:
        ours, theirs = socket.socketpair()
        paths = [str(Path(__file__).parents[2]), *sys.path]
        text = f"import sys; sys.path[:] = {paths!r}; from {__name__} import serve; serve({theirs.fileno()})"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", text],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        try:
            wanted = {name: Descriptor(namespaces[name]) for name in (namespaces if names is None else names)}
            self._ask("", list(modules), wanted, None if root is None else Descriptor(root))
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Our number of it; of a process that joined a pid namespace, that of its parent."""
        return self._process.pid

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of a module, imported there, returns. InsideError if it fails."""
        return self._ask(f"{function.__module__}:{function.__qualname__}", *arguments)

    def close(self) -> None:
        """End it, and wait until it has."""
        self._socket.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            _send(self._socket, [what, list(arguments)])
            answer = _receive(self._socket)
        except OSError as error:
            raise InsideError(f"a process of phaul in other namespaces was lost: {error}") from error
        if answer is None:
            raise InsideError("a process of phaul in other namespaces ended before it was through")
        ok, result = answer
        if ok:
            return result
        problem = InsideError(result[0])
        problem.errno = result[1]
        raise problem


def call(namespaces: Mapping[str, int], function: Callable[..., Any], *arguments: Any, root: int | None = None) -> Any:
    """One call in namespaces, all of them."""
    with Worker(namespaces, modules=(function.__module__,), root=root) as worker:
        return worker.call(function, *arguments)


# -- the other process ---------------------------------------------------------------------------------------------


def serve(fd: int) -> None:
    """The life of a worker."""
    peer = socket.socket(fileno=fd)
    request = _receive(peer)
    if request is None:
        return
    try:
        _prepare(*request[1])
    except Exception as error:
        _send(peer, [False, _told(error)])
        return
    _send(peer, [True, None])
    while (request := _receive(peer)) is not None:
        name, arguments = request
        module, _, function = name.partition(":")
        try:
            answer = [True, getattr(sys.modules[module], function)(*arguments)]
        except Exception as error:
            answer = [False, _told(error)]
        _send(peer, answer)


def _told(error: Exception) -> list[Any]:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error) or type(error).__name__
    return [f"{text} ({where.name})", error.errno or 0 if isinstance(error, OSError) else 0]


def _prepare(modules: list[str], namespaces: dict[str, Descriptor], root: Descriptor | None) -> None:
    for module in modules:
        importlib.import_module(module)
    libc = ctypes.CDLL(None, use_errno=True)
    for name in (*(name for name in namespaces if name not in _LAST), *(name for name in _LAST if name in namespaces)):
        if libc.setns(namespaces[name].fd, 0) < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"cannot join a {name} namespace: {os.strerror(error)}")
        os.close(namespaces[name].fd)
    if "user" in namespaces:
        _become_root()
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if root is not None:
        os.fchdir(root.fd)
        os.chroot(".")
        os.close(root.fd)
    if "pid" in namespaces:
        _be_born()


def _become_root() -> None:
    """Whatever is made belongs to root of the user namespace, if it has one."""
    for act, ids in ((os.setgroups, ([],)), (os.setresgid, (0, 0, 0)), (os.setresuid, (0, 0, 0))):
        with contextlib.suppress(OSError):
            act(*ids)


def _be_born() -> None:
    """A pid namespace is joined by children only: one goes on here, and we wait for it."""
    child = os.fork()
    if child == 0:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.closerange(0, 256)
    _, status = os.waitpid(child, 0)
    os._exit(0 if status == 0 else 1)


# -- what goes to and fro --------------------------------------------------------------------------------------------


def _send(peer: socket.socket, value: Any) -> None:
    fds: list[int] = []
    text = json.dumps(_packed(value, fds)).encode()
    if len(fds) > _MOST:
        raise ValueError(f"{len(fds)} descriptors are too many for one message")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    peer.sendmsg([_HEAD.pack(len(text), len(fds))], ancillary)
    peer.sendall(text)


def _receive(peer: socket.socket) -> Any:
    """The next message; None if there will be none."""
    head, ancillary, _, _ = peer.recvmsg(_HEAD.size, socket.CMSG_SPACE(4 * _MOST), socket.MSG_CMSG_CLOEXEC)
    if not head:
        return None
    head += _exactly(peer, _HEAD.size - len(head))
    size, count = _HEAD.unpack(head)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if len(fds) != count:
        raise OSError(f"{count} descriptors were sent and {len(fds)} came")
    return _unpacked(json.loads(_exactly(peer, size)), fds)


def _exactly(peer: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = peer.recv(min(size, 1 << 20))
        if not part:
            raise OSError("a message ended in the middle")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _packed(value: Any, fds: list[int]) -> Any:
    match value:
        case Descriptor(fd):
            fds.append(fd)
            return {"fd": len(fds) - 1}
        case bytes():
            return {"bytes": base64.b64encode(value).decode()}
        case dict():
            return {"map": [[_packed(key, fds), _packed(one, fds)] for key, one in value.items()]}
        case list() | tuple():
            return [_packed(one, fds) for one in value]
        case _:
            return value


def _unpacked(value: Any, fds: Sequence[int]) -> Any:
    match value:
        case {"fd": index}:
            return Descriptor(fds[index])
        case {"bytes": text}:
            return base64.b64decode(text)
        case {"map": pairs}:
            return {_unpacked(key, fds): _unpacked(one, fds) for key, one in pairs}
        case list():
            return [_unpacked(one, fds) for one in value]
        case _:
            return value

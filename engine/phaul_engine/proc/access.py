"""Reading files of a /proc/PID directory (proc(5)).

All parsers of this package take a *process directory*: an O_PATH descriptor of /proc/PID or /proc/PID/task/TID. Unlike
the number, it cannot come to mean another process: when the process is reaped, every read through it fails, and that
is a `GoneError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from phaul_engine.errors import EngineError, GoneError

_GONE = (errno.ENOENT, errno.ESRCH)
_CHUNK = 1 << 16


def open_process(pid: int) -> int:
    """An O_PATH descriptor of /proc/PID, close-on-exec; the caller closes it."""
    return open_at(None, f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY)


def open_thread(proc: int, tid: int) -> int:
    """An O_PATH descriptor of the /proc/PID/task/TID under `proc`; the caller closes it."""
    return open_at(proc, f"task/{tid}", os.O_PATH | os.O_DIRECTORY)


def open_at(proc: int | None, name: str, flags: int = os.O_RDONLY) -> int:
    """Open `name` under a process directory, close-on-exec."""
    try:
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=proc)
    except OSError as error:
        raise _explain(error, name) from error


def read_bytes(proc: int, name: str) -> bytes:
    """The whole of a file under a process directory.

    Read in few large pieces: the kernel makes most of these texts anew for each read, and what is read in one piece
    is consistent.
    """
    fd = open_at(proc, name)
    try:
        first = os.read(fd, _CHUNK)
        parts = [first]
        while part := os.read(fd, _CHUNK):
            parts.append(part)
    except OSError as error:
        raise _explain(error, name) from error
    finally:
        os.close(fd)
    return first if len(parts) == 1 else b"".join(parts)


def read_text(proc: int, name: str) -> str:
    """As `read_bytes`, as text. Bytes that are not UTF-8 (names of files and tasks) survive as surrogates."""
    return read_bytes(proc, name).decode("utf-8", "surrogateescape")


def read_link(proc: int, name: str) -> str:
    """The text of a symbolic link under a process directory (exe, cwd, root, fd/N, ns/X)."""
    try:
        return os.readlink(name, dir_fd=proc)
    except OSError as error:
        raise _explain(error, name) from error


def list_numbers(proc: int, name: str) -> list[int]:
    """The numeric entries of a directory (task, fd), ascending."""
    return sorted(int(entry) for entry in list_names(proc, name) if entry.isdecimal())


def list_names(proc: int, name: str) -> list[str]:
    """The entries of a directory, sorted."""
    fd = open_at(proc, name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return sorted(os.listdir(fd))
    except OSError as error:
        raise _explain(error, name) from error
    finally:
        os.close(fd)


@contextlib.contextmanager
def looking() -> Iterator[None]:
    """What is looked at meanwhile may end or be closed: the kernel's words for that, whatever was asked (kcmp(2),
    netlink, links in /proc), become a `GoneError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (*_GONE, errno.EBADF):
            raise GoneError(f"what was looked at is gone: {error}") from error
        raise


def _explain(error: OSError, name: str) -> EngineError:
    if error.errno in _GONE:
        return GoneError(f"the process is gone: cannot read {name}: {error.strerror}")
    return EngineError(f"cannot read {name} of a process: {error.strerror}")

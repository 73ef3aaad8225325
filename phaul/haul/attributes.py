"""File attributes, as chattr(1) sets them (ioctl_iflags(2)).

Two of them forbid what a haul does: an immutable file takes no content, and no name. At the destination these are held
back until the last round has come, and taken away again if another one follows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

_GET, _SET = 0x80086601, 0x40086602  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
_COMPRESSED, _SYNC, _IMMUTABLE, _APPEND, _NODUMP, _NOATIME = 0x4, 0x8, 0x10, 0x20, 0x40, 0x80
_NOCOMP, _DIRSYNC, _TOPDIR = 0x400, 0x10000, 0x20000
NOCOW = 0x800000
"""No copy on write: a file can be given it only while it is empty."""
HELD = _IMMUTABLE | _APPEND
"""What a program relies on, and what is held back."""
_WISHES = (_COMPRESSED, _NOCOMP, NOCOW, _SYNC, _NODUMP, _NOATIME, _DIRSYNC, _TOPDIR)
KEPT = HELD | sum(_WISHES)
"""All that go along; of the others the kernel decides."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_UNKNOWN = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def read(place: str | int) -> int:
    """Those of a file or directory, by its name or a descriptor; none where a file system, or the file, has none."""
    try:
        with _opened(place) as fd:
            return _get(fd) & KEPT
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise
        return 0


def write(fd: int, wanted: int) -> None:
    """Give a file these and no others. What its file system does not know is left out; but OSError where that is
    something that a program relies on."""
    try:
        have = _get(fd)
    except OSError:
        if wanted & HELD:
            raise
        return
    if have & KEPT == wanted:
        return
    try:
        _put(fd, have & ~KEPT | wanted)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        _put(fd, have & ~KEPT | wanted & HELD)
        for one in _WISHES:
            if wanted & one:
                with contextlib.suppress(OSError):
                    _put(fd, _get(fd) | one)


def release(top: str) -> None:
    """Take away what keeps a directory, and what is below it, from being removed."""
    for directory, directories, files in os.walk(top):
        for place in (directory, *(f"{directory}/{name}" for name in (*directories, *files))):
            with contextlib.suppress(OSError), _opened(place) as fd:
                if (have := _get(fd)) & HELD:
                    _put(fd, have & ~HELD)


@contextlib.contextmanager
def _opened(place: str | int) -> Iterator[int]:
    if isinstance(place, int):
        yield place
        return
    fd = os.open(place, _READ)
    try:
        yield fd
    finally:
        os.close(fd)


def _get(fd: int) -> int:
    value: int = struct.unpack("I4x", fcntl.ioctl(fd, _GET, bytes(8)))[0]
    return value


def _put(fd: int, flags: int) -> None:
    fcntl.ioctl(fd, _SET, struct.pack("I4x", flags))

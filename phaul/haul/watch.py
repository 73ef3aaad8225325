"""Which names below a directory were touched, by inotify(7): one watch a directory.

A mark on the whole file system (fanotify(7), FAN_MARK_FILESYSTEM) would need fewer of them, but tells of everything
that anybody on the host does to that file system, and must be read all the time, the freeze included; and an overlay
has none. Watches tell of this directory alone. What is written through mappings no kernel tells: see
`leaving.mapped`.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, field

from phaul_engine import calls

from phaul.errors import PhaulError

_EVENT = struct.Struct("iIII")
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_OVERFLOW, _IGNORED = 0x4000, 0x8000
_ONLYDIR, _DONT_FOLLOW = 0x1000000, 0x2000000
_MASK = _MODIFY | _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _ONLYDIR | _DONT_FOLLOW
_ROOM = 1 << 16  # bytes of events that are read at once


@dataclass
class Touched:
    """Names, from the top of the tree, that something happened to; true where content may be another. `moved` are
    those that came or went. `lost`: there were more than the kernel remembers."""

    paths: dict[str, bool] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    lost: bool = False


class Watch:
    """Follows one tree; `root` is where it is."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._fd = calls.inotify_init(os.O_NONBLOCK | os.O_CLOEXEC)
        self._places: dict[int, str] = {}

    def add(self, directory: str) -> None:
        """Watch a directory, by its name from the top. OSError if it is none any more."""
        try:
            self._places[calls.inotify_add_watch(self._fd, f"{self._root}/{directory}", _MASK)] = directory
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise PhaulError(
                    f"{self._root} has more directories than may be watched here",
                    advice="raise fs.inotify.max_user_watches (sysctl)",
                ) from error
            raise

    def read(self) -> Touched:
        """What has happened since the last time."""
        touched = Touched()
        while True:
            try:
                events = os.read(self._fd, _ROOM)
            except BlockingIOError:
                return touched
            offset = 0
            while offset < len(events):
                number, mask, _, length = _EVENT.unpack_from(events, offset)
                offset += _EVENT.size + length
                self._note(number, mask, events[offset - length : offset].rstrip(b"\0"), touched)

    def _note(self, number: int, mask: int, name: bytes, touched: Touched) -> None:
        if mask & _OVERFLOW:
            touched.lost = True
            return
        if mask & _IGNORED:
            self._places.pop(number, None)
            return
        directory = self._places.get(number)
        if directory is None:
            return
        path = join(directory, os.fsdecode(name)) if name else directory
        content = bool(mask & (_MODIFY | _CLOSE_WRITE))
        touched.paths[path] = touched.paths.get(path, False) or content
        if mask & (_CREATE | _DELETE | _MOVED_FROM | _MOVED_TO):
            touched.moved.add(path)

    def close(self) -> None:
        """Stop."""
        os.close(self._fd)


def join(directory: str, name: str) -> str:
    """A name in a directory, both from the top of the tree; the top itself is the empty one."""
    return f"{directory}/{name}" if directory else name

"""Files made unseen, in a directory of their own beside their final place, and published with one rename."""

from __future__ import annotations

import itertools
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

KIND = "staged-file"
"""Of journal entries."""

_numbers = itertools.count(1)


def fresh_name() -> str:
    """A name for a directory that waits beside a final place."""
    return f".phaul-{os.getpid()}-{next(_numbers)}"


@dataclass
class Staged:
    """A file that waits beside its final place. `parent` is a descriptor of the directory of that place."""

    parent: int
    directory: str
    name: str
    path: str

    def publish(self) -> None:
        """Give the file its name, unless something else has it by now. Doing it twice does no harm."""
        with suppress(FileNotFoundError):
            draft = f"{self.directory}/{self.name}"
            if not _in_the_way(draft, self.name, self.parent):
                os.rename(draft, self.name, src_dir_fd=self.parent, dst_dir_fd=self.parent)
        self.discard()

    def discard(self) -> None:
        """Remove what is left of it."""
        with suppress(FileNotFoundError):
            os.unlink(f"{self.directory}/{self.name}", dir_fd=self.parent)
        with suppress(FileNotFoundError):
            os.rmdir(self.directory, dir_fd=self.parent)
        if self.parent >= 0:
            os.close(self.parent)
            self.parent = -1

    def entry(self) -> dict[str, Any]:
        """The journal's entry for `undo`."""
        directory = os.path.join(os.path.dirname(self.path), self.directory)
        return {"kind": KIND, "data": {"directory": directory, "name": self.name}}


def _in_the_way(draft: str, place: str, directory: int | None = None) -> bool:
    """Whether what stands at a place keeps a socket from it: anything but a socket, which may be stale. Whether a file
    may be replaced was looked at when the draft was made."""
    draft_mode = os.stat(draft, dir_fd=directory, follow_symlinks=False).st_mode
    try:
        place_mode = os.stat(place, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISSOCK(draft_mode) and not stat.S_ISSOCK(place_mode)


def undo(data: dict[str, Any]) -> None:
    """Remove a staged file that a journal entry names. Doing it twice does no harm."""
    directory, name = data["directory"], data["name"]
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, name))
    with suppress(FileNotFoundError):
        os.rmdir(directory)


def redo(data: dict[str, Any]) -> None:
    """Publish a staged file that a journal entry names, if that was not done."""
    directory, name = data["directory"], data["name"]
    draft, place = os.path.join(directory, name), os.path.join(os.path.dirname(directory), name)
    with suppress(FileNotFoundError):
        if not _in_the_way(draft, place):
            os.rename(draft, place)
        if stat.S_ISREG(os.lstat(place).st_mode):
            _sync(place)
            _sync(os.path.dirname(place))
    undo(data)


def _sync(path: str) -> None:
    """To the disk, before the last copy elsewhere is given up."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""Files made unseen, in a directory of their own beside their final place, and published with one rename.

Whoever finishes this after a crash has the journal alone, and the host's own view: no descriptor, and for a tree with a
mount namespace of its own a name is not enough. So an entry says where the directory is on the host; or, if only the
tree mounts it, how the tree names it, and through which task: such a place ends with the tree.
"""

from __future__ import annotations

import functools
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from phaul_engine import calls
from phaul_engine.proc import lives
from phaul_engine.proc.access import open_process
from phaul_engine.proc.mountinfo import Mount, read_mounts

from .base import SkeletonTask

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

KIND = "staged-file"
"""Of journal entries."""

_numbers = itertools.count(1)


def fresh_name() -> str:
    """A name for a directory that waits beside a final place."""
    return f".phaul-{os.getpid()}-{next(_numbers)}"


@dataclass
class Staged:
    """A file that waits beside its final place, `path` as the tree, `tasks`, names it. `parent` is a descriptor of the
    directory of that place."""

    parent: int
    directory: str
    name: str
    path: str
    tasks: tuple[SkeletonTask, ...] = ()
    maker: tuple[int, int] | None = None  # as whom files are made there

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
        """The journal's entry for `undo` and `redo`; the same whenever it is asked for."""
        return self._entry

    @functools.cached_property
    def _entry(self) -> dict[str, Any]:
        above = os.path.dirname(self.path)
        outside, task = _outside(self.parent, above, self.tasks)
        data: dict[str, Any] = {"directory": os.path.join(outside or above, self.directory), "name": self.name}
        if not outside and task is not None:
            data["tasks"] = lives.tasks([task.pid])
        return {"kind": KIND, "data": data}


def _outside(directory: int, name: str, tasks: Iterable[SkeletonTask]) -> tuple[str, SkeletonTask | None]:
    """How this host names a directory that is `name` for the tree; empty if only the tree mounts it, and for which of
    its tasks it has that name."""
    own = _mounts_of(os.getpid())
    if outer := _outer_name(directory, own, own):
        return outer, None
    for task in tasks:
        with suppress(OSError), _opened(task.root, name) as found:
            if os.path.samestat(os.fstat(found), os.fstat(directory)):
                return _outer_name(found, read_mounts(task.proc), own), task
    return "", None


def _outer_name(directory: int, theirs: Iterable[Mount], own: Iterable[Mount]) -> str:
    """The name on a mount of ours of a directory that is on one of `theirs`; empty if it is on none."""
    number = calls.mount_id(directory)
    mount = next((one for one in theirs if one.id == number), None)
    inner = os.readlink(f"/proc/self/fd/{directory}")
    if mount is None or not _is_below(inner, mount.point):
        return ""
    place = os.path.normpath(os.path.join(mount.root, os.path.relpath(inner, mount.point)))
    for one in own:
        if one.dev == mount.dev and _is_below(place, one.root):
            outer = os.path.normpath(os.path.join(one.point, os.path.relpath(place, one.root)))
            with suppress(OSError):
                if os.path.samestat(os.stat(outer), os.fstat(directory)):
                    return outer
    return ""


def _mounts_of(pid: int) -> tuple[Mount, ...]:
    proc = open_process(pid)
    try:
        return read_mounts(proc)
    finally:
        os.close(proc)


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath((path, root)) == root


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
    with suppress(FileNotFoundError), _beside(data) as parent:
        _remove(parent, os.path.basename(data["directory"]), data["name"])


def redo(data: dict[str, Any]) -> None:
    """Publish a staged file that a journal entry names, if that was not done."""
    directory, name = os.path.basename(data["directory"]), data["name"]
    with suppress(FileNotFoundError), _beside(data) as parent:
        with suppress(FileNotFoundError):
            if not _in_the_way(f"{directory}/{name}", name, parent):
                os.rename(f"{directory}/{name}", name, src_dir_fd=parent, dst_dir_fd=parent)
            if stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                _sync(name, parent)
                _sync(".", parent)
        _remove(parent, directory, name)


def _remove(parent: int, directory: str, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(f"{directory}/{name}", dir_fd=parent)
    with suppress(FileNotFoundError):
        os.rmdir(directory, dir_fd=parent)


@contextmanager
def _beside(data: dict[str, Any]) -> Iterator[int]:
    """The directory of a file's final place. FileNotFoundError if it went with the tree."""
    if "tasks" not in data:
        root = os.open("/", _DIRECTORY)
    elif lives.any_lives(data["tasks"]):
        root = os.open(f"/proc/{data['tasks'][0][0]}/root", _DIRECTORY)
    else:
        raise FileNotFoundError(data["directory"])
    try:
        with _opened(root, os.path.dirname(data["directory"])) as parent:
            yield parent
    finally:
        os.close(root)


@contextmanager
def _opened(root: int, name: str) -> Iterator[int]:
    fd = calls.open_in_root(root, name, _DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _sync(name: str, directory: int) -> None:
    """To the disk, before the last copy elsewhere is given up."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

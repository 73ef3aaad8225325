"""The tree of mounts that an image of a mount namespace tells of.

A mount hides what is below it: of two mounts on one parent, one whose point is a directory above the other's was
attached later, or the other would be on it. So the tree alone says in which order mounts can be attached.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator

from phaul_engine.errors import ImageError
from phaul_engine.images.pb import mnt_pb2


class MountTree:
    """The mounts of one namespace, by number; ImageError if they are no tree."""

    def __init__(self, entries: Iterable[mnt_pb2.mnt_entry]) -> None:
        self.entries = {entry.mnt_id: entry for entry in entries}
        self._children: dict[int, list[mnt_pb2.mnt_entry]] = {}
        roots = []
        for entry in self.entries.values():
            _check_path(entry.mountpoint)
            parent = self.entries.get(entry.parent_mnt_id)
            if parent is None or parent is entry:
                roots.append(entry)
                continue
            if not lies_in(entry.mountpoint, parent.mountpoint):
                raise ImageError(f"mount {entry.mnt_id} is at {os_text(entry.mountpoint)}, which is not in its parent")
            self._children.setdefault(entry.parent_mnt_id, []).append(entry)
        if len(roots) != 1:
            raise ImageError(f"the image of a mount namespace has {len(roots)} roots")
        self.root = roots[0]
        for children in self._children.values():
            children.sort(key=lambda child: -_depth(child.mountpoint))
        if sum(1 for _ in self.order()) != len(self.entries):
            raise ImageError("mounts in an image are each other's parents")

    def order(self) -> Iterator[mnt_pb2.mnt_entry]:
        """Parents before children, and what hides another mount after that and all that is on it."""
        stack = [self.root]
        while stack:
            entry = stack.pop()
            yield entry
            stack.extend(reversed(self._children.get(entry.mnt_id, [])))

    def children(self, entry: mnt_pb2.mnt_entry) -> list[mnt_pb2.mnt_entry]:
        """What is mounted on a mount, in the order of `order`."""
        return list(self._children.get(entry.mnt_id, []))

    def place(self, entry: mnt_pb2.mnt_entry) -> str:
        """Where a mount is, seen from the root of its parent; empty for its very root."""
        return relative(entry.mountpoint, self.entries[entry.parent_mnt_id].mountpoint)

    def at(self, path: bytes) -> mnt_pb2.mnt_entry:
        """The mount that a path leads to."""
        here = self.root
        while True:
            over = [child for child in self._children.get(here.mnt_id, []) if lies_in(path, child.mountpoint)]
            if not over:
                return here
            here = over[-1]  # the shortest: it is met first

    def visible(self, entry: mnt_pb2.mnt_entry) -> bool:
        """Whether a path leads to a mount's root."""
        return self.at(entry.mountpoint) is entry


def lies_in(path: bytes, directory: bytes) -> bool:
    """Whether a path is a directory's, or of something in it."""
    return directory == b"/" or path == directory or path.startswith(directory + b"/")


def relative(path: bytes, directory: bytes) -> str:
    """A path seen from a directory above it, without a leading slash; empty for the directory itself."""
    return path.decode("utf-8", "surrogateescape")[len(directory.rstrip(b"/")) :].strip("/")


def join(directory: bytes, path: str) -> bytes:
    """The opposite of `relative`."""
    tail = path.encode("utf-8", "surrogateescape")
    return directory.rstrip(b"/") + b"/" + tail if tail else directory


def _depth(path: bytes) -> int:
    return 0 if path == b"/" else path.count(b"/")


def _check_path(path: bytes) -> None:
    if not path.startswith(b"/") or b"\0" in path or (path != b"/" and posixpath.normpath(path) != path):
        raise ImageError(f"the image tells of a mount at {path!r}, which is no absolute path")


def os_text(path: bytes) -> str:
    """A path of an image in messages to people."""
    return path.decode("utf-8", "surrogateescape")

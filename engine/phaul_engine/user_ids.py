"""Ids of users and groups in a tree's user namespace (user_namespaces(7)), which images hold, and here, which system
calls of the engine take and tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .errors import ImageError
from .images.checkpoint import Checkpoint
from .images.pb import userns_pb2
from .proc.id_map import OVERFLOW, IdMap, inside, outside

_IMAGE = "userns"
_DEEPEST = 32  # the kernel's own limit of user namespaces below each other

ALL: IdMap = ((0, 0, 0xFFFFFFFF),)
"""Every number stands for itself."""


class UserIds:
    """Ids of users and groups inside the user namespace of a tree, and here. Without such a namespace they are the
    same. `number` names another one in the images, below that: what it has is told as here, too."""

    def __init__(self, checkpoint: Checkpoint, number: int | None = None) -> None:
        entry = _of_tree(checkpoint) if number is None else _entry(checkpoint, number)
        self._uids: IdMap | None = None
        self._gids: IdMap | None = None
        if entry is not None:
            self._uids, self._gids = _extents(entry.uid_map), _extents(entry.gid_map)
        for above in _above(checkpoint, entry):
            self._uids = _beyond(self._uids or (), _extents(above.uid_map))
            self._gids = _beyond(self._gids or (), _extents(above.gid_map))

    @property
    def maps(self) -> tuple[IdMap, IdMap]:
        """Of users and of groups, inside to here."""
        return ALL if self._uids is None else self._uids, ALL if self._gids is None else self._gids

    @property
    def root(self) -> tuple[int, int]:
        """Which user and group of ours root inside is; ours, if there is none."""
        found = self.uid_here(0), self.gid_here(0)
        return (0, 0) if OVERFLOW in found else found

    def uid_inside(self, uid: int) -> int:
        """What a user of ours is called inside; the overflow id if it is nobody there."""
        return uid if self._uids is None else inside(self._uids, uid)

    def gid_inside(self, gid: int) -> int:
        """Likewise a group."""
        return gid if self._gids is None else inside(self._gids, gid)

    def uid_here(self, uid: int) -> int:
        """Which user of ours a user inside is."""
        return uid if self._uids is None else outside(self._uids, uid)

    def gid_here(self, gid: int) -> int:
        """Likewise a group."""
        return gid if self._gids is None else outside(self._gids, gid)


def _extents(entries: Iterable[userns_pb2.uid_gid_extent]) -> IdMap:
    return tuple((one.first, one.lower_first, one.count) for one in entries)


def below(checkpoint: Checkpoint) -> dict[int, userns_pb2.userns_entry]:
    """The user namespaces below the tree's own, by number."""
    found = {ident: checkpoint.one(_IMAGE, ident) for ident in checkpoint.idents(_IMAGE)}
    return {ident: entry for ident, entry in found.items() if isinstance(ident, int) and entry.HasField("phaul_parent")}


def has_own(checkpoint: Checkpoint) -> bool:
    """Whether the tree has a user namespace that is below no other of it, nor below the one that the engine was in."""
    return _of_tree(checkpoint) is not None


def _of_tree(checkpoint: Checkpoint) -> userns_pb2.userns_entry | None:
    entries = (checkpoint.one(_IMAGE, ident) for ident in checkpoint.idents(_IMAGE))
    return next((entry for entry in entries if not entry.HasField("phaul_parent")), None)


def _entry(checkpoint: Checkpoint, number: int) -> userns_pb2.userns_entry | None:
    """None stands for what the engine is in."""
    entry: userns_pb2.userns_entry | None = checkpoint.one(_IMAGE, number) if checkpoint.has(_IMAGE, number) else None
    return entry


def _above(checkpoint: Checkpoint, entry: userns_pb2.userns_entry | None) -> Iterator[userns_pb2.userns_entry]:
    """Those above one, up to what the engine is in. ImageError if there is no end."""
    for _ in range(_DEEPEST):
        if entry is None or not entry.HasField("phaul_parent"):
            return
        entry = _entry(checkpoint, entry.phaul_parent)
        if entry is not None:
            yield entry
    raise ImageError("the images have a user namespace that is below itself")


def _beyond(extents: IdMap, others: IdMap) -> IdMap:
    """What maps into one namespace, told in the numbers that this maps into."""
    found = []
    for first, lower, count in extents:
        for inner, outer, size in others:
            start, end = max(lower, inner), min(lower + count, inner + size)
            if start < end:
                found.append((first + start - lower, outer + start - inner, end - start))
    return tuple(found)

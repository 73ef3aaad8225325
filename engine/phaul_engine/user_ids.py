"""Ids of users and groups in a tree's user namespace (user_namespaces(7)), which images hold, and here, which system
calls of the engine take and tell."""

from __future__ import annotations

from collections.abc import Iterable

from .images.checkpoint import Checkpoint
from .images.pb import userns_pb2
from .proc.id_map import OVERFLOW, IdMap, inside, outside

_IMAGE = "userns"


class UserIds:
    """Ids of users and groups inside the user namespace of a tree, and here. Without such a namespace they are the
    same."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        idents = checkpoint.idents(_IMAGE)
        entry = checkpoint.one(_IMAGE, idents[0]) if idents else None
        self._uids = _extents(entry.uid_map) if entry is not None else None
        self._gids = _extents(entry.gid_map) if entry is not None else None

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

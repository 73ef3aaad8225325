"""User namespaces (user_namespaces(7)): which ids stand for which, and whether groups may be set.

The maps in the image are in numbers of the user namespace that the engine is in, at the source, and are written in
those of the one at the destination: as a rule the initial one in both places.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import userns_pb2
from phaul_engine.objects.base import Collection, Restoration
from phaul_engine.proc import access
from phaul_engine.proc.id_map import read_id_map

from .base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind

_IMAGE = "userns"


class Ids(NamedTuple):
    """What a task is given that is born into a user namespace: the content of uid_map and gid_map; and whether
    setgroups(2) is forbidden in it."""

    uid_map: bytes
    gid_map: bytes
    deny_groups: bool


@namespace_kind
class User(NamespaceKind):
    """The root of the tree is born into it, and given its maps before it does anything."""

    name: ClassVar = "user"
    flag: ClassVar = 0x10000000

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        if not view.of_root:
            why = "only the one that the first process of a tree is in is carried"
            collection.block(view.owner, "in a user namespace of its own", why, "let the program end that process")
        elif view.owner.inner_pid == view.owner.pid and len(collection.inner_pids) > 1:
            why = "its other processes would need numbers of the host's pid namespace, which are not theirs to choose"
            collection.block(view.owner, "in a user namespace of its own", why, "give it a pid namespace too")
        entry = userns_pb2.userns_entry()
        for extents, name in ((entry.uid_map, "uid_map"), (entry.gid_map, "gid_map")):
            for first, lower, count in read_id_map(view.owner.proc, name):
                extents.add(first=first, lower_first=lower, count=count)
        if access.read_text(view.owner.proc, "setgroups").strip() == "deny":
            entry.phaul_deny_setgroups = True
        collection.checkpoint.put(_IMAGE, view.number, entry)

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        """The maps were written at birth, and can be written only once."""


def ids(checkpoint: Checkpoint, number: int) -> Ids:
    """What the image of a user namespace says."""
    entry = checkpoint.one(_IMAGE, number)
    uids, gids = (
        b"".join(b"%d %d %d\n" % (one.first, one.lower_first, one.count) for one in extents)
        for extents in (entry.uid_map, entry.gid_map)
    )
    return Ids(uids, gids, entry.phaul_deny_setgroups)

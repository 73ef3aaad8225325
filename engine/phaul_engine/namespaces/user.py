"""User namespaces (user_namespaces(7)): which ids stand for which, and whether groups may be set.

The maps of that of a tree's first process are in numbers of the user namespace that the engine is in, at the source,
and are written in those of the one at the destination: as a rule the initial one in both places. Those of one below are
in numbers of its parent. What a process in such a one is to the tree's own is noted too, thread by thread: it may have
users and groups that have no number inside, or that nothing inside may set.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import userns_pb2
from phaul_engine.objects import credentials
from phaul_engine.objects.base import Collection, Restoration
from phaul_engine.proc import access
from phaul_engine.proc.id_map import inside, read_id_map

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
    """The root of the tree is born into its own, and given its maps before it does anything. Others: `below`."""

    name: ClassVar = "user"
    flag: ClassVar = 0x10000000

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        entry = userns_pb2.userns_entry()
        for extents, name in ((entry.uid_map, "uid_map"), (entry.gid_map, "gid_map")):
            for first, lower, count in read_id_map(view.owner.proc, name):
                extents.add(first=first, lower_first=lower, count=count)
        if access.read_text(view.owner.proc, "setgroups").strip() == "deny":
            entry.phaul_deny_setgroups = True
        if view.parent:
            _collect_below(view, entry, collection)
        collection.checkpoint.put(_IMAGE, view.number, entry)

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        """The maps were written at birth, and can be written only once."""


def _collect_below(view: NamespaceView, entry: userns_pb2.userns_entry, collection: Collection) -> None:
    """What is to be known of one that is not the first process's."""
    users, groups = (read_id_map(view.lord.proc, name) for name in ("uid_map", "gid_map"))
    for extents, numbers in ((entry.uid_map, users), (entry.gid_map, groups)):
        for extent in extents:
            extent.lower_first = inside(numbers, extent.lower_first)
    entry.phaul_parent, entry.phaul_owner = view.parent, inside(users, view.maker)
    entry.phaul_owns.extend(sorted(view.owns))
    for member in view.members:
        credentials.note_outer(member, collection)


def ids(checkpoint: Checkpoint, number: int) -> Ids:
    """What the image of a user namespace says."""
    entry = checkpoint.one(_IMAGE, number)
    uids, gids = (
        b"".join(b"%d %d %d\n" % (one.first, one.lower_first, one.count) for one in extents)
        for extents in (entry.uid_map, entry.gid_map)
    )
    return Ids(uids, gids, entry.phaul_deny_setgroups)

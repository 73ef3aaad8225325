"""PID namespaces of trees (pid_namespaces(7)): that of a container, whose first process is number 1 in it, and others
below that, of sandboxes in it.

Of the first there is no image: the numbers of processes in images are those in it. What they are called in those below
is in pstree.img (`numbering`). Where such a namespace is made for a tree that had none, `pid` is at work.
"""

from __future__ import annotations

from typing import ClassVar

from phaul_engine.images.pb import pidns_pb2
from phaul_engine.objects.base import Collection, Restoration
from phaul_engine.proc.status import read_status

from .base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind

_IMAGE = "pidns"


@namespace_kind
class Pids(NamespaceKind):
    """Its process 1 is born into it."""

    name: ClassVar = "pid"
    flag: ClassVar = 0x20000000

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        if view.of_root:
            first = view.owner.inner_pid == 1
        else:
            first = view.parent >= 0 and any(read_status(owner.proc).inner_pid == 1 for owner in view.members)
        if not first:
            why = "its process 1 stays here, and with it the namespace"
            collection.block(view.owner, "in a pid namespace of its own", why, "move its process 1")
        elif not view.of_root:
            collection.checkpoint.put(_IMAGE, view.number, pidns_pb2.pidns_entry(phaul_parent=view.parent))

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        """It came into being with its process 1."""

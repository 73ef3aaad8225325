"""PID namespaces of trees (pid_namespaces(7)): that of a container, whose first process is number 1 in it.

There is no image: the numbers of processes in images are those in it. Where such a namespace is made for a tree that
had none, `pid` is at work.
"""

from __future__ import annotations

from typing import ClassVar

from phaul_engine.objects.base import Collection, Restoration

from .base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind


@namespace_kind
class Pids(NamespaceKind):
    """The root of the tree is born into it."""

    name: ClassVar = "pid"
    flag: ClassVar = 0x20000000

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        if not view.of_root:
            why = "pid namespaces below that of the first process are not carried"
            collection.block(view.owner, "in a pid namespace of its own", why, "move it by itself, or end it")
        elif view.owner.inner_pid != 1:
            why = "its process 1 stays here, and with it the namespace"
            collection.block(view.owner, "in a pid namespace of its own", why, "move its process 1")

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        """It came into being with its process 1."""

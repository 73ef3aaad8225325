"""Time namespaces (time_namespaces(7)): that of the root goes on by its clocks, wherever the tree goes (`births`); a
tree has no other."""

from __future__ import annotations

from typing import ClassVar

from phaul_engine.objects.base import Collection, Restoration

from .base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind


@namespace_kind
class Clock(NamespaceKind):
    """Of a task deeper in the tree, a blocker."""

    name: ClassVar = "time"
    flag: ClassVar = 0x00000080

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        why = "all tasks of a tree have to have the clocks of its first process"
        collection.block(view.owner, "in a time namespace of its own", why, "move it by itself")

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        """Nothing comes here."""

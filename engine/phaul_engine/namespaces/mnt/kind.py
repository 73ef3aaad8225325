"""Mount namespaces (mount_namespaces(7)): which file systems are where."""

from __future__ import annotations

from typing import ClassVar

from phaul_engine.namespaces.base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind
from phaul_engine.objects.base import Collection, Restoration
from phaul_engine.objects.mounted import SCRATCH

from . import source
from .target import Mounts


@namespace_kind
class Mnt(NamespaceKind):
    """Images are those of CRIU: a record a mount, and the content of each tmpfs."""

    name: ClassVar = "mnt"
    flag: ClassVar = 0x20000

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        source.collect(view, collection)

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        mounts: Mounts | None = restoration.scratch.get(SCRATCH)
        if mounts is None:
            mounts = restoration.scratch[SCRATCH] = Mounts(restoration)
        mounts.build(place)

    def complete(self, place: NewNamespace, restoration: Restoration) -> None:
        restoration.scratch[SCRATCH].complete()

    def settle(self, place: NewNamespace, restoration: Restoration) -> None:
        restoration.scratch[SCRATCH].follow()

    def let_go(self, place: NewNamespace, restoration: Restoration) -> None:
        _close(restoration)

    def discard(self, place: NewNamespace, restoration: Restoration) -> None:
        _close(restoration)


def _close(restoration: Restoration) -> None:
    mounts: Mounts | None = restoration.scratch.pop(SCRATCH, None)
    if mounts is not None:
        mounts.close()

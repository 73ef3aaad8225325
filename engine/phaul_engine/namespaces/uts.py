"""UTS namespaces (uts_namespaces(7)): host and domain name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from phaul_engine.images.pb import utsns_pb2
from phaul_engine.objects import places
from phaul_engine.objects.base import Collection, Restoration
from phaul_engine.proc import access

from .base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind

_IMAGE = "utsns"
_HOST, _DOMAIN = Path("/proc/sys/kernel/hostname"), Path("/proc/sys/kernel/domainname")
"""They show and set the names of the caller's own namespace."""


@namespace_kind
class Uts(NamespaceKind):
    """Two names."""

    name: ClassVar = "uts"
    flag: ClassVar = 0x04000000

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        namespace = access.open_at(view.owner.proc, "ns/uts")
        try:
            host, domain = places.inside({"uts": namespace}, lambda: (_HOST.read_bytes(), _DOMAIN.read_bytes()))
        finally:
            os.close(namespace)
        entry = utsns_pb2.utsns_entry(nodename=host.removesuffix(b"\n"), domainname=domain.removesuffix(b"\n"))
        collection.checkpoint.put(_IMAGE, view.number, entry)

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        entry = restoration.checkpoint.one(_IMAGE, place.number)
        restoration.scratch.setdefault(_IMAGE, {})[place.number] = entry

        def act() -> None:
            _HOST.write_bytes(entry.nodename)
            _DOMAIN.write_bytes(entry.domainname)

        places.inside({"uts": place.descriptor}, act)

    def settle(self, place: NewNamespace, restoration: Restoration) -> None:
        if restoration.scratch[_IMAGE][place.number] != restoration.checkpoint.one(_IMAGE, place.number):
            self.rebuild(place, restoration)

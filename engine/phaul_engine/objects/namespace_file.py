"""Handles of namespaces (/proc/PID/ns/NAME, namespaces(7)): of those that the tree itself is in."""

from __future__ import annotations

import os
import re
from typing import ClassVar

from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.pb import fdinfo_pb2, ns_pb2
from phaul_engine.proc import access

from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import status_flags

_LINK = re.compile(r"(cgroup|ipc|mnt|net|pid|time|user|uts):\[\d+\]")
_FLAGS = {
    "cgroup": 0x02000000,
    "ipc": 0x08000000,
    "mnt": 0x00020000,
    "net": 0x40000000,
    "pid": 0x20000000,
    "time": 0x00000080,
    "user": 0x10000000,
    "uts": 0x04000000,
}
"""CLONE_NEW* (clone(2)), which stand for the kinds in images."""


@descriptor_kind
class NamespaceFile(DescriptorKind):
    """Opened again through a task of the tree."""

    name = "namespace handle"
    types: ClassVar = (fdinfo_pb2.NS,)

    def claims(self, descriptor: Descriptor) -> bool:
        return bool(_LINK.fullmatch(descriptor.link)) and not descriptor.info.flags & os.O_PATH

    def steady(self, descriptor: Descriptor, collection: Collection) -> bool:
        return True

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        kind = descriptor.link.partition(":")[0]
        if access.read_link(descriptor.owner.proc, f"ns/{kind}") != descriptor.link:
            collection.block(
                descriptor,
                f"a handle of a {kind} namespace ({descriptor.link})",
                "its process is not in it, and namespaces that the tree only knows of do not move",
                "let the program close it before it moves",
            )
        entry = ns_pb2.ns_file_entry(id=file_id, ns_id=0, ns_cflag=_FLAGS[kind], flags=status_flags(descriptor))
        entry.phaul_pid = descriptor.owner.inner_pid
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.NS, id=file_id, nsf=entry)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        kind = next((name for name, flag in _FLAGS.items() if flag == entry.nsf.ns_cflag), None)
        if kind is None:
            raise ImageError(f"the image names a namespace of unknown kind {entry.nsf.ns_cflag:#x}")
        tasks = restoration.tasks
        task = tasks.get(entry.nsf.phaul_pid) or next(iter(tasks.values()), None)
        if task is None:
            raise RebuildError("a namespace handle, and no task that is in the namespace")
        return access.open_at(task.proc, f"ns/{kind}")

"""Character devices without state: null, zero, full, random, urandom (mem(4), random(4))."""

from __future__ import annotations

import os
import stat
from typing import ClassVar

from phaul_engine.images.pb import fdinfo_pb2

from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import is_stateless, settle_status
from .regular_file import collect_named, open_named


@descriptor_kind
class CharDevice(DescriptorKind):
    """Opened by name like a file; the device behind the name has to be one of these there too."""

    name = "character device"
    types: ClassVar = (fdinfo_pb2.REG,)

    def claims(self, descriptor: Descriptor) -> bool:
        status = descriptor.status
        return is_stateless(status.st_mode, status.st_rdev) and not descriptor.info.flags & os.O_PATH

    def rebuilds(self, entry: fdinfo_pb2.file_entry) -> bool:
        return stat.S_ISCHR(entry.reg.mode) and not entry.reg.flags & os.O_PATH

    def steady(self, descriptor: Descriptor, collection: Collection) -> bool:
        return descriptor.status.st_nlink > 0

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        return collect_named(descriptor, file_id, collection)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        return open_named(entry, restoration, fits=lambda status: is_stateless(status.st_mode, status.st_rdev))

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        settle_status(fd, entry.reg.flags, entry.reg.fown, restoration)

    def lasting(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> bool:
        return True

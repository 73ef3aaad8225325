"""Eventfds: a counter, and whether reads take it by ones (eventfd(2))."""

from __future__ import annotations

import os
from typing import ClassVar

from phaul_engine.errors import ImageError
from phaul_engine.images.pb import eventfd_pb2, fdinfo_pb2

from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import settle_status, signal_owner, status_flags

# Bits of fdinfo's `flags` are those of open(2); the semaphore bit is ours to add, as eventfd2(2) has it.
_SEMAPHORE = os.EFD_SEMAPHORE
_MAX = 2**64 - 2


@descriptor_kind
class EventFd(DescriptorKind):
    """Built empty; the counter is added at the end, so that nobody is woken by a value that is not final."""

    name = "eventfd"
    types: ClassVar = (fdinfo_pb2.EVENTFD,)
    settled: ClassVar = ("fown", "counter")

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:[eventfd]"

    def steady(self, descriptor: Descriptor, collection: Collection) -> bool:
        return True

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        info = descriptor.info
        entry = eventfd_pb2.eventfd_file_entry(
            id=file_id,
            flags=status_flags(descriptor) | (_SEMAPHORE if _is_semaphore(descriptor) else 0),
            fown=signal_owner(descriptor, collection),
            counter=info.eventfd_count or 0,
        )
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.EVENTFD, id=file_id, efd=entry)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        if entry.efd.counter > _MAX:
            raise ImageError(f"eventfd {entry.id} has an impossible counter")
        return os.eventfd(0, entry.efd.flags & (_SEMAPHORE | os.EFD_NONBLOCK) | os.EFD_CLOEXEC)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        if entry.efd.counter > _MAX:
            raise ImageError(f"eventfd {entry.id} has an impossible counter")
        if entry.efd.counter:
            os.eventfd_write(fd, entry.efd.counter)
        settle_status(fd, entry.efd.flags, entry.efd.fown, restoration)


def _is_semaphore(descriptor: Descriptor) -> bool:
    return bool(descriptor.info.eventfd_semaphore)

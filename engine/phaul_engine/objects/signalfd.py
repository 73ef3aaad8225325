"""Signalfds: a mask; the signals themselves are pending in tasks (signalfd(2))."""

from __future__ import annotations

import os
from typing import ClassVar

from phaul_engine import calls
from phaul_engine.images.pb import fdinfo_pb2, signalfd_pb2

from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import settle_status, signal_owner, status_flags


@descriptor_kind
class SignalFd(DescriptorKind):
    """The mask can be changed later on the same description, as signalfd(2) itself does."""

    name = "signalfd"
    types: ClassVar = (fdinfo_pb2.SIGNALFD,)
    settled: ClassVar = ("fown", "sigmask")

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:[signalfd]"

    def steady(self, descriptor: Descriptor, collection: Collection) -> bool:
        return True

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        entry = signalfd_pb2.signalfd_entry(
            id=file_id,
            flags=status_flags(descriptor),
            fown=signal_owner(descriptor, collection),
            sigmask=descriptor.info.sigmask or 0,
        )
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.SIGNALFD, id=file_id, sgfd=entry)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        return calls.signalfd(-1, entry.sgfd.sigmask, entry.sgfd.flags & os.O_NONBLOCK | os.O_CLOEXEC)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        calls.signalfd(fd, entry.sgfd.sigmask, 0)
        settle_status(fd, entry.sgfd.flags, entry.sgfd.fown, restoration)

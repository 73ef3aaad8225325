"""Pid descriptors (pidfd_open(2)): of processes of the tree, or of processes that have ended and been reaped."""

from __future__ import annotations

import os
from typing import ClassVar

from phaul_engine.errors import EngineError, RebuildError
from phaul_engine.images.pb import fdinfo_pb2, pidfd_pb2

from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import settle_status, signal_owner, status_flags

_THREAD = os.O_EXCL  # PIDFD_THREAD: the descriptor is of a thread
_REAPED = -1
_MASK = 0xFFFFFFFF


@descriptor_kind
class PidFd(DescriptorKind):
    """For a reaped process a child of the engine is started, opened and reaped: as many descriptions as there are of
    it at once, so that they remain of the same process."""

    name = "pid descriptor"
    types: ClassVar = (fdinfo_pb2.PIDFD,)

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.info.pid is not None and descriptor.link == "anon_inode:[pidfd]"

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        pid = descriptor.info.pid
        if pid is None:
            raise EngineError(f"{descriptor} does not tell its process")
        inner = _REAPED if pid == _REAPED else collection.inner_pids.get(pid, 0)
        if not inner:
            collection.block(
                descriptor,
                f"a pid descriptor of process {pid}",
                "that process stays",
                "move it too, or close the descriptor",
            )
        entry = pidfd_pb2.pidfd_entry(
            id=file_id,
            ino=descriptor.status.st_ino & _MASK,
            flags=status_flags(descriptor),
            nspid=inner,
            fown=signal_owner(descriptor, collection),
        )
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.PIDFD, id=file_id, pidfd=entry)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        if entry.pidfd.nspid == _REAPED:
            return _of_reaped(entry, restoration)
        pid = restoration.pid(entry.pidfd.nspid)
        if not pid:
            raise RebuildError(f"a pid descriptor of process {entry.pidfd.nspid}, which is not there")
        return _open(pid, entry.pidfd.flags)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        settle_status(fd, entry.pidfd.flags, entry.pidfd.fown, restoration)


def _open(pid: int, flags: int) -> int:
    return os.pidfd_open(pid, flags & (os.O_NONBLOCK | _THREAD))


def _of_reaped(entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
    same = [
        other.pidfd
        for other in (record.message for record in restoration.checkpoint.records("files"))
        if other.type == fdinfo_pb2.PIDFD
        and other.pidfd.nspid == _REAPED
        and other.pidfd.ino == entry.pidfd.ino
        and other.id not in restoration.made
    ]
    gate, mine = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        os.close(mine)
        os.read(gate, 1)
        os._exit(0)
    os.close(gate)
    try:
        made = {other.id: _open(child, other.flags) for other in same}
    finally:
        os.close(mine)
        os.waitpid(child, 0)
    result = made.pop(entry.id)
    restoration.made.update(made)
    return result

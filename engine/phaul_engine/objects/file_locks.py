"""File locks: flock(2), POSIX and open file description locks (fcntl(2)), leases.

/proc/PID/fdinfo/FD shows a lock to the process and at the descriptor that it belongs to. A POSIX lock belongs to a
descriptor table and can be taken only from inside; so all of them are, by the task that stands in the image.

A lock that the source still holds cannot be taken on storage that both hosts see (EAGAIN names the descriptor): the
source gives exclusive ones up before (see lock_move.py).
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable
from typing import ClassVar

from phaul_engine.errors import ImageError
from phaul_engine.images.pb import core_pb2, file_lock_pb2
from phaul_engine.proc.locks import FileLock
from phaul_engine.program import Program
from phaul_engine.syscalls import NR

from .base import (
    Collection,
    Descriptor,
    Owner,
    Phase,
    RebuiltKind,
    Restoration,
    Scope,
    SkeletonTask,
    task_kind,
)

# What the image calls them (FL_* in the kernel's include/linux/filelock.h).
POSIX, FLOCK, LEASE, OFD = 1, 2, 32, 1024

_FLAGS = {"POSIX": POSIX, "FLOCK": FLOCK, "LEASE": LEASE, "OFDLCK": OFD}
_TYPES = {"READ": fcntl.F_RDLCK, "WRITE": fcntl.F_WRLCK, "UNLCK": fcntl.F_UNLCK}
_OPERATIONS = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}
_F_OFD_SETLK = 37
_F_SETLEASE = 1024
_flock = struct.Struct("<hhxxxxqqixxxx")


def collect(files_id: int, owner: Owner, descriptors: Iterable[tuple[int, Descriptor]], collection: Collection) -> None:
    """Put the locks that a table's descriptors (with their image ids) show into the `filelocks` image."""
    seen: set[object] = collection.scratch.setdefault("file_locks", set())
    for file_id, descriptor in descriptors:
        for lock in descriptor.info.locks:
            # A description's lock shows at all its descriptors, a table's at all descriptors of the description.
            holder = (files_id, file_id) if lock.kind == "POSIX" else file_id
            key = (lock.kind, holder, lock.start, lock.end)
            if key in seen:
                continue
            seen.add(key)
            flag = _FLAGS.get(lock.kind)
            if flag is None or (flag == LEASE and _is_breaking(descriptor)):
                _block(descriptor, lock.kind, collection)
                continue
            entry = file_lock_pb2.file_lock_entry(
                flag=flag,
                type=_TYPES[lock.access],
                pid=owner.inner_pid,
                fd=descriptor.fd,
                start=lock.start,
                len=0 if lock.end < 0 else lock.end - lock.start + 1,
            )
            collection.checkpoint.put("filelocks", None, entry)


def _is_breaking(descriptor: Descriptor) -> bool:
    return any("LEASE" in line and "BREAK" in line for line in descriptor.info.raw.splitlines())


def _block(descriptor: Descriptor, kind: str, collection: Collection) -> None:
    if kind == "LEASE":
        collection.block(
            descriptor,
            "a file under a lease that is being taken back",
            "its holder has been told to give it up and has not done so yet",
            "try again in a moment",
            passing=True,
        )
    else:
        collection.block(
            descriptor, f"a file under a lock of kind {kind}", "the kernel's own file server holds it", "unmount there"
        )


@task_kind
class FileLocks(RebuiltKind):
    """Taken at the end, by the tasks of the image. They are collected with the descriptors (`collect`)."""

    name = "file locks"
    scope: ClassVar = Scope.PROCESS

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is Phase.FINAL:
            records = restoration.checkpoint.records("filelocks")
            locks = of_task(task.inner_pid, (record.message for record in records))
            take(program, (lock for lock in locks if not lock.flag & LEASE))
            for lock in locks:
                if lock.flag & LEASE:
                    program.order(NR.setfsuid, _owner(task, lock.fd, restoration))
                    take(program, [lock])
                    program.order(NR.setfsuid, 0)


def _owner(task: SkeletonTask, number: int, restoration: Restoration) -> int:
    """The owner of an open file, as the tree numbers users: nobody else is given a lease without CAP_LEASE, which no
    user namespace gives."""
    table = restoration.checkpoint.one("ids", task.inner_pid).files_id
    for record in restoration.checkpoint.records("fdinfo", table):
        if record.message.fd == number:
            return restoration.ids.uid_inside(os.fstat(restoration.description(record.message.id)).st_uid)
    raise ImageError(f"the image gives process {task.inner_pid} a lease through fd {number}, which it does not have")


def of_task(inner_pid: int, locks: Iterable[file_lock_pb2.file_lock_entry]) -> list[file_lock_pb2.file_lock_entry]:
    """Those that this process takes."""
    return [lock for lock in locks if lock.pid == inner_pid]


def take(program: Program, locks: Iterable[file_lock_pb2.file_lock_entry]) -> None:
    """Add the calls with which a process takes its locks, none of which waits. A lock that somebody else holds on
    this host fails the program (EAGAIN)."""
    for lock in locks:
        _check(lock)
        _lock(program, lock, lock.type)


def drop(program: Program, locks: Iterable[file_lock_pb2.file_lock_entry]) -> None:
    """Add the calls with which a process drops them."""
    for lock in locks:
        _check(lock)
        _lock(program, lock, fcntl.F_UNLCK)


def kind_of(lock: FileLock) -> int:
    """What the image calls its kind, 0 if nothing."""
    return _FLAGS.get(lock.kind, 0)


def set_from_outside(fd: int, lock: file_lock_pb2.file_lock_entry, kind: int) -> None:
    """Take or drop a lock of an open file description, through our descriptor of it. OSError if it is not to be had."""
    if lock.flag & FLOCK:
        fcntl.flock(fd, _OPERATIONS[kind] | fcntl.LOCK_NB)
    else:
        fcntl.fcntl(fd, _F_OFD_SETLK, _flock.pack(kind, os.SEEK_SET, lock.start, lock.len, 0))


def _lock(program: Program, lock: file_lock_pb2.file_lock_entry, kind: int) -> None:
    label = f"lock fd {lock.fd}"
    if lock.flag & FLOCK:
        program.order(NR.flock, lock.fd, _OPERATIONS[kind] | fcntl.LOCK_NB, label=label)
    elif lock.flag & LEASE:
        program.order(NR.fcntl, lock.fd, _F_SETLEASE, kind, label=label)
    else:
        command = _F_OFD_SETLK if lock.flag & OFD else fcntl.F_SETLK
        span = program.data(_flock.pack(kind, os.SEEK_SET, lock.start, lock.len, 0))
        program.order(NR.fcntl, lock.fd, command, span, label=label)


def _check(lock: file_lock_pb2.file_lock_entry) -> None:
    if lock.flag & (POSIX | FLOCK | LEASE | OFD) not in (POSIX, FLOCK, LEASE, OFD):
        raise ImageError(f"a file lock of unknown kind {lock.flag}")
    if lock.type not in (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK) or lock.fd < 0:
        raise ImageError(f"an impossible file lock: type {lock.type} on fd {lock.fd}")
    if lock.start < 0 or lock.len < 0:
        raise ImageError(f"an impossible file lock: {lock.start} + {lock.len}")

"""What every open file description has besides its kind: status flags and an owner of signals (fcntl(2))."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from phaul_engine import calls
from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import fown_pb2

from .base import SETTABLE_FLAGS, Collection, Descriptor, Restoration

_F_SETSIG = 10
_F_GETSIG = 11
_OWNER_KINDS = 3
_MEMORY = 1  # the major number of null, zero, full, random, urandom (Documentation/admin-guide/devices.txt)
_STATELESS = {os.makedev(_MEMORY, minor) for minor in (3, 5, 7, 8, 9)}


def status_flags(descriptor: Descriptor) -> int:
    """The flags for the image: the description's, without what belongs to the descriptor."""
    return descriptor.info.flags & ~os.O_CLOEXEC


def is_stateless(mode: int, rdev: int) -> bool:
    """Whether a file (st_mode, st_rdev) is a device that is the same everywhere, and knows nothing of its users."""
    return stat.S_ISCHR(mode) and rdev in _STATELESS


def is_path(fd: int) -> bool:
    """Whether a descriptor of ours only stands for a place in the file system (O_PATH): most calls refuse it."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH)


def signal_owner(descriptor: Descriptor, collection: Collection) -> fown_pb2.fown_entry:
    """Who gets its SIGIO. A receiver outside the tree is a blocker."""
    entry = fown_pb2.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    if is_path(descriptor.own):
        return entry
    entry.signum = fcntl.fcntl(descriptor.own, _F_GETSIG)
    owner = calls.get_owner(descriptor.own)
    if owner.pid:
        inner = collection.inner_pids.get(owner.pid, 0)
        if not inner:
            collection.block(
                descriptor,
                "a descriptor that signals another program",
                f"its SIGIO goes to pid {owner.pid}, which does not move",
                "move that process too, or clear the owner (F_SETOWN 0)",
            )
            return entry
        entry.pid_type, entry.pid, entry.uid, entry.euid = (
            owner.kind,
            inner,
            *map(collection.ids.uid_inside, (owner.uid, owner.euid)),
        )
    return entry


def settle_status(fd: int, flags: int, owner: fown_pb2.fown_entry, restoration: Restoration) -> None:
    """Give a description its settable flags and its owner of signals; calls are made only where something differs."""
    if flags & os.O_PATH:
        return
    now = fcntl.fcntl(fd, fcntl.F_GETFL)
    settle_owner(fd, owner, restoration)
    if (now ^ flags) & SETTABLE_FLAGS:
        fcntl.fcntl(fd, fcntl.F_SETFL, now & ~SETTABLE_FLAGS | flags & SETTABLE_FLAGS)


def settle_owner(fd: int, owner: fown_pb2.fown_entry, restoration: Restoration) -> None:
    """Give a description its owner of signals."""
    if fcntl.fcntl(fd, _F_GETSIG) != owner.signum:
        fcntl.fcntl(fd, _F_SETSIG, owner.signum)
    if owner.pid_type >= _OWNER_KINDS:
        raise RebuildError(f"the image names a signal owner of unknown kind {owner.pid_type}")
    pid = restoration.pid(owner.pid) if owner.pid else 0
    if owner.pid and not pid:
        raise RebuildError(f"the image names pid {owner.pid} as an owner of signals, but there is no such process")
    wanted = (
        calls.SignalOwner(owner.pid_type, pid, *map(restoration.ids.uid_here, (owner.uid, owner.euid)))
        if pid
        else _NOBODY
    )
    if calls.get_owner(fd) != wanted:
        calls.set_owner(fd, wanted)


_NOBODY = calls.SignalOwner(0, 0, 0, 0)


def open_again(fd: int, flags: int) -> int:
    """A new description of the object behind one of our descriptors (through its link in /proc)."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def place(fd: int, pos: int) -> None:
    """Set a description's offset. Where there is none to set (ESPIPE) only 0 is right."""
    try:
        os.lseek(fd, pos, os.SEEK_SET)
    except OSError as error:
        if error.errno != errno.ESPIPE or pos:
            raise

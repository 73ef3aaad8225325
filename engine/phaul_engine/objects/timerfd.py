"""Timerfds: clock, time left, interval and unread expirations (timerfd_create(2)).

Time left is relative: the destination's clocks differ, or the tree lives in a time namespace. A periodic timer that
has expired unread shows no time left; `timerfd_gettime` on the duplicate sets it going again and tells the true rest.
It is armed before its expirations are set, since arming clears them.
"""

from __future__ import annotations

import os
import time
from typing import ClassVar

from phaul_engine import calls
from phaul_engine.errors import EngineError, ImageError
from phaul_engine.images.pb import fdinfo_pb2, timerfd_pb2
from phaul_engine.proc import access, fdinfo

from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import settle_status, signal_owner, status_flags

_SECOND = 1_000_000_000
_TIMES = ("ticks", "settime_flags", "vsec", "vnsec", "isec", "insec")
_CLOCKS = {
    time.CLOCK_REALTIME: time.CLOCK_REALTIME,
    time.CLOCK_MONOTONIC: time.CLOCK_MONOTONIC,
    time.CLOCK_BOOTTIME: time.CLOCK_BOOTTIME,
    8: time.CLOCK_REALTIME,  # CLOCK_REALTIME_ALARM wakes the machine, and tells the same time
    9: time.CLOCK_BOOTTIME,  # CLOCK_BOOTTIME_ALARM
}
_ABSTIME = 1
_CANCEL_ON_SET = 2
_MAX_SECONDS = 2**63 // _SECOND - 1


@descriptor_kind
class TimerFd(DescriptorKind):
    """Built disarmed; armed at the end."""

    name = "timerfd"
    types: ClassVar = (fdinfo_pb2.TIMERFD,)
    settled: ClassVar = ("fown", *_TIMES)

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link == "anon_inode:[timerfd]"

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        value, interval = calls.timerfd_gettime(descriptor.own)
        timer = _own_fdinfo(descriptor.own).timerfd
        if timer is None:
            raise EngineError(f"the kernel tells no timer of {descriptor} (CONFIG_PROC_FS fdinfo)")
        entry = timerfd_pb2.timerfd_entry(
            id=file_id,
            flags=status_flags(descriptor),
            fown=signal_owner(descriptor, collection),
            clockid=timer.clockid,
            ticks=timer.ticks,
            settime_flags=timer.settime_flags,
        )
        entry.vsec, entry.vnsec = divmod(value, _SECOND)
        entry.isec, entry.insec = divmod(interval, _SECOND)
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.TIMERFD, id=file_id, tfd=entry)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        if entry.tfd.clockid not in _CLOCKS:
            raise ImageError(f"timerfd {entry.id} has an unknown clock {entry.tfd.clockid}")
        return calls.timerfd_create(entry.tfd.clockid, entry.tfd.flags & os.O_NONBLOCK | os.O_CLOEXEC)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        timer = entry.tfd
        if timer.vnsec >= _SECOND or timer.insec >= _SECOND or max(timer.vsec, timer.isec) > _MAX_SECONDS:
            raise ImageError(f"timerfd {entry.id} has an impossible time")
        value, interval = timer.vsec * _SECOND + timer.vnsec, timer.isec * _SECOND + timer.insec
        if value or interval:
            flags = timer.settime_flags & (_ABSTIME | _CANCEL_ON_SET)
            if flags & _ABSTIME and value:  # the same clock, so that a later jump of the clock moves it as before
                value += time.clock_gettime_ns(_CLOCKS[timer.clockid])
            calls.timerfd_settime(fd, flags if flags & _ABSTIME else 0, value, interval)
        if timer.ticks:
            calls.timerfd_set_ticks(fd, timer.ticks)
        settle_status(fd, timer.flags, timer.fown, restoration)


def _own_fdinfo(fd: int) -> fdinfo.FdInfo:
    proc = access.open_process(os.getpid())
    try:
        return fdinfo.read(proc, fd)
    finally:
        os.close(proc)

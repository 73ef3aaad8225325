"""Scheduling attributes of a thread: system calls that take a thread id (sched(7), ioprio_set(2))."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

from phaul_engine.errors import EngineError, GoneError
from phaul_engine.syscalls import NR

SCHED_FLAG_RESET_ON_FORK = 1
_IOPRIO_WHO_PROCESS = 1
_ATTRIBUTES = struct.Struct("<IIQiIQQQII")  # struct sched_attr with utilisation clamps, 56 bytes
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Scheduling:
    """struct sched_attr (sched_setattr(2)); times of SCHED_DEADLINE in nanoseconds.

    For SCHED_OTHER and SCHED_BATCH `runtime` is the custom slice that Linux >= 6.12 reports, 0 before.
    """

    policy: int
    flags: int
    nice: int
    priority: int
    runtime: int
    deadline: int
    period: int
    util_min: int
    util_max: int


def read_scheduling(tid: int) -> Scheduling:
    """The scheduling attributes of a thread."""
    attributes = ctypes.create_string_buffer(_ATTRIBUTES.size)
    _call(NR.sched_getattr, tid, tid, attributes, _ATTRIBUTES.size, 0)
    return unpack_scheduling(attributes.raw)


def unpack_scheduling(attributes: bytes) -> Scheduling:
    """From a struct sched_attr of 56 bytes; a kernel that knows less leaves the rest zero."""
    _, policy, flags, nice, priority, runtime, deadline, period, low, high = _ATTRIBUTES.unpack(attributes)
    return Scheduling(policy, flags, nice, priority, runtime, deadline, period, low, high)


def pack_scheduling(scheduling: Scheduling) -> bytes:
    """As struct sched_attr for sched_setattr(2), without the clamps: 48 bytes, which every kernel takes."""
    short = 48
    packed = _ATTRIBUTES.pack(
        short,
        scheduling.policy,
        scheduling.flags,
        scheduling.nice,
        scheduling.priority,
        scheduling.runtime,
        scheduling.deadline,
        scheduling.period,
        0,
        0,
    )
    return packed[:short]


def read_affinity(tid: int) -> frozenset[int]:
    """The CPUs a thread may run on."""
    try:
        return frozenset(os.sched_getaffinity(tid))
    except ProcessLookupError as error:
        raise GoneError(f"thread {tid} is gone") from error


def read_ioprio(tid: int) -> int:
    """A thread's I/O priority: class << 13 | level; 0 when it was never set."""
    return _call(NR.ioprio_get, tid, _IOPRIO_WHO_PROCESS, tid)


def _call(nr: NR, tid: int, *args: object) -> int:
    result: int = _libc.syscall(int(nr), *args)
    if result < 0:
        code = ctypes.get_errno()
        if code == errno.ESRCH:
            raise GoneError(f"thread {tid} is gone")
        raise EngineError(f"{nr.name} of thread {tid} failed: {os.strerror(code)}")
    return result

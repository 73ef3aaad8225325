"""Sleeps that a stop interrupts, and how long they are to go on: time limits of system calls.

What a stop makes of a call with a time limit is one of three (signal(7), Linux kernel/signal.c, fs/select.c):

- The kernel keeps when it ends in the task's restart block: nanosleep, clock_nanosleep with a relative time, poll,
  futex wait. A new task has none: the call is made in it for the time left and interrupted, which leaves it the same.
- The kernel writes the time left into the program's memory and makes the call again with it: select, pselect6, ppoll.
- The call ends with EINTR, which the program must not see: epoll_wait and its like, rt_sigtimedwait, semtimedop. It is
  made again, with a time limit of what is left.

`sleep_log` tells how much is left. Where it cannot, a call begins anew, and so ends late but never early. A read or
write of a socket with SO_RCVTIMEO or SO_SNDTIMEO always does: its limit is the socket's, not the call's.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from .images.pb import core_pb2
from .proc.waiting import Waiting
from .program import Buf, Program
from .registers import ARGUMENTS, general
from .syscalls import NR

_RESTART_BLOCK = 516
_SYSCALL_SIZE = 2  # bytes of the instruction, before which the registers of images stand
_RESTART_NO_HAND = 514
_SECOND = 1_000_000_000
_TIME = struct.Struct("<qq")  # struct timespec, struct timeval
_ABSOLUTE = 1  # TIMER_ABSTIME of clock_nanosleep(2)
_WALL_CLOCKS = (0, 1, 7, 8, 9, 11)  # they go on while a thread sleeps: REALTIME, MONOTONIC, BOOTTIME, alarms, TAI
_FUTEX_FLAGS = 128 | 256  # FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME
_LONGEST = (1 << 63) - 1

_OVER: dict[int, int] = {
    NR.nanosleep: 0,
    NR.clock_nanosleep: 0,
    NR.futex: -errno.ETIMEDOUT,
}  # poll has to look once more

Place = TypeVar("Place", int, Buf)
Lend = Callable[[bytes], Place]  # puts bytes where the thread can read them, and returns the address
Read = Callable[[int, int], bytes]  # address and size, in the program's memory
Write = Callable[[int, bytes], None]


class Form(enum.IntEnum):
    """How an argument says how long; pointers with the nanoseconds of their smaller unit."""

    MILLISECONDS = 0
    TIMESPEC = 1
    TIMEVAL = 1000


class End(enum.Enum):
    """What a stop makes of the call; see above."""

    BLOCK = enum.auto()
    WRITTEN = enum.auto()
    CUT = enum.auto()


class TimeLimit(NamedTuple):
    """Which argument of a call limits its time."""

    argument: int
    form: Form
    end: End


LIMITS: dict[int, TimeLimit] = {
    NR.nanosleep: TimeLimit(0, Form.TIMESPEC, End.BLOCK),
    NR.clock_nanosleep: TimeLimit(2, Form.TIMESPEC, End.BLOCK),
    NR.poll: TimeLimit(2, Form.MILLISECONDS, End.BLOCK),
    NR.futex: TimeLimit(3, Form.TIMESPEC, End.BLOCK),
    NR.ppoll: TimeLimit(2, Form.TIMESPEC, End.WRITTEN),
    NR.pselect6: TimeLimit(4, Form.TIMESPEC, End.WRITTEN),
    NR.select: TimeLimit(4, Form.TIMEVAL, End.WRITTEN),
    NR.epoll_wait: TimeLimit(3, Form.MILLISECONDS, End.CUT),
    NR.epoll_pwait: TimeLimit(3, Form.MILLISECONDS, End.CUT),
    NR.epoll_pwait2: TimeLimit(3, Form.TIMESPEC, End.CUT),
    NR.rt_sigtimedwait: TimeLimit(2, Form.TIMESPEC, End.CUT),
    NR.semtimedop: TimeLimit(3, Form.TIMESPEC, End.CUT),
}


def time_limit(nr: int, args: Sequence[int], read: Read) -> int | None:
    """How many nanoseconds a call may sleep; None if for ever, or until a time."""
    limit = LIMITS.get(nr)
    if limit is None:
        return None
    if nr == NR.clock_nanosleep and (args[1] & _ABSOLUTE or args[0] not in _WALL_CLOCKS):
        return None
    if nr == NR.futex and args[1] & 0xFFFFFFFF & ~_FUTEX_FLAGS:  # of all its operations only FUTEX_WAIT is relative
        return None
    value = args[limit.argument]
    if limit.form is Form.MILLISECONDS:
        return None if value & 0x80000000 else (value & 0x7FFFFFFF) * 1_000_000
    return _read_time(value, limit.form, read)


def _read_time(address: int, form: Form, read: Read) -> int | None:
    try:
        content = read(address, _TIME.size) if address else b""
    except OSError:
        return None
    if len(content) != _TIME.size:
        return None
    seconds, rest = _TIME.unpack(content)
    total = seconds * _SECOND + rest * form
    return total if 0 <= total <= _LONGEST else None


def packed(nanoseconds: int, form: Form) -> bytes:
    """A time as the kernel reads it, rounded up."""
    seconds, rest = divmod(max(nanoseconds, 1), _SECOND)
    if form is Form.TIMEVAL:
        seconds, rest = divmod(-(-max(nanoseconds, 1) // form), _SECOND // form)
    return _TIME.pack(seconds, rest)


def milliseconds(nanoseconds: int) -> int:
    """For poll(2) and epoll_wait(2), rounded up."""
    return -(-max(nanoseconds, 0) // 1_000_000)


def rest_written(nr: int, args: Sequence[int], code: int, read: Read) -> int | None:
    """The nanoseconds an interrupted call has left, where the kernel has written them down itself."""
    if code == -_RESTART_BLOCK and nr == NR.nanosleep:
        return _read_time(args[1], Form.TIMESPEC, read)
    if code == -_RESTART_BLOCK and nr == NR.clock_nanosleep and not args[1] & _ABSOLUTE:
        return _read_time(args[3], Form.TIMESPEC, read)
    limit = LIMITS.get(nr)
    if code == -_RESTART_NO_HAND and limit is not None and limit.end is End.WRITTEN:
        return _read_time(args[limit.argument], limit.form, read)
    return None


# -- at the destination --------------------------------------------------------------------------------------------


def _call(core: core_pb2.core_entry) -> tuple[int, list[int]]:
    registers = core.thread_info.gpregs
    return registers.ax, [getattr(registers, name) for name in ARGUMENTS]


def waiting(core: core_pb2.core_entry) -> Waiting:
    """The call of a thread as it is seen while the thread sleeps in it."""
    nr, args = _call(core)
    registers = core.thread_info.gpregs
    return Waiting(nr, tuple(args), registers.sp, registers.ip + _SYSCALL_SIZE)


def is_to_sleep_on(core: core_pb2.core_entry) -> bool:
    """Whether a thread had a restart block that it can be given again."""
    thread = core.thread_core
    return bool(thread.interrupted == -_RESTART_BLOCK and thread.remaining_ns and core.thread_info.gpregs.ax in LIMITS)


def outcome(core: core_pb2.core_entry, passed: int) -> int | None:
    """What a sleep comes to that is over by now, so that no call has to be made for it; None for all others."""
    over = is_to_sleep_on(core) and core.thread_core.remaining_ns <= passed
    return _OVER.get(core.thread_info.gpregs.ax) if over else None


def sleep_on(core: core_pb2.core_entry, passed: int, lend: Lend[Place]) -> tuple[int, list[int | Place]] | None:
    """The call to be made in a halted thread, and interrupted, to give it the restart block of its sleep: number and
    arguments. None if it had none, or is to make its call again.

    `passed` is how many nanoseconds the tree's clock has gone on since the thread was collected.
    """
    if not is_to_sleep_on(core) or outcome(core, passed) is not None:
        return None
    nr, values = _call(core)
    args: list[int | Place] = list(values)
    limit, left = LIMITS[nr], core.thread_core.remaining_ns - passed
    if limit.form is Form.MILLISECONDS:
        args[limit.argument] = milliseconds(left)
    else:
        args[limit.argument] = lend(packed(left, limit.form))
    return nr, args


def sleep(core: core_pb2.core_entry, passed: int) -> Program:
    """The same call as a program, at the end of which a thread that has not been halted sleeps."""
    program = Program()
    call = sleep_on(core, passed, program.data)
    if call is not None:
        nr, args = call
        program.rest(NR(nr), *args)
    return program


def has_slept(result: int) -> bool:
    """Whether what that call gave means that the thread has its restart block."""
    return result == -_RESTART_BLOCK


def shorten(core: core_pb2.core_entry, passed: int, state: Any, write: Write) -> None:
    """Have a call that is made again, by registers that are filled in already, end in time."""
    thread = core.thread_core
    nr, args = _call(core)
    limit = LIMITS.get(nr)
    if limit is None or not thread.remaining_ns:
        return
    left = thread.remaining_ns - passed
    if limit.form is Form.MILLISECONDS:
        state.regs[general(ARGUMENTS[limit.argument])] = milliseconds(left)
    elif thread.interrupted != -_RESTART_BLOCK:
        write(args[limit.argument], packed(left, limit.form))


def writer(pid: int) -> Write:
    """Writes into the memory of a process."""

    def write(address: int, content: bytes) -> None:
        mem = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.pwrite(mem, content, address)
        finally:
            os.close(mem)

    return write

"""Interval timers and POSIX timers (setitimer(2), timer_create(2)).

Times are carried as what is left of them: a timer set at the destination goes on with the rest.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from typing import Any, ClassVar

from phaul_engine.errors import GoneError, RebuildError
from phaul_engine.images.pb import core_pb2, timer_pb2
from phaul_engine.proc.access import list_numbers, open_thread
from phaul_engine.proc.status import read_status
from phaul_engine.proc.timers import SIGEV_NONE, SIGEV_THREAD_ID, PosixTimer, read_timers
from phaul_engine.program import Buf, Program, Reg, Results
from phaul_engine.syscalls import NR

from .base import Collection, Phase, Restoration, Scope, SkeletonTask, TaskKind, ThreadView, task_kind

_SPEC = struct.Struct("<4q")  # interval and value: struct itimerval (us) and itimerspec (ns) alike
_OVERRUN = struct.Struct("<q")
_EVENT = struct.Struct("<Qiii44x")  # struct sigevent: value, signo, notify, thread
_CLOCK_PER_THREAD = 4  # in the negative ids of CPU clocks, which are ~pid << 3 | flags (posix-timers_types.h)

_PR_TIMER_CREATE_RESTORE_IDS = 77  # Linux 6.15
_RESTORE_IDS_OFF, _RESTORE_IDS_ON, _RESTORE_IDS_GET = 0, 1, 2
_ROOM_PER_TIMER = 1024
_MOST_ATTEMPTS = 1_000_000  # without it: a timer made and deleted costs half a microsecond


@task_kind
class IntervalTimers(TaskKind):
    """ITIMER_REAL, ITIMER_VIRTUAL and ITIMER_PROF."""

    name: ClassVar[str] = "interval timers"
    scope: ClassVar[Scope] = Scope.PROCESS

    def inquire(self, program: Program, thread: ThreadView) -> Buf:
        room = program.space(3 * _SPEC.size)
        for which in range(3):
            program.order(NR.getitimer, which, room.at(which * _SPEC.size), label=f"getitimer {which}")
        return room

    def repeats(self, asked: Any, results: Results) -> bool:
        return True

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        timers = core.tc.timers
        specs = _SPEC.iter_unpack(results.bytes(asked))
        for entry, (isec, iusec, vsec, vusec) in zip((timers.real, timers.virt, timers.prof), specs, strict=True):
            entry.isec, entry.iusec, entry.vsec = isec, iusec, vsec
            entry.vusec = vusec or _at_once(isec, iusec, vsec)

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is not Phase.FINAL or not core.tc.HasField("timers"):
            return
        timers = core.tc.timers
        for which, entry in enumerate((timers.real, timers.virt, timers.prof)):
            if entry.vsec or entry.vusec:
                spec = program.data(_SPEC.pack(entry.isec, entry.iusec, entry.vsec, entry.vusec))
                program.order(NR.setitimer, which, spec, 0, label=f"setitimer {which}")


def _at_once(seconds: int, fraction: int, value: int) -> int:
    """The smallest value for a timer that has an interval but no value, else 0.

    It has expired and its signal waits; only when that is taken does it go on. Set as it reads, it never would.
    """
    return 1 if (seconds or fraction) and not value else 0


@dataclass(frozen=True)
class _Asked:
    timers: tuple[PosixTimer, ...]
    specs: Buf
    overruns: Buf


@task_kind
class PosixTimers(TaskKind):
    """POSIX timers, under the ids they had.

    A process keeps ids, so they must be the same. Linux 6.15 takes wanted ones; before, they count up from 0 and are
    reached by making and deleting timers. The overrun that timer_getoverrun(2) tells of the last signal is in the
    image but cannot be set again: it reads 0 until the next signal is taken.
    """

    name: ClassVar[str] = "POSIX timers"
    scope: ClassVar[Scope] = Scope.PROCESS
    varies: ClassVar[bool] = True

    def inquire(self, program: Program, thread: ThreadView) -> _Asked:
        """A loop over the ids, so that many timers fit into a program."""
        found = tuple(sorted(read_timers(thread.owner.proc), key=lambda timer: timer.id))
        count = len(found)
        asked = _Asked(found, program.space(_SPEC.size * count), program.space(8 * count))
        if not found:
            return asked
        at, left, number, spec, overrun, answer = (program.register() for _ in range(6))
        program.set(at, program.data(b"".join(timer.id.to_bytes(8, "little") for timer in found)))
        program.set(spec, asked.specs)
        program.set(overrun, asked.overruns)
        program.set(left, count)
        loop = program.here()
        program.load(number, at)
        program.order(NR.timer_gettime, number, spec)
        program.call(NR.timer_getoverrun, number, into=answer, keep_errors=True)
        program.store(overrun, answer)
        for pointer, step in ((at, 8), (spec, _SPEC.size), (overrun, 8), (left, -1)):
            program.add(pointer, pointer, step)
        program.jump_if(loop, left)
        return asked

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        entries = core.tc.timers.posix
        del entries[:]
        specs = _SPEC.iter_unpack(results.bytes(asked.specs))
        overruns = _OVERRUN.iter_unpack(results.bytes(asked.overruns))
        for timer, (isec, insec, vsec, vnsec), (overrun,) in zip(asked.timers, specs, overruns, strict=True):
            entry = entries.add(
                it_id=timer.id,
                clock_id=timer.clock & 0xFFFFFFFF,
                si_signo=timer.signo,
                it_sigev_notify=timer.notify,
                sival_ptr=timer.value,
                overrun=max(0, overrun),
                isec=isec,
                insec=insec,
                vsec=vsec,
                vnsec=vnsec or _at_once(isec, insec, vsec),
            )
            if timer.notify & SIGEV_THREAD_ID:
                _name_thread(entry, timer, thread)
            if _measures_its_maker(timer.clock) and len(list_numbers(thread.owner.proc, "task")) > 1:
                collection.block(
                    f"timer {timer.id} of {thread.owner}",
                    "a POSIX timer on the CPU time of the thread that made it",
                    "Linux does not tell which of its threads that is",
                    "make it with the clock that pthread_getcpuclockid names",
                )

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        entries = core.tc.timers.posix
        if phase is not Phase.FINAL or not entries:
            return
        direct = takes_wanted_ids()
        registers = (program.register(), program.register())
        if direct:
            program.order(NR.prctl, _PR_TIMER_CREATE_RESTORE_IDS, _RESTORE_IDS_ON, 0, 0, 0)
        for entry in sorted(entries, key=lambda entry: entry.it_id):
            if program.make_room(_ROOM_PER_TIMER):
                registers = (program.register(), program.register())
            if direct:
                _create(entry, program)
            else:
                _create_by_counting(entry, program, registers, task)
            if entry.vsec or entry.vnsec:
                spec = program.data(_SPEC.pack(entry.isec, entry.insec, entry.vsec, entry.vnsec))
                program.order(NR.timer_settime, entry.it_id, 0, spec, 0, label=f"timer_settime of timer {entry.it_id}")
        if direct:
            program.order(NR.prctl, _PR_TIMER_CREATE_RESTORE_IDS, _RESTORE_IDS_OFF, 0, 0, 0)


def takes_wanted_ids() -> bool:
    """Whether this kernel makes POSIX timers with ids that are asked for (Linux >= 6.15)."""
    result: int = ctypes.CDLL(None).prctl(_PR_TIMER_CREATE_RESTORE_IDS, _RESTORE_IDS_GET, 0, 0, 0)
    return result >= 0


def _measures_its_maker(clock: int) -> bool:
    """Whether this is CLOCK_THREAD_CPUTIME_ID, which the kernel keeps as the per-thread clock of pid 0."""
    return clock < 0 and ~(clock >> 3) == 0 and bool(clock & _CLOCK_PER_THREAD)


def _name_thread(entry: timer_pb2.posix_timer_entry, timer: PosixTimer, thread: ThreadView) -> None:
    """Note the thread to be notified by its own number; one that has ended can be notified no more."""
    try:
        entry.notify_thread_id = _inner_tid(thread.owner.proc, timer.target)
    except GoneError:
        entry.it_sigev_notify = SIGEV_NONE


def _inner_tid(proc: int, tid: int) -> int:
    directory = open_thread(proc, tid)
    try:
        return read_status(directory).inner_pid
    finally:
        os.close(directory)


def _create(entry: timer_pb2.posix_timer_entry, program: Program) -> Buf:
    """Make a timer; the id that is wanted stands where the kernel leaves the id that it got."""
    clock = entry.clock_id - (1 << 32) if entry.clock_id >> 31 else entry.clock_id
    event = program.data(_EVENT.pack(entry.sival_ptr, entry.si_signo, entry.it_sigev_notify, entry.notify_thread_id))
    place = program.data(entry.it_id.to_bytes(8, "little"))
    program.order(NR.timer_create, clock, event, place, label=f"timer_create of timer {entry.it_id}")
    return place


def _create_by_counting(
    entry: timer_pb2.posix_timer_entry, program: Program, registers: tuple[Reg, Reg], task: SkeletonTask
) -> None:
    """Make timers and delete them again until one has the id that is wanted."""
    if entry.it_id > _MOST_ATTEMPTS:
        raise RebuildError(
            f"pid {task.inner_pid} has a POSIX timer with the id {entry.it_id}, which this kernel cannot give again",
            advice="a destination with Linux 6.15 or newer can",
        )
    made, enough = registers
    again = program.here()
    place = _create(entry, program)
    program.load(made, place)
    program.less(enough, entry.it_id - 1, made)
    program.jump_if(program.here() + 3, enough)
    program.order(NR.timer_delete, made, label=f"timer_delete on the way to timer {entry.it_id}")
    program.jump_if(again, 1)
    program.order(NR.timer_getoverrun, entry.it_id, label=f"timer {entry.it_id}, whose id was past")

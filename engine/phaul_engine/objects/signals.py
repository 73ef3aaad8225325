"""Signal actions, queued signals and alternate stacks (signal(7), sigaction(2), sigaltstack(2)).

The blocked mask is not here: the engine reads and writes it by ptrace, since an interpreter blocks everything.
"""

from __future__ import annotations

import functools
import signal
import struct
from collections.abc import Sequence
from typing import Any, ClassVar

from phaul_engine.images.pb import core_pb2, sa_pb2, siginfo_pb2
from phaul_engine.proc.access import read_bytes
from phaul_engine.program import Buf, Program, Reg, Results
from phaul_engine.syscalls import NR

from .base import Collection, Phase, Restoration, Scope, SkeletonTask, TaskKind, ThreadView, task_kind

# The kernel's struct sigaction on x86-64: handler, flags, restorer, mask.
_ACTION = struct.Struct("<4Q")
_ACTION_MASK_SIZE = 8
_CHANGEABLE = tuple(number for number in range(1, 65) if number not in (signal.SIGKILL, signal.SIGSTOP))

_STACK = struct.Struct("<QI4xQ")  # stack_t
_SS_ONSTACK, _SS_DISABLE = 1, 2

_SIGINFO_SIZE = 128
_SI_USER = 0


@task_kind
class SignalActions(TaskKind):
    """What a process does on each signal."""

    name: ClassVar[str] = "signal actions"
    scope: ClassVar[Scope] = Scope.PROCESS

    def inquire(self, program: Program, thread: ThreadView) -> Buf:
        room = program.space(_ACTION.size * len(_CHANGEABLE))
        for index, number in enumerate(_CHANGEABLE):
            place = room.at(_ACTION.size * index)
            program.order(NR.rt_sigaction, number, 0, place, _ACTION_MASK_SIZE, label=f"rt_sigaction of {number}")
        return room

    def repeats(self, asked: Any, results: Results) -> bool:
        return True

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        del core.tc.sigactions[:]
        core.tc.sigactions.extend(_entries(results.bytes(asked)))

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        """Early, and at the end again where one has changed since. That of SIGCHLD, which decides whether children
        that end are waited for, waits until no placeholder will."""
        if phase is Phase.CREDENTIALS:
            return
        done: dict[int, bytes] = restoration.scratch.setdefault(self.name, {}).setdefault(task.inner_pid, {})
        for number, one in zip(_CHANGEABLE, core.tc.sigactions, strict=False):
            packed = _ACTION.pack(one.sigaction, one.flags, one.restorer, one.mask)
            if done.get(number) != packed and (phase is Phase.FINAL or number != signal.SIGCHLD):
                if phase is Phase.EARLY:
                    done[number] = packed
                action = program.data(packed)
                program.order(NR.rt_sigaction, number, action, 0, _ACTION_MASK_SIZE, label=f"rt_sigaction of {number}")


@functools.lru_cache(maxsize=64)
def _entries(packed: bytes) -> tuple[sa_pb2.sa_entry, ...]:
    """The actions as image messages. Remembered: they hardly ever change between passes."""
    return tuple(
        sa_pb2.sa_entry(sigaction=handler, flags=flags, restorer=restorer, mask=mask)
        for handler, flags, restorer, mask in _ACTION.iter_unpack(packed)
    )


@task_kind
class AlternateStack(TaskKind):
    """The stack on which a thread's handlers run."""

    name: ClassVar[str] = "alternate signal stack"
    scope: ClassVar[Scope] = Scope.THREAD

    def inquire(self, program: Program, thread: ThreadView) -> Buf:
        room = program.space(_STACK.size)
        program.order(NR.sigaltstack, 0, room)
        return room

    def repeats(self, asked: Any, results: Results) -> bool:
        return True

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        address, flags, size = _STACK.unpack(results.bytes(asked))
        stack = core.thread_core.sas
        stack.ss_sp, stack.ss_size, stack.ss_flags = address, size, flags

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        """One that is disabled is so early: then most threads have nothing to do in Phase.FINAL."""
        stack = core.thread_core.sas
        due = Phase.EARLY if stack.ss_flags & _SS_DISABLE else Phase.FINAL
        if phase is not due or not core.thread_core.HasField("sas"):
            return
        flags = stack.ss_flags & ~_SS_ONSTACK  # says where the stack pointer is, and may not be set
        program.order(NR.sigaltstack, program.data(_STACK.pack(stack.ss_sp, flags, stack.ss_size)), 0)


@task_kind
class QueuedSignals(TaskKind):
    """Signals that were sent and not yet taken, with what was sent along.

    The queues themselves the engine reads by ptrace (PTRACE_PEEKSIGINFO). They are rebuilt from inside, because only
    a task itself may queue a siginfo that says it comes from the kernel, and a thread's own queue only that thread.
    The overrun count of a POSIX timer's queued signal is made up when it is taken, and starts anew.
    """

    name: ClassVar[str] = "queued signals"
    scope: ClassVar[Scope] = Scope.THREAD

    def inquire(self, program: Program, thread: ThreadView) -> Buf:
        room = program.space(8)
        program.order(NR.rt_sigpending, room, 8)
        return room

    def repeats(self, asked: Any, results: Results) -> bool:
        return not any(results.bytes(asked))

    def collect(
        self, thread: ThreadView, asked: Any, results: Results, core: core_pb2.core_entry, collection: Collection
    ) -> None:
        """Add the signals that are pending but have no queue entry: the sender's limit of those was exhausted."""
        pending = int.from_bytes(results.bytes(asked), "little")  # the thread's and the process's
        if not pending:
            return
        name = "status" if thread.leader else f"task/{thread.tid}/status"
        text = read_bytes(thread.owner.proc, name)
        _add_unqueued(core.thread_core.signals_p, _mask(text, b"SigPnd"))
        if thread.leader:
            _add_unqueued(core.tc.signals_s, _mask(text, b"ShdPnd"))

    def rebuild(
        self, core: core_pb2.core_entry, task: SkeletonTask, program: Program, phase: Phase, restoration: Restoration
    ) -> None:
        if phase is not Phase.FINAL:
            return
        shared = core.tc.signals_s.signals if core.HasField("tc") else ()
        own = core.thread_core.signals_p.signals
        _queue(program, shared, NR.rt_sigqueueinfo, (NR.getpid,))
        _queue(program, own, NR.rt_tgsigqueueinfo, (NR.getpid, NR.gettid))


def _queue(program: Program, entries: Sequence[siginfo_pb2.siginfo_entry], nr: NR, whom: tuple[NR, ...]) -> None:
    target: list[Reg] = []
    for entry in entries:
        if program.make_room(_SIGINFO_SIZE + 64 * (1 + len(whom))) or not target:
            target = [program.call(name) for name in whom]
        number, info = _number(entry), program.data(entry.siginfo)
        program.order(nr, *target, number, info, label=f"queueing signal {number}")


def _mask(status: bytes, name: bytes) -> int:
    at = status.index(b"\n" + name + b":\t") + len(name) + 3
    return int(status[at : at + 16], 16)


def _number(entry: siginfo_pb2.siginfo_entry) -> int:
    return int.from_bytes(entry.siginfo[:4], "little")


def _add_unqueued(queue: siginfo_pb2.signal_queue_entry, pending: int) -> None:
    if not pending:
        return
    for entry in queue.signals:
        pending &= ~(1 << (_number(entry) - 1))
    for number in _CHANGEABLE:
        if pending >> (number - 1) & 1:
            head = struct.pack("<iii", number, 0, _SI_USER)
            queue.signals.add(siginfo=head + bytes(_SIGINFO_SIZE - len(head)))

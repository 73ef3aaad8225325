"""The core image of a thread, but for what kinds of objects put into it: registers, sleeps, pending signals."""

from __future__ import annotations

import os

from .images.pb import core_pb2, siginfo_pb2
from .members import Member
from .objects.base import Collection, ThreadView
from .registers import collect_registers
from .sleep_log import Sleep
from .syscalls import NR
from .target import Thread, Tree

_ALIVE, _DEAD, _STOPPED = 1, 2, 3


def begin_core(thread: Thread) -> core_pb2.core_entry:
    """What registers and the log of sleeps say: no tracer is needed."""
    core = core_pb2.core_entry()
    collect_registers(thread.state, core)
    if thread.sleep is not None:
        _fill_sleep(core, thread.sleep)
    return core


def fill_core(core: core_pb2.core_entry, tree: Tree, member: Member, thread: Thread, view: ThreadView) -> None:
    """What the tracer and /proc say: pending signals, and of the leader what is its process's."""
    _fill_signals(core.thread_core.signals_p, tree.queued_signals(thread, shared=False))
    if view.leader:
        _fill_task(core.tc, member)
        core.tc.blk_sigset = thread.state.sigmask
        core.tc.task_state = _STOPPED if thread.stop_signal else _ALIVE
        if thread.stop_signal:
            core.tc.stop_signo = thread.stop_signal
        _fill_signals(core.tc.signals_s, tree.queued_signals(thread, shared=True))


def dead_core(member: Member) -> core_pb2.core_entry:
    """The core of a process that waits for its parent."""
    core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
    _fill_task(core.tc, member)
    core.tc.task_state, core.tc.exit_code = _DEAD, member.stat.exit_code
    return core


def judge_sleep(thread: Thread, view: ThreadView, collection: Collection) -> None:
    """After a stop by somebody else, which call it was can be seen while the thread sleeps in it, but not always."""
    if thread.sleep is not None and thread.sleep.nr == NR.restart_syscall:
        collection.block(
            f"thread {view.tid} of {view.owner}",
            "in a system call that was interrupted before",
            "it cannot be told which",
            "another try will do when it has ended",
            passing=True,
        )


def _fill_sleep(core: core_pb2.core_entry, sleep: Sleep) -> None:
    """What is left of an interrupted sleep; and which call it was, where the kernel had made it again."""
    registers = core.thread_info.gpregs
    if registers.orig_ax == NR.restart_syscall:
        registers.ax = registers.orig_ax = sleep.nr
    if sleep.left is not None:
        core.thread_core.remaining_ns = max(sleep.left, 1)


def _fill_task(task: core_pb2.task_core_entry, member: Member) -> None:
    task.task_state, task.exit_code, task.personality, task.flags, task.blk_sigset = _ALIVE, 0, 0, member.stat.flags, 0
    task.comm = os.fsencode(member.stat.comm)


def _fill_signals(queue: siginfo_pb2.signal_queue_entry, infos: list[bytes]) -> None:
    queue.SetInParent()
    for info in infos:
        queue.signals.add(siginfo=info)

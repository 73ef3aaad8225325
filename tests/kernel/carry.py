"""Carries task state from one process to another with the real engine: the subject of the tests of task kinds.

Both processes are forks of the test's, so addresses mean the same in both. `carry` forks a source that sets up state
and a target that does not, collects from the one, rebuilds in the other, lets both go and has both tell what they see.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import phaul_engine.objects.tasks  # registers the kinds
from phaul_engine.gadgets import find_gadgets
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import core_pb2, fs_pb2, mm_pb2
from phaul_engine.objects.base import (
    Collection,
    Owner,
    Phase,
    Restoration,
    Scope,
    SkeletonTask,
    ThreadView,
    task_kinds,
)
from phaul_engine.proc.status import read_status
from phaul_engine.program import Program
from phaul_engine.target import Process, Tracer, Tree, stop_tree

__all__ = ("Carried", "carry", "collect", "rebuild", "subject")
assert phaul_engine.objects.tasks


class Subject:
    """A forked process that has set something up and waits to be asked."""

    def __init__(self, pid: int, answers: int, questions: int) -> None:
        self.pid = pid
        self._answers = os.fdopen(answers, "rb")
        self._questions = os.fdopen(questions, "wb", buffering=0)

    def receive(self) -> Any:
        """What it tells next; its exception is raised here."""
        ok, value = pickle.load(self._answers)
        if not ok:
            raise AssertionError(f"the subject failed:\n{value}")
        return value

    def observe(self) -> Any:
        """Have it look at its own state and tell."""
        self._questions.write(b"?")
        return self.receive()

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._answers.close()
        self._questions.close()


@contextlib.contextmanager
def subject(setup: Callable[[], Any], observe: Callable[[], Any]) -> Iterator[Subject]:
    """Fork a process that calls `setup`, then `observe` whenever it is asked."""
    answers, to_us = os.pipe()
    from_us, questions = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(answers)
        os.close(questions)
        _forget_the_engine()
        with os.fdopen(to_us, "wb", buffering=0) as out:
            _serve(out, from_us, setup, observe)
        os._exit(0)
    os.close(to_us)
    os.close(from_us)
    made = Subject(pid, answers, questions)
    try:
        made.receive()
        yield made
    finally:
        made.close()


def _forget_the_engine() -> None:
    """Close what the engine keeps open in the process that tests run in: directories of /proc."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/proc/"):
                os.close(fd)


def _serve(out: Any, questions: int, setup: Callable[[], Any], observe: Callable[[], Any]) -> None:
    try:
        setup()
        out.write(pickle.dumps((True, None)))
        while os.read(questions, 1):
            out.write(pickle.dumps((True, observe())))
    except BaseException:
        out.write(pickle.dumps((False, traceback.format_exc())))


@dataclass
class Carried:
    """What was collected from a process: the cores of its threads and their tids, its leader's first."""

    collection: Collection
    tids: list[int] = field(default_factory=list)
    cores: list[core_pb2.core_entry] = field(default_factory=list)


def collect(tracer: Tracer, pid: int) -> Carried:
    """Collect all task kinds of a process."""
    carried = Carried(Collection(Checkpoint()))
    with stop_tree(tracer, pid, timeout_ms=2000) as tree:
        tree.read_states()
        process = tree.processes[pid]
        owner = Owner(pid, read_status(process.proc).inner_pid, "subject", process.proc, -1, -1)
        carried.collection.checkpoint.put("mm", owner.inner_pid, mm_pb2.mm_entry())
        views = [_view(tree, process, owner, thread) for thread in process.threads]
        programs = {view.tid: Program() for view in views}
        asked = [
            (view, kind, kind.inquire(programs[view.tid], view))
            for view in views
            for kind in task_kinds()
            if view.leader or kind.scope is Scope.THREAD
        ]
        areas = process.areas()
        with tree.interpreter(process, find_gadgets(pid, areas), areas) as interpreter:
            results = interpreter.run(programs)
        cores = {view.tid: _core(tree, process, view) for view in views}
        for view, kind, token in asked:
            kind.collect(view, token, results[view.tid], cores[view.tid], carried.collection)
        for kind in task_kinds():
            kind.finish(carried.collection)
        carried.tids, carried.cores = list(cores), list(cores.values())
    return carried


def _view(tree: Tree, process: Process, owner: Owner, thread: Any) -> ThreadView:
    filters = tuple(tree.seccomp_filters(thread)) if read_status(process.proc).seccomp == 2 else ()
    return ThreadView(owner, thread.tid, thread.tid, thread.tid == process.pid, filters)


def _core(tree: Tree, process: Process, view: ThreadView) -> core_pb2.core_entry:
    core = core_pb2.core_entry()
    thread = next(thread for thread in process.threads if thread.tid == view.tid)
    for info in tree.queued_signals(thread, shared=False):
        core.thread_core.signals_p.signals.add(siginfo=info)
    if view.leader:
        for info in tree.queued_signals(thread, shared=True):
            core.tc.signals_s.signals.add(siginfo=info)
    if thread.state.rseq_address:
        rseq = core.thread_core.rseq_entry
        rseq.rseq_abi_pointer, rseq.rseq_abi_size = thread.state.rseq_address, thread.state.rseq_size
        rseq.signature = thread.state.rseq_signature
    return core


def rebuild(tracer: Tracer, pid: int, carried: Carried, umask: int | None = None, *, rseq: bool = False) -> None:
    """Make the state of a process inside another one, which has as many threads.

    Other than a skeleton's, they have their C library's rseq areas registered already, so that is left out unless
    `rseq`; and they have numbers of their own, so the threads that timers notify are named anew.
    """
    for core in () if rseq else carried.cores:
        core.thread_core.ClearField("rseq_entry")
    checkpoint = Checkpoint()
    for record in carried.collection.checkpoint.records("seccomp"):
        checkpoint.put("seccomp", None, record.message)
    (ident,) = carried.collection.checkpoint.idents("mm")
    checkpoint.put("mm", pid, carried.collection.checkpoint.one("mm", ident))
    if umask is not None:
        checkpoint.put("fs", pid, fs_pb2.fs_entry(umask=umask))
    restoration = Restoration(checkpoint)
    with stop_tree(tracer, pid, timeout_ms=2000) as tree:
        tree.read_states()
        process = tree.processes[pid]
        for timer in carried.cores[0].tc.timers.posix:
            if timer.HasField("notify_thread_id"):
                timer.notify_thread_id = process.threads[carried.tids.index(timer.notify_thread_id)].tid
        task = SkeletonTask(pid, pid, process.proc, -1, -1)
        areas = process.areas()
        with tree.interpreter(process, find_gadgets(pid, areas), areas) as interpreter:
            for phase in Phase:
                parts = {}
                for thread, core in zip(process.threads, carried.cores, strict=True):
                    program = Program()
                    for kind in task_kinds():
                        if thread.tid == pid or kind.scope is Scope.THREAD:
                            kind.rebuild(core, task, program, phase, restoration)
                    parts[thread.tid] = program.parts
                for index in range(max(map(len, parts.values()))):
                    interpreter.run({tid: mine[index] for tid, mine in parts.items() if index < len(mine)})


def carry(
    setup: Callable[[], Any],
    observe: Callable[[], Any],
    prepare: Callable[[], Any] = lambda: None,
    change: Callable[[Carried], Any] = lambda carried: None,
) -> tuple[Any, Any, Any]:
    """What the source, the target before and the target afterwards observe. `prepare` is the target's set-up."""
    with Tracer() as tracer, subject(setup, observe) as source, subject(prepare, observe) as target:
        carried = collect(tracer, source.pid)
        assert not carried.collection.blockers
        change(carried)
        seen = source.observe()
        rebuild(tracer, target.pid, carried)
        return seen, target.observe(), carried

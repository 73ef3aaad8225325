"""A tree under construction at the destination (DESIGN 3, staged restore).

`build` makes every task of the images with its areas and descriptors while the source still runs; `update` follows
what changes there between rounds; `finish` gives all of it its final state and parks it, which is READY; `release`
lets it go. Until `release` every task is traced with EXITKILL: if we die, nothing of it is left.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

from . import features, plan, sleep_log, sleeps, vdso
from .arena import Seat
from .births import Births, Task
from .clocks import Clocks, machine_clocks, offsets
from .equipment import Equipment
from .errors import IMPOSSIBLE, EngineError, RebuildError, cannot_make
from .filling import Filling
from .gadgets import find_syscall
from .images import demands, verify
from .images.checkpoint import Checkpoint
from .images.pb import core_pb2
from .memory.extents import Extents
from .native import check, ffi, lib, new_error
from .objects import carried_file, catalogue, sysv_shm, tasks
from .objects.base import Phase, Restoration, Scope, descriptor_kinds, task_kinds
from .objects.last_words import LastWords
from .proc.maps import read_maps
from .program import Program
from .registers import rebuild_registers, signal_mask
from .shared_memory import SharedMemory
from .spaces import Spaces
from .syscalls import NR
from .target import Tracer, reap

__all__ = ["Skeleton", "catalogue"]
_STOPPED = 3  # of task_state in an image
_PATIENCE_MS = 5000
_REHEARSED, _REHEARSALS = 16, 3  # threads, and how often

_ALL_ONES = (1 << 64) - 1


class _Call(NamedTuple):
    """A system call to be made in a halted thread, `tid` in our pid namespace."""

    task: Task
    tid: int
    nr: int
    args: list[int]


_Sleeper: TypeAlias = tuple[Task, int, Seat, tuple[int, list[int]]]  # with its tid in the images, and its call


class _LastCalls(NamedTuple):
    """What is done for parked threads: sleeps to go on with, and, in the order of processes, the end of the interpreter
    (both `struct ph_call[]`)."""

    asleep: list[_Sleeper]
    sleeps: Any
    unmaps: Any


class Skeleton:
    """A tree being made from images. `cgroup` is a descriptor of the cgroup it is born into, -1 for ours."""

    def __init__(
        self,
        tracer: Tracer,
        checkpoint: Checkpoint,
        *,
        cgroup: int = -1,
        clocks: Clocks | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        verify.require(checkpoint)
        self.tracer = tracer
        self.restoration = Restoration(checkpoint, options=options or {})
        self._prepared: dict[int, tuple[bytes, Program]] = {}  # by inner tid: see _assemble
        self._placed: set[int] = set()  # who has its directories before all else
        self._root = plan.read_tree(checkpoint)
        self._foreign = bool(self.restoration.options.get("shell_job"))
        self._detached = False
        self._clocks_ahead: Clocks | None = None
        self.last_words = LastWords()
        self._parked: Any = None  # `struct ph_thread_state[]`: what threads go on with
        self._last_calls: _LastCalls | None = None
        self._cleanup = contextlib.ExitStack()
        threads = sum(len(node.threads) for node in plan.processes(self._root))
        self._births = Births(tracer, self.restoration, threads, cgroup=cgroup, clocks=clocks)
        self._cleanup.callback(self._births.close)
        self.restoration.inside = lambda pid, program: self._births.run(self._births.tasks[pid], program)
        self.shared = SharedMemory(self.restoration.namespaces)
        self._cleanup.callback(self.shared.close)
        self._spaces = Spaces(self._births, self.restoration, self.shared)
        self._equipment = Equipment(self._births, self.restoration)
        self.filling = Filling()
        self._cleanup.callback(self.filling.end)

    # -- the stages ----------------------------------------------------------------------------------------------

    def build(self, fill: Callable[[Task], None] | None = None) -> None:
        """Make all tasks, with their areas (writable, for the sink) and descriptors.

        With `fill`, which puts the pages of a task in place (or, of an heir, those that are other than its parent's),
        it is called for each before it forks, so that its children share them.
        """
        features.demand(self.restoration.checkpoint)
        ready: set[int] = set()
        for step in plan.order(self._root, foreign_session=self._foreign):
            if fill and isinstance(step, plan.Birth) and step.parent is not None:
                self._fill_before_fork(self._births.tasks[step.parent.pid], ready, fill)
            self._births.take_step(step)
        living = self._births.living
        for task in living:
            if task.node.pid not in ready:
                self._give_space(task, ready)
        self._equip([], living)
        self._furnish(living)
        if fill:
            for task in living:
                if task.node.pid not in ready:
                    fill(task)
        else:
            self.filling.begin(self._births)
        self._equipment.settle(early=True)
        self._prepare()

    def drop(self, task: Task, extents: Extents) -> None:
        """Make pages of a task absent."""
        self._spaces.drop(task, extents)

    def _fill_before_fork(self, task: Task, ready: set[int], fill: Callable[[Task], None]) -> None:
        if task.node.exit_code is None and task.node.pid not in ready:
            self._give_space(task, ready)
            fill(task)
            ready.add(task.node.pid)

    def _give_space(self, task: Task, ready: set[int]) -> None:
        """Areas, on what it has from its parent if that was ready when it was born."""
        if task.heir_of in ready:
            self._spaces.inherit(task)
        else:
            self._spaces.make(task)

    def _equip(self, new: list[Task], grown: list[Task]) -> None:
        """Give tasks that have just been born what they need, and others their new threads."""
        for task in new:
            self._spaces.make(task)
        for task in grown:
            self._descend(task)
            self._births.add_threads(task)
        self._furnish(new)

    def _descend(self, task: Task) -> None:
        """Have a task go into a user namespace below the tree's. What leads to its directories may be closed to it."""
        if self._births.namespaces.descends(task.node.pid):
            self._equipment.place(task)
            self._placed.add(task.node.pid)
            self._births.descend(task)

    def _furnish(self, new: list[Task]) -> None:
        for task in new:
            self._equipment.install(task)
            if task.node.pid in self._placed:
                self._placed.discard(task.node.pid)
            else:
                self._equipment.place(task)
        self._equipment.attach()
        self._births.run_all(
            (seat, [self._assemble(task, tid, Phase.EARLY)]) for task in new for tid, seat in task.seats.items()
        )

    def protect(self) -> None:
        """Give areas their final protection: once the first round is in. Later pages go through /proc/PID/mem."""
        self.filling.end()
        for task in self._births.living:
            self._spaces.protect(task)

    def update(self, checkpoint: Checkpoint) -> frozenset[int]:
        """Follow the source: tasks, areas and descriptors as in `checkpoint`.

        Returns the processes, by their pids in the images, whose memory is new, and empty; those that ended are no
        longer in `pids`.
        """
        before = self.restoration.checkpoint
        demands.require(checkpoint, before)
        discarded = self._equipment.replace_images(checkpoint)
        if not discarded and checkpoint.shares(before, "pstree", "ids", "mm", "fdinfo", "fs"):
            return frozenset()  # who is dead has no ids
        verify.require(checkpoint, before)
        self._births.namespaces.update()
        root = plan.read_tree(checkpoint)
        change = plan.changes(self._root, root, foreign_session=self._foreign)
        for node in change.gone:
            self._births.remove(self._births.tasks[node.pid])
        self._root = root
        for node in plan.processes(root):
            if node.pid in self._births.tasks:
                task = self._births.tasks[node.pid]
                task.node = node
                self._births.drop_threads(task)
        for step in change.steps:
            self._births.take_step(step)
        new = [task for task in self._births.living if task.node.pid in change.born]
        kept = [task for task in self._births.living if task.node.pid not in change.born]
        for task in kept:
            if task.node.pid in change.renewed:
                self._spaces.make(task)
            else:
                self._spaces.change(task)
            self._equipment.install(task)
            self._equipment.move(task, before)
        self._equip(new, self._births.living)
        return change.unfilled

    def rehearse(self) -> None:
        """Go through what `finish` will do, with no effect: what runs for the first time takes several times as long as
        later, and in the freeze all of it would."""
        some = list(itertools.islice(self._threads(), _REHEARSED))
        for task, tid, _ in self._threads():
            self._assemble(task, tid, Phase.CREDENTIALS)
        for _ in range(_REHEARSALS):
            demands.rehearse(self.restoration.checkpoint, [tid for _, tid, _ in some])
            self._equipment.settle(early=True)
            endings = {seat: self._ending(task, tid, 0, rehearsing=True) for task, tid, seat in some}
            self._prepare_states(0)
            self._native([_Call(task, seat.tid, NR.gettid, []) for task, _, seat in some])
            self._births.rehearse({seat: [first, *last] for seat, (first, last) in endings.items()})
        self._passed()

    def finish(self, checkpoint: Checkpoint) -> None:
        """The final state of everything, then park: nothing is left to do but to be let go."""
        if checkpoint is not self.restoration.checkpoint:
            self.update(checkpoint)
        self._births.namespaces.settle()
        self._births.point_children()
        self._equipment.settle()
        passed = self._passed()
        self._run_last(passed)
        self._park(passed)
        self._births.become_init(self._root.pid)
        sysv_shm.condemn(checkpoint)

    def _run_last(self, passed: int) -> None:
        """All that tasks do themselves in the end, with what is prepared meanwhile for the time after. `passed`: see
        `_passed`; what is over by then is over, also in what is prepared."""

        last: dict[Seat, list[Program]] = {}

        def endings() -> Iterator[tuple[Seat, list[Program]]]:
            for task in living:
                apart = self._is_waited_for(task)
                for tid, seat in task.seats.items():
                    begun, ending = self._ending(task, tid, passed)
                    if apart:
                        last[seat] = ending
                    yield seat, [begun] if apart else [begun, *ending]

        living = self._births.living
        for task in living:
            self._spaces.protect(task)
        self._births.run_all(endings(), lambda: self._prepare_to_park(passed))
        if not last:
            return
        for task in living:
            written = self.restoration.tasks[task.node.pid].written
            if written:
                self.last_words.withhold(task.node.pid, task.pid, written, {tid: self._core(tid) for tid in task.seats})
        self._births.run_all(last.items())

    def _is_waited_for(self, task: Task) -> bool:
        """Whether all threads of a process must be through with Phase.FINAL before the first of them goes on: the
        leader sets limits, which hinder others that queue signals, and last words are withheld before any is told."""
        queueing = any(self._core(tid).thread_core.signals_p.signals for tid in task.seats if tid != task.node.pid)
        return queueing or bool(self.restoration.tasks[task.node.pid].written)

    def _ending(self, task: Task, tid: int, passed: int, *, rehearsing: bool = False) -> tuple[Program, list[Program]]:
        """What a thread does in Phase.FINAL, and what after that."""
        program = Program()
        if tid == task.node.pid:  # what is done once for a process: every program that is waited for costs a hand-over
            table = task.table.copy() if rehearsing else task.table
            if not rehearsing or task.vdso_elsewhere is None:
                self._spaces.finish(task, program)
            table.close_service(program)
        self._assemble(task, tid, Phase.FINAL, program)
        return program, [self._assemble(task, tid, Phase.CREDENTIALS), sleeps.sleep(self._core(tid), passed)]

    def speak(self) -> None:
        """In the last moment before `detach`, if `last_words.late` says so: the cgroup must not be frozen now."""
        by_pid = {task.node.pid: task for task in self._births.living}

        def call(thread: tuple[int, int], number: NR, arguments: list[int]) -> int:
            task = by_pid[thread[0]]
            return self._calls([_Call(task, task.seats[thread[1]].tid, number, arguments)])[0]

        if self.last_words.late:
            self.last_words.speak(call)
            self._set_states()

    def detach(self) -> None:
        """Clear EXITKILL and let go of every task. They must be held by a frozen cgroup, or they run from here on."""
        self._stop_again()
        tids = self.tids() + ([self._births.init.pid] if self._births.init else [])
        err = new_error()
        check(lib.ph_release(self.tracer.handle, ffi.new("int32_t[]", tids), len(tids), err), err)
        self._detached = True

    def wake(self) -> None:
        """Let objects be heard of: after the commit, before the tasks run (sockets leave repair mode)."""
        self.last_words.give_back()
        self._births.namespaces.release()
        for kind in descriptor_kinds():
            kind.release(self.restoration)
        self._births.namespaces.let_go()

    def sync(self) -> None:
        """Bring files that came along to the disk; OSError if that fails."""
        carried_file.sync(self.restoration)

    def release(self) -> None:
        """Both, for a tree that nobody else decides about: from here on it runs, unless a frozen cgroup holds it."""
        self.wake()
        self.speak()
        self.detach()

    def close(self) -> None:
        """Close all that is ours. A tree that was not detached dies with the tracer, or now."""
        sleep_log.log.save()
        if not self._detached:
            for kind in descriptor_kinds():
                kind.discard(self.restoration)
            self._births.namespaces.discard()
            init = self._births.init
            for task in (*self._births.tasks.values(), *([init] if init else [])):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(task.pid, 9)
            if self._births.namespaces.hidden:
                with contextlib.suppress(EngineError):
                    reap(self.tracer, self.tids())
            self.shared.discard()
        self.restoration.later.close()
        carried_file.forget(self.restoration)
        for fd in self.restoration.made.values():
            os.close(fd)
        for one in self.restoration.tasks.values():
            for fd in (one.proc, one.root, one.net):
                os.close(fd)
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what others need to know ----------------------------------------------------------------------------------

    @property
    def bounds(self) -> tuple[int, int]:
        """The addresses in every task, until it is parked, that are the engine's own."""
        return self._births.bounds

    def pids(self) -> dict[int, int]:
        """Our number of each living process, by the one it has in the images."""
        return {task.node.pid: task.pid for task in self._births.living}

    @property
    def renumbered(self) -> bool:
        """Whether tasks have other numbers in a pid namespace of their own than here."""
        return self._births.init is not None or self._births.namespaces.numbered

    def tids(self) -> list[int]:
        """Our numbers of all living threads."""
        return [seat.tid for task in self._births.living for seat in task.seats.values()]

    # -- the end -------------------------------------------------------------------------------------------------

    def _core(self, inner_tid: int) -> core_pb2.core_entry:
        core: core_pb2.core_entry = self.restoration.checkpoint.one("core", inner_tid)
        return core

    def _prepare_states(self, passed: int) -> None:
        """What threads go on with, if all that sleep on do."""
        count = len(self.tids())
        if self._parked is None or len(self._parked) != count:
            self._parked = ffi.new("struct ph_thread_state[]", count)
        for state, (_, tid, seat) in zip(self._parked, self._threads(), strict=True):
            core = self._core(tid)
            result = sleeps.outcome(core, passed)
            rebuild_registers(core, state, sleeping=sleeps.is_to_sleep_on(core), result=result)
            state.tid = seat.tid

    def _assemble(self, task: Task, tid: int, phase: Phase, program: Program | None = None) -> Program:
        """The program of a phase for one thread. That of the last is kept, and used again if nothing changed."""
        core = self._core(tid)
        fingerprint = b""
        if phase is Phase.CREDENTIALS:
            fingerprint = tasks.fingerprint(core, task.node.pid, self.restoration)
            before, prepared = self._prepared.get(tid, (b"", Program()))
            if before == fingerprint:
                return prepared
        program = program or Program()
        for kind in task_kinds():
            if kind.scope is Scope.THREAD or tid == task.node.pid:
                try:
                    kind.rebuild(core, self.restoration.tasks[task.node.pid], program, phase, self.restoration)
                except IMPOSSIBLE as error:
                    raise cannot_make(f"what core-{tid}.img says of its {kind.name}", error) from error
        if phase is Phase.CREDENTIALS:
            self._prepared[tid] = fingerprint, program
        return program

    def _prepare(self) -> None:
        """Assemble the last programs early: what this host cannot give is found now, and the freeze is shorter."""
        for task, tid, _ in self._threads():
            self._assemble(task, tid, Phase.CREDENTIALS)
        self._ahead()
        vdso.local()

    def _prepare_to_park(self, passed: int) -> None:
        """All that `_park` needs, while the tasks are still busy."""
        self._prepare_states(passed)
        start, end = self._births.bounds
        asleep = self._sleeping(passed)
        self._last_calls = _LastCalls(
            asleep,
            self._native([_Call(task, seat.tid, *call) for task, _, seat, call in asleep]),
            self._native([_Call(task, task.pid, NR.munmap, [start, end - start]) for task in self._births.living]),
        )
        self._shorten(passed, {tid for _, tid, _, _ in asleep})

    def _park(self, passed: int) -> None:
        """Halt every thread, let those sleep on that slept, take the interpreter out, and put in what was there."""
        assert self._last_calls is not None
        asleep, first, last = self._last_calls
        err = new_error()
        sizes = len(self._parked), first, len(first), last, len(last)
        check(lib.ph_park(self.tracer.handle, self._parked, *sizes, _PATIENCE_MS, err), err)
        for task, call in zip(self._births.living, last, strict=True):
            if call.result != 0:
                raise RebuildError(f"cannot unmap the interpreter of process {task.node.pid}: {call.result}")
        awake = [tid for (_, tid, _, _), call in zip(asleep, first, strict=True) if not sleeps.has_slept(call.result)]
        if awake:
            self._begin_anew(passed, awake)
        for _, tid, seat, _ in asleep:
            if tid not in awake:
                core = self._core(tid)
                sleep_log.log.expect(seat.tid, sleeps.waiting(core), core.thread_core.remaining_ns - passed)

    def _passed(self) -> int:
        """How many nanoseconds the tree's clock has gone on since it was collected."""
        return max(self._since_stop().monotonic, 0)

    def behind(self) -> int:
        """How many nanoseconds the tree's clocks have to go on until they show no less than when it was collected."""
        return max(0, *(-one for one in self._since_stop()))

    def _since_stop(self) -> Clocks:
        checkpoint = self.restoration.checkpoint
        if not checkpoint.has("timens", 0):
            return Clocks(0, 0)
        saved, ahead = checkpoint.one("timens", 0), self._ahead()
        then = Clocks(*(one.tv_sec * 1_000_000_000 + one.tv_nsec for one in (saved.monotonic, saved.boottime)))
        return machine_clocks().minus(then.minus(ahead))

    def _ahead(self) -> Clocks:
        """How far the tree's clocks are ahead of the machine's: its time namespace is ours to set, and is set."""
        if self._clocks_ahead is None:
            self._clocks_ahead = offsets(self.restoration.tasks[self._root.pid].proc)
        return self._clocks_ahead

    def _threads(self) -> Iterator[tuple[Task, int, Seat]]:
        """All that live, with their tids in the images, in the order of `_parked`."""
        return ((task, tid, seat) for task in self._births.living for tid, seat in task.seats.items())

    def _sleeping(self, passed: int) -> list[_Sleeper]:
        """The threads that are to sleep for as long as they had left, and the call that each sleeps in."""
        found = []
        for task, tid, seat in self._threads():
            call = sleeps.sleep_on(self._core(tid), passed, functools.partial(self._births.lend, seat))
            if call is not None:
                found.append((task, tid, seat, call))
        return found

    def _shorten(self, passed: int, asleep: Container[int]) -> None:
        """Have the calls of all but these end in time."""
        for state, (_, tid, seat) in zip(self._parked, self._threads(), strict=True):
            if tid not in asleep:
                sleeps.shorten(self._core(tid), passed, state, sleeps.writer(seat.tid))

    def _begin_anew(self, passed: int, awake: Container[int]) -> None:
        """Have parked threads, whose sleep was over at once, make their calls again."""
        for state, (_, tid, seat) in zip(self._parked, self._threads(), strict=True):
            if tid in awake:
                core = self._core(tid)
                rebuild_registers(core, state)
                sleeps.shorten(core, passed, state, sleeps.writer(seat.tid))
        self._set_states()

    def _set_states(self) -> None:
        err = new_error()
        check(lib.ph_set_states(self.tracer.handle, self._parked, len(self._parked), err), err)

    def _native(self, wanted: Sequence[_Call]) -> Any:
        native = ffi.new("struct ph_call[]", len(wanted))
        for place, call in zip(native, wanted, strict=True):
            place.tid, place.gadget, place.nr = call.tid, self._gadget(call.task), call.nr
            place.args = [arg & _ALL_ONES for arg in (*call.args, *[0] * (6 - len(call.args)))]
        return native

    def _calls(self, wanted: Sequence[_Call]) -> list[int]:
        """System calls in halted threads, one in each; their results, or restart codes or -errno."""
        native, err = self._native(wanted), new_error()
        check(lib.ph_calls(self.tracer.handle, native, len(wanted), err), err)
        return [place.result for place in native]

    def _stop_again(self) -> None:
        """What was stopped by job control stops before it runs: the signal is the first thing it meets."""
        for task in self._births.living:
            core = self._core(task.node.pid)
            if core.tc.task_state == _STOPPED:
                number = core.tc.stop_signo or signal.SIGSTOP
                blocked = signal_mask(core) >> number - 1 & 1
                os.kill(task.pid, signal.SIGSTOP if blocked else number)

    def _gadget(self, task: Task) -> int:
        """The address of a `syscall` instruction in the task: this kernel's vDSO has one, and if that is not there the
        program's own code."""
        here = vdso.local()
        if task.vdso and here is not None and here.code.syscall >= 0:
            return task.vdso + here.code.syscall
        return find_syscall(task.pid, read_maps(self.restoration.tasks[task.node.pid].proc))

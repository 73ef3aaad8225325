"""A tree of running processes, seized: stop it, read its threads, run programs inside, let it go.

Nothing here leaves a trace: a tree that is let go runs on as if it had not been touched, and one whose tracer dies
at any instant does too (native/src/inject.c says how).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeAlias

from .arena import Arena, Seat, failed
from .errors import EngineError, GoneError, TargetError
from .gadgets import Gadgets
from .native import check, failure, ffi, lib, new_error
from .proc.access import open_at, open_process
from .proc.maps import Area, read_maps
from .program import Program, Results
from .sleep_log import Sleep, log

_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_SP = 19  # of struct user_regs_struct
_RED_ZONE = 128  # bytes below the stack pointer that a function may use (System V ABI, AMD64 supplement, 3.2.2)
_FRAME_BUT_XSTATE = 1024  # what a signal frame has besides the extended state
_SIGINFO_SIZE = 128
_SPARE = 24576  # bytes at the low end of the stack area for a signal frame
_PATIENCE_MS = 2000  # an interpreter whose engine is silent for so long goes home by itself


class Tracer:
    """The native thread that makes all ptrace calls. When it ends, what it holds with EXITKILL dies."""

    def __init__(self) -> None:
        err = new_error()
        self.handle: Any = lib.ph_tracer_new(err)
        if not self.handle:
            raise failure(err)

    def close(self) -> None:
        """End the thread."""
        handle, self.handle = self.handle, None
        if handle:
            lib.ph_tracer_free(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def reap(tracer: Tracer, tids: Sequence[int], timeout_ms: int = 5000) -> None:
    """Take notice of the end of traced tasks that were killed: process 1 of a pid namespace waits for that."""
    err = new_error()
    check(lib.ph_reap(tracer.handle, ffi.new("int32_t[]", list(tids)), len(tids), timeout_ms, err), err)


Filter: TypeAlias = tuple[bytes, int]  # an array of `struct sock_filter`, and the flags it was installed with


def seccomp_filters(tracer: Tracer, tid: int, known: Sequence[Filter] = ()) -> tuple[Filter, ...]:
    """The filters of a traced thread that stands, oldest first. None is ever taken out: if the last of those that are
    `known` is still there, and the last, all are."""
    room = ffi.new("char[]", 8 * 4096)

    def read(index: int) -> Filter | None:
        err = new_error()
        length = check(lib.ph_seccomp_filter(tracer.handle, tid, index, room, 4096, err), err)
        if length == 0:
            return None
        flags = check(lib.ph_seccomp_flags(tracer.handle, tid, index, err), err)
        return bytes(ffi.buffer(room, 8 * length)), flags

    filters = list(known) if known and read(len(known) - 1) == known[-1] else []
    while (one := read(len(filters))) is not None:
        filters.append(one)
    return tuple(filters)


class Visit(NamedTuple):
    """A process whose threads are asked: what runs in each, by tid."""

    process: Process
    gadgets: Gadgets
    areas: Sequence[Area]
    programs: Mapping[int, Program]


@dataclass
class Thread:
    """A stopped thread. `state` is its `struct ph_thread_state`, NULL until `Tree.read_states`; `sleep` is the call
    that the stop has interrupted, if it is one with a time limit."""

    pid: int
    tid: int
    zombie: bool
    stop_signal: int
    state: Any = None
    sleep: Sleep | None = None


@dataclass
class Process:
    """A stopped process; `threads[0]` is its leader. `proc` is an O_PATH descriptor of its /proc directory."""

    pid: int
    proc: int
    threads: list[Thread] = field(default_factory=list)

    @property
    def zombie(self) -> bool:
        """Whether all of it is dead and waits for its parent."""
        return all(thread.zombie for thread in self.threads)

    @property
    def driver(self) -> Thread:
        """The thread that runs programs for the whole process: the leader, or another if that one is dead."""
        return next(thread for thread in self.threads if not thread.zombie)

    def areas(self) -> list[Area]:
        """Its address space now."""
        return read_maps(self.proc)


def stop_tree(tracer: Tracer, root: int, *, timeout_ms: int, capacity: int = 4096) -> Tree:
    """Stop a process, its descendants and all their threads.

    Raises TargetError when one does not stop in time or may not be traced (all run on then), GoneError when there
    is no such process.
    """
    log.look(root)
    begun = time.monotonic()
    tree = _stop(tracer, capacity, lambda *room: lib.ph_stop_tree(tracer.handle, root, timeout_ms, *room))
    tree.begun = begun
    return tree


def stop_doomed(tracer: Tracer, pids: Sequence[int], *, timeout_ms: int, capacity: int = 4096) -> Tree:
    """Likewise processes that are to be killed. They die with the tracer: letting them go is for those that are to be
    killed in another way."""
    roots = ffi.new("int32_t[]", list(pids))
    stop = lib.ph_stop_doomed
    return _stop(tracer, capacity, lambda *room: stop(tracer.handle, roots, len(roots), timeout_ms, *room))


def _stop(tracer: Tracer, capacity: int, stop: Callable[..., int]) -> Tree:
    """The tree that `stop` finds; it gets room for tasks, its size, and an error to fill."""
    err = new_error()
    while True:
        tasks = ffi.new("struct ph_task[]", capacity)
        count = stop(tasks, capacity, err)
        if count >= 0:
            return Tree(tracer, tasks, count)
        problem = failure(err)
        if problem.errno != errno.ENOBUFS:
            raise problem
        capacity *= 4


class Tree:
    """A stopped tree. Leaving it as a context manager lets it go."""

    def __init__(self, tracer: Tracer, tasks: Any, count: int) -> None:
        self.tracer = tracer
        self.begun = time.monotonic()  # when its stop began
        self.processes: dict[int, Process] = {}
        self._states: Any = None
        self._asking: Asking | None = None  # that may not be over yet
        self._held = True
        self._cleanup = contextlib.ExitStack()
        self._cleanup.callback(self.let_go)
        try:
            for index in range(count):
                self._add(tasks[index])
        except BaseException:
            self._cleanup.close()
            raise

    def _add(self, task: Any) -> None:
        if task.pid not in self.processes:
            try:
                proc = open_process(task.pid)
            except GoneError:
                if task.state == lib.PH_TASK_ZOMBIE:  # reaped before its parent stopped
                    return
                raise
            self._cleanup.callback(os.close, proc)
            self.processes[task.pid] = Process(task.pid, proc)
        thread = Thread(task.pid, task.tid, task.state == lib.PH_TASK_ZOMBIE, task.stop_signal)
        self.processes[task.pid].threads.append(thread)

    @property
    def threads(self) -> list[Thread]:
        """All threads that are alive."""
        return [thread for process in self.processes.values() for thread in process.threads if not thread.zombie]

    def read_states(self) -> None:
        """Read registers and all that ptrace tells of every thread, taking back the EINTR that our stop caused."""
        self.over()
        threads = self.threads
        self._states = ffi.new("struct ph_thread_state[]", len(threads))
        for index, thread in enumerate(threads):
            self._states[index].tid = thread.tid
            thread.state = self._states + index
        err = new_error()
        check(lib.ph_get_states(self.tracer.handle, self._states, len(threads), err), err)
        log.settle(self)

    def step_aside(self, known: Mapping[int, Sequence[Area]] | None = None, *, timeout_ms: int = 100) -> None:
        """Let threads that are in the vDSO get out of it: elsewhere it is other code.

        `known` are areas of processes, by pid; those of others are read. TargetError if a thread stays in it.
        """
        self.over()
        tids, bounds = [], []
        for process in self.processes.values():
            areas = (known or {}).get(process.pid) or process.areas()
            for area in areas:
                if area.path == "[vdso]":
                    standing = [one.tid for one in process.threads if not one.zombie and not one.stop_signal]
                    tids += standing
                    bounds += [area.start, area.end] * len(standing)
        err = new_error()
        native = ffi.new("int32_t[]", tids), ffi.new("uint64_t[]", bounds)
        check(lib.ph_step_aside(self.tracer.handle, *native, len(tids), timeout_ms, err), err)

    def queued_signals(self, thread: Thread, *, shared: bool) -> list[bytes]:
        """The siginfo of each queued signal: the thread's own, or its process's."""
        if not thread.state.queued & (2 if shared else 1):
            return []
        self.over()
        capacity = 64
        while True:
            room = ffi.new("char[]", capacity * _SIGINFO_SIZE)
            err = new_error()
            count = check(lib.ph_peek_signals(self.tracer.handle, thread.tid, shared, room, capacity, err), err)
            if count < capacity:
                break
            capacity *= 8
        infos = bytes(ffi.buffer(room, count * _SIGINFO_SIZE))
        return [infos[at : at + _SIGINFO_SIZE] for at in range(0, len(infos), _SIGINFO_SIZE)]

    def seccomp_filters(self, thread: Thread, known: Sequence[Filter] = ()) -> tuple[Filter, ...]:
        """The filters of a thread, oldest first; `known` as above."""
        self.over()
        return seccomp_filters(self.tracer, thread.tid, known)

    def ask(self, visits: Sequence[Visit], timeout_ms: int = 5000) -> dict[int, Results]:
        """Run a program in each of these threads, whose states have been read, all at once; the answers, by tid.

        What was injected is out again, whatever happens. To go on by what was told, use `interpreter`.
        """
        with self.asking(visits, timeout_ms) as asking:
            return asking.answers()

    def asking(self, visits: Sequence[Visit], timeout_ms: int = 5000) -> Asking:
        """The same, where something else is done meanwhile: a context manager. What needs the tracer waits until all
        threads are out again, which takes a little longer than their answers."""
        self.over()
        self._asking = Asking(self, [visit for visit in visits if visit.programs], timeout_ms)
        return self._asking

    def over(self) -> None:
        """Wait until nothing is injected any more. TargetError if that fails."""
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.end()

    @contextlib.contextmanager
    def interpreter(self, process: Process, gadgets: Gadgets, areas: Sequence[Area]) -> Iterator[Interpreter]:
        """Inject an interpreter into a process whose thread states have been read; it is cured at the end."""
        self.over()
        interpreter = Interpreter(self.tracer, process, gadgets, areas)
        try:
            yield interpreter
        finally:
            interpreter.cure()

    def let_go(self) -> None:
        """Detach from every thread: the tree runs on (unless a frozen cgroup holds it)."""
        if not self._held:
            return
        self._held = False
        with contextlib.suppress(EngineError):  # some may have ended
            self.over()
        with contextlib.suppress(EngineError):
            if self._states is None:  # that takes back what the stop has made of calls
                self.read_states()
            else:
                log.shorten(self)
        tids = [thread.tid for thread in self.threads]
        err = new_error()
        check(lib.ph_detach(self.tracer.handle, ffi.new("int32_t[]", tids), len(tids), err), err)
        log.save()

    def kill(self, timeout_ms: int = 5000) -> None:
        """End it, as it stands: no thread runs again. TargetError if a task is not dead in time."""
        for pid in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap(self.tracer, [thread.tid for thread in self.threads], timeout_ms)

    def close(self) -> None:
        """Let go and close all descriptors."""
        try:
            self.let_go()
        finally:
            self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Asking:
    """Programs on their way through the threads of a tree; they are over when it is left."""

    def __init__(self, tree: Tree, visits: Sequence[Visit], timeout_ms: int) -> None:
        self._asked = [(index, tid, one) for index, visit in enumerate(visits) for tid, one in visit.programs.items()]
        self._rooms: list[Any] = []
        self._visits = ffi.new("struct ph_visit[]", len(visits))
        for place, visit in zip(self._visits, visits, strict=True):
            spare, size = _spare_stack(visit.process, visit.areas)
            gadgets = place.gadgets
            gadgets.syscall_ret, gadgets.sigreturn = visit.gadgets[:2]
            place.state, place.spare, place.spare_size = visit.process.driver.state, spare, size
            place.slots = len(visit.programs)
        self._questions = ffi.new("struct ph_question[]", len(self._asked))
        self._texts: dict[int, tuple[Any, Any, int, int]] = {}
        self._fill({thread.tid: thread.state for thread in tree.threads}, [0] * len(visits))
        self._err = new_error()
        sizes = (len(visits), self._questions, len(self._asked))
        self._native = lib.ph_visit_begin(tree.tracer.handle, self._visits, *sizes, timeout_ms, self._err)
        if not self._native:
            raise failure(self._err)

    def _fill(self, states: dict[int, Any], slots: list[int]) -> None:
        for question, (index, tid, program) in zip(self._questions, self._asked, strict=True):
            if id(program) not in self._texts:
                code, buffer = map(ffi.from_buffer, program.assemble())
                self._texts[id(program)] = code, buffer, len(program.steps), len(buffer)
            question.code, question.buffer, question.count, question.buffer_size = self._texts[id(program)]
            question.visit, question.slot, question.state = index, slots[index], states[tid]
            slots[index] += 1
            room = ffi.new("char[]", question.buffer_size)
            self._rooms.append(room)
            question.answer = room

    def answers(self) -> dict[int, Results]:
        """What the threads said, by tid, when all have. They may be on their way out still: see `end`."""
        if not lib.ph_visit_await(self._native):
            self.end()
        results = {}
        for question, room, (_, tid, program) in zip(self._questions, self._rooms, self._asked, strict=True):
            if question.error:
                raise failed(program, question, tid)
            results[tid] = Results(tuple(question.regs), bytes(ffi.buffer(room)))
        return results

    def __enter__(self) -> Self:
        return self

    def end(self) -> None:
        """Wait until all threads are where they were. TargetError if one did not answer, or did not get back."""
        native, self._native = self._native, ffi.NULL
        if native:
            check(lib.ph_visit_end(native), self._err)

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        with contextlib.suppress(EngineError) if kind else contextlib.nullcontext():
            self.end()


class Interpreter:
    """An injected interpreter: one slot for each thread of the process."""

    def __init__(self, tracer: Tracer, process: Process, gadgets: Gadgets, areas: Sequence[Area]) -> None:
        self.process = process
        self._tracer = tracer
        self._gadgets = ffi.new("struct ph_gadgets *", gadgets[:2])
        self._injection = ffi.new("struct ph_injection *")
        self._threads = [thread for thread in process.threads if not thread.zombie]
        self._entered: set[int] = set()
        spare, spare_size = _spare_stack(process, areas)
        err = new_error()
        slots = len(self._threads)
        state = process.driver.state
        args = (tracer.handle, state, self._gadgets, spare, spare_size, slots, self._injection, err)
        check(lib.ph_inject(*args), err)
        self.arena = Arena(self._injection.arena, slots)

    @property
    def bounds(self) -> tuple[int, int]:
        """The addresses in the process that are ours for now."""
        return self._injection.address, self._injection.address + self._injection.size

    def run(self, programs: Mapping[int, Program], timeout_ms: int = 5000) -> dict[int, Results]:
        """Run programs, one in each of the threads named by tid, all at once."""
        slots = {thread.tid: slot for slot, thread in enumerate(self._threads)}
        self._enter([tid for tid in programs if tid not in self._entered], slots)
        seats = {Seat(slots[tid], tid): program for tid, program in programs.items()}
        results = self.arena.run(self._tracer.handle, seats, timeout_ms)
        return {seat.tid: result for seat, result in results.items()}

    def _enter(self, tids: list[int], slots: dict[int, int]) -> None:
        if not tids:
            return
        numbers = ffi.new("int32_t[]", [slots[tid] for tid in tids])
        states = self._states(tids)
        err = new_error()
        check(lib.ph_enter(self._tracer.handle, self._injection, states, numbers, len(tids), _PATIENCE_MS, err), err)
        self._entered.update(tids)

    def _states(self, tids: list[int]) -> Any:
        by_tid = {thread.tid: thread.state for thread in self._threads}
        return ffi.new("struct ph_thread_state *[]", [by_tid[tid] for tid in tids])

    def cure(self) -> None:
        """Put every thread back where it was and take the interpreter out."""
        err = new_error()
        if self._entered:
            states = self._states(list(self._entered))
            check(lib.ph_leave(self._tracer.handle, states, len(self._entered), err), err)
        self._entered.clear()
        if self._injection.arena:
            state = self.process.driver.state
            check(lib.ph_cure(self._tracer.handle, self._injection, state, self._gadgets, err), err)


def _spare_stack(process: Process, areas: Sequence[Area]) -> tuple[int, int]:
    """Address and size of memory that holds nothing, for a signal frame.

    The low end of the main stack's area, which the kernel let the stack grow over; or, where the stack is deep, what is
    right below the stack pointer, as a signal would use it, which may make the stack grow; or the low end of another
    thread's stack.
    """
    pointers = [thread.state.regs[_SP] for thread in process.threads if not thread.zombie]
    for area in areas:
        if area.path == "[stack]":
            depths = [pointer - area.start for pointer in pointers if area.start <= pointer < area.end]
            if area.size > 2 * _SPARE and min(depths, default=area.size) >= 2 * _SPARE:
                return area.start, _SPARE
            room = process.driver.state.xstate_size + _FRAME_BUT_XSTATE
            if len(depths) == 1 and (depths[0] >= room + _RED_ZONE or _grow(process, area.start, room)):
                return area.start + depths[0] - _RED_ZONE - room, room
    for guard, area in itertools.pairwise(areas):
        below = [pointer - area.start for pointer in pointers if area.start <= pointer < area.end]
        is_stack = guard.end == area.start and not guard.prot and area.prot == _PROT_READ | _PROT_WRITE
        if is_stack and not area.is_file and not area.shared and len(below) == 1 and below[0] >= 4 * _SPARE:
            return area.start, _SPARE
    raise TargetError(
        f"process {process.pid} has no unused stack to begin an injection on",
        advice="its threads are in a deep recursion, or on stacks of their own making: try again later",
    )


def _grow(process: Process, start: int, size: int) -> bool:
    """Have the main stack grow downwards from `start`, as if it was used there. Not if that is forbidden to it: by its
    limit, or because something is near."""
    mem = open_at(process.proc, "mem", os.O_RDWR)
    try:
        return os.pwrite(mem, b"\0", start - size) == 1
    except OSError:
        return False
    finally:
        os.close(mem)

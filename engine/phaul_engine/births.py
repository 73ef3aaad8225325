"""Tasks of a skeleton come into being, run programs, and end."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from . import arena, catching, plan
from .arena import OwnArena, Seat
from .bearing import CLONE_NEWPID, CLONE_PARENT, Bearing
from .clocks import Clocks
from .errors import EngineError, GoneError, RebuildError
from .images.pb import vma_pb2
from .namespaces import lodging
from .namespaces import pid as pid_namespace
from .namespaces.newborn import Namespaces
from .native import check, ffi, lib, new_error
from .objects import address_space, seccomp, tty
from .objects.base import Restoration, SkeletonTask
from .program import Program, Results
from .syscalls import NR
from .target import Tracer, reap, seccomp_filters
from .transfer import Passage, Table

_THREAD_FLAGS = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000  # VM FS FILES SIGHAND THREAD SYSVSEM (clone(2))
_SHARING_FLAGS = {plan.FILES: 0x400, plan.DIRECTORIES: 0x200}  # CLONE_FILES, CLONE_FS
_SIGCHLD = 17
_SIG_SETMASK = 2
_SIGNAL = 0x7F  # the part of a wait status that names a signal
_WALL = 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_RLIMIT_NOFILE = 7
_SPARE_SLOTS = 256
_LOWEST, _HIGHEST = 0x100000000000, 0x7E0000000000
_PAGE = 4096
_SOCKET_AT_BIRTH = 5
_ALL_SIGNALS = b"\xff" * 8
_NEWUSER, _NEWTIME = 0x10000000, 0x80
_EXEC_PATIENCE = 5.0  # seconds


@dataclass
class Task:
    """A process of the skeleton: its threads' seats by the tids in the images, the leader's first; its areas as they
    are; and its descriptors."""

    node: plan.Node
    seats: dict[int, Seat]
    table: Table
    areas: list[vma_pb2.vma_entry] = field(default_factory=list)
    protected: bool = False  # whether its areas have their final protection
    vdso: int = 0  # where this kernel's vDSO is in it, 0 without
    heir_of: int = 0  # the pid in the images of whom its memory is a copy of, 0 if it has its own
    vdso_elsewhere: tuple[int, int] | None = None  # the bounds of that, if it is not where the program knows one

    @property
    def pid(self) -> int:
        """Its number in our pid namespace."""
        return self.seats[self.node.pid].tid


class Births:
    """The tasks of one skeleton, by their pids in the images, and all that they share: the arena and the passage."""

    def __init__(
        self, tracer: Tracer, restoration: Restoration, threads: int, *, cgroup: int = -1, clocks: Clocks | None = None
    ) -> None:
        self.tasks: dict[int, Task] = {}
        self.init: Task | None = None  # process 1 of a PID namespace of the tree's own, if it gets one
        self.tracer = tracer
        self._restoration = restoration
        self._cgroup = cgroup
        self._clocks = clocks
        self._caught = int(restoration.options.get(catching.ROOT, 0))
        self._cleanup = contextlib.ExitStack()
        self.arena = OwnArena(2 * threads + _SPARE_SLOTS)
        self._cleanup.callback(self.arena.close)
        self._free = list(range(self.arena.slots))
        self._code_size = ffi.new("size_t *")
        lib.ph_interp_code(self._code_size)
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            self._address = self._find_hole()
            failed.pop_all()
        self._passage = Passage()
        self._cleanup.callback(self._passage.close)
        self.namespaces = Namespaces(restoration)
        self._cleanup.callback(self.namespaces.close)
        self._bearing = Bearing(self)
        self._cleanup.callback(self._bearing.close)

    def close(self) -> None:
        """Close what is ours; tasks that are halted or let go need it no more."""
        self._cleanup.close()

    @property
    def living(self) -> list[Task]:
        """All that are to live."""
        return [task for task in self.tasks.values() if task.node.exit_code is None]

    @property
    def bounds(self) -> tuple[int, int]:
        """The addresses that the interpreter and its arena take in every task."""
        code = self._address + self.arena.size
        return self._address, code + (self._code_size[0] + _PAGE - 1) // _PAGE * _PAGE

    # -- programs ------------------------------------------------------------------------------------------------

    def run(self, task: Task, program: Program) -> Results:
        """Run a program in the leader of a task."""
        seat = task.seats[task.node.pid]
        return self.arena.run(self.tracer.handle, {seat: program})[seat]

    def run_all(
        self, programs: Iterable[tuple[Seat, Sequence[Program]]], meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Run programs in threads, all at once, those of a thread one after the other: as many as fit into a slot
        without anybody looking. Each thread begins as soon as what it runs is known. `meanwhile` is done when all have
        begun. None may bear."""
        left: dict[Seat, list[list[Program]]] = {}
        for seat, mine in programs:
            loads = arena.loads(part for one in mine for part in one.parts)
            if loads:
                self.arena.begin(seat, loads[0])
                left[seat] = loads[1:]
        if meanwhile is not None:
            meanwhile()
        if not self.arena.wait_without(left.keys()):
            self.arena.wait(self.tracer.handle, left.keys())
        while left := {seat: loads for seat, loads in left.items() if loads}:
            self.arena.order(self.tracer.handle, {seat: loads.pop(0) for seat, loads in left.items()})

    def rehearse(self, programs: Mapping[Seat, Sequence[Program]]) -> None:
        """Put programs where they will run, and run others there that do nothing."""
        for seat, mine in programs.items():
            for load in arena.loads(part for one in mine for part in one.parts):
                self.arena.load(seat.slot, load)
        self.run_all((seat, [_idle(), _idle()]) for seat in programs)

    def lend(self, seat: Seat, content: bytes) -> int:
        """Put bytes into the slot of a thread that interprets no more; returns their address in the task."""
        return self._address + self.arena.lend(seat.slot, content)

    # -- beginnings and ends -------------------------------------------------------------------------------------

    def take_step(self, step: plan.Step) -> None:
        """Do one step of the plan."""
        match step:
            case plan.Birth(None, child):
                self._bear_root(child)
            case plan.Birth(parent, child):
                assert parent is not None
                self._fork(self.tasks[parent.pid], child)
            case plan.NewSession(node):
                self._begin_session(self.tasks[node.pid])
            case plan.JoinGroup(node, parent):
                self._join_group(node, parent)
            case plan.Adoption(node):
                program = Program()
                program.order(NR.prctl, _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
                self.run(self.tasks[node.pid], program)
            case plan.Death(node, parent):
                self._die(self.tasks[node.pid], self.tasks[parent.pid] if parent else self.init)

    def _join_group(self, node: plan.Node, parent: plan.Node | None) -> None:
        who = parent or node
        numbers = node.name(node.pid).seen(who.space) if parent else 0, node.name(node.pgid).seen(who.space)
        program = Program()
        program.order(NR.setpgid, *numbers, label=f"join process group {node.pgid}")
        self.run(self.tasks[who.pid], program)

    def _begin_session(self, task: Task) -> None:
        program = Program()
        if os.getsid(task.pid) != task.pid:  # one that was caught may have its own
            program.order(NR.setsid)
        tty.adopt(task.node.pid, program, self._restoration)
        self.run(task, program)

    def add_threads(self, task: Task) -> None:
        """Start the threads that a task has not yet."""
        for tid in task.node.threads:
            if tid not in task.seats:
                task.seats[tid] = self._bearing.bear(task, task.node.name(tid), flags=_THREAD_FLAGS, exit_signal=0)

    def drop_threads(self, task: Task) -> None:
        """End the threads that a task is not to have any more."""
        for tid in [tid for tid in task.seats if tid not in task.node.threads]:
            self._end_thread(task, tid)

    def remove(self, task: Task) -> None:
        """End a task and free its number. Its children have been removed before."""
        parent = self.tasks.get(task.node.ppid) or self.init
        if task.node.exit_code is None:
            for tid in [tid for tid in task.seats if tid != task.node.pid]:
                self._end_thread(task, tid)
            err = new_error()
            check(lib.ph_end(self.tracer.handle, task.pid, signal.SIGKILL, err), err)
            self._free.append(task.seats[task.node.pid].slot)
            self._restoration.forget_task(task.node.pid)
        if parent is not None:
            self._mourn(task, parent, reap=True)
        del self.tasks[task.node.pid]

    def _end_thread(self, task: Task, tid: int) -> None:
        seat = task.seats.pop(tid)
        program = Program()
        program.order(NR.exit, 0)
        with contextlib.suppress(GoneError):
            self.arena.run(self.tracer.handle, {seat: program})
        self._free.append(seat.slot)

    def _find_hole(self) -> int:
        """An address that no process of the tree uses, nor is likely to: the middle of the widest common gap."""
        size = self.arena.size + self._code_size[0]
        checkpoint = self._restoration.checkpoint
        taken = sorted(
            (vma.start, vma.end) for ident in checkpoint.idents("mm") for vma in checkpoint.one("mm", ident).vmas
        )
        best, at = (0, 0), _LOWEST
        for start, end in (*taken, (_HIGHEST, _HIGHEST)):
            room = min(start, _HIGHEST) - at  # the first area above the limit ends the gap too
            if room > best[0]:
                best = (room, at)
            at = max(at, end)
        if best[0] < 4 * size:
            raise RebuildError("the programs leave no room in their address space for the interpreter")
        return (best[1] + best[0] // 2) & ~0x1FFFFF

    def take_slot(self) -> int:
        """A slot of the arena that nobody has, ready for a birth."""
        if not self._free:
            raise RebuildError("the tree grew beyond what was made ready for it")
        slot = self._free.pop(0)
        self.arena.prepare(slot, self._address)
        return slot

    def give_slot(self, slot: int) -> None:
        """Nobody has it any more."""
        self._free.append(slot)

    def view(self, task: Task) -> SkeletonTask:
        """A task as others see it."""
        return self._restoration.tasks[task.node.pid]

    def _bear_root(self, node: plan.Node) -> None:
        if self._caught:
            if node.placeholder:
                raise RebuildError("the container's first process leads no session, which its runtime gives it here")
            with contextlib.ExitStack() as failed:
                failed.callback(self._end_caught)
                self.tasks[node.pid] = task = self._spawn(node)
                failed.pop_all()
            self._introduce(task)
            self.namespaces.settle_caught(self._restoration.tasks[node.pid], lambda program: self.run(task, program))
            return
        flags = 0 if node.placeholder else self.namespaces.flags(node.pid)
        apart = "pid" in self.namespaces.of_task(self.namespaces.root)
        if apart or not self._restoration.options.get("pidns"):
            self.tasks[node.pid] = task = self._spawn(node, flags)
            if not node.placeholder:
                self._introduce(task)
                if lodging.enter(task.table, lambda program: self.run(task, program), self._restoration):
                    self.namespaces.lodge(self._restoration.tasks[node.pid])
                view = self._restoration.tasks[node.pid]
                self.namespaces.settle_root(view, task.table, lambda program: self.run(task, program))
            return
        if self.init is None:
            self.init = self._spawn(plan.Node(1, 0, 1, 1, (1,)), pid_namespace.CLONE_FLAGS)
            program = Program()
            pid_namespace.settle(program)
            self.run(self.init, program)
            self.namespaces.share(self.init.pid)
        self._fork(self.init, node)

    def become_init(self, first: int) -> None:
        """Have process 1 of the tree's own PID namespace execute the init, and stop at its beginning. No task can be
        born by it any more."""
        init = self.init
        if init is None:
            return
        seat, fd = init.seats[1], pid_namespace.image()
        try:
            number = init.table.receive(lambda program: self.run(init, program), [fd])[0]
        finally:
            os.close(fd)
        program = Program()
        pid_namespace.execute(program, number, first)
        self.arena.begin(seat, [program])
        deadline = time.monotonic() + _EXEC_PATIENCE
        while not pid_namespace.is_init(seat.tid):
            self.arena.check(seat)
            if time.monotonic() > deadline:
                raise RebuildError("the init of the PID namespace did not start")
            time.sleep(0.0001)
        err = new_error()
        check(lib.ph_halt(self.tracer.handle, seat.tid, 5000, err), err)

    def _spawn(self, node: plan.Node, namespaces: int = 0) -> Task:
        """A task that is a child of ours, or was caught (`catching`)."""
        slot = self.take_slot()
        birth = ffi.new("struct ph_birth *")
        birth.set_tid[0], birth.set_tid_count = node.pid, 1
        birth.namespaces = namespaces
        ids = self.namespaces.ids(node.pid) if namespaces & _NEWUSER else None
        keep = [ffi.new("char[]", text) for text in (ids.uid_map, ids.gid_map)] if ids else []
        if ids:
            (birth.uid_map, birth.gid_map), birth.deny_setgroups = keep, ids.deny_groups
        birth.cgroup, birth.arena, birth.slot = self._cgroup, self.arena.fd, slot
        birth.socket = self._passage.theirs.fileno()
        birth.arena_address, birth.arena_size = self._address, self.arena.size
        birth.code_address = self._address + self.arena.size
        if self._clocks is not None:
            birth.timens = 1
            birth.monotonic_sec, birth.monotonic_nsec = divmod(self._clocks.monotonic, 1_000_000_000)
            birth.boottime_sec, birth.boottime_nsec = divmod(self._clocks.boottime, 1_000_000_000)
        err = new_error()
        if self._caught:
            self._take_in(self._caught)
            self._restoration.scratch[seccomp.BASE] = seccomp_filters(self.tracer, self._caught)
            pid = check(lib.ph_adopt(self.tracer.handle, self._caught, birth, err), err)
        else:
            pid = check(lib.ph_spawn(self.tracer.handle, birth, err), err)
        os.close(birth.pidfd)
        task = Task(node, {node.pid: Seat(slot, pid)}, Table(self._passage, _SOCKET_AT_BIRTH))
        program = Program()
        program.order(NR.rt_sigprocmask, _SIG_SETMASK, program.data(_ALL_SIGNALS), 0, 8)
        program.order(NR.prctl, _PR_SET_PDEATHSIG, 0, 0, 0, 0)  # it guarded the time before the task was traced
        _raise_file_limit(program)
        address_space.unmap_all_but(program, [self.bounds])
        task.table.move_service(program, max(self._highest_descriptor() + 1, 64))
        self.run(task, program)
        if self._caught and self._clocks is not None:
            self._enter_time(task)
        return task

    def _enter_time(self, task: Task) -> None:
        """Before Linux 6.3 a process that has made a time namespace is not in it when it executes another program."""
        own, made = (f"/proc/{task.pid}/ns/{name}" for name in ("time", "time_for_children"))
        if os.path.samefile(own, made):
            return
        fd = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
        try:
            (theirs,) = task.table.receive(lambda program: self.run(task, program), [fd])
        finally:
            os.close(fd)
        program = Program()
        program.order(NR.setns, theirs, _NEWTIME, label="enter a time namespace")
        task.table.close(program, [theirs])
        self.run(task, program)

    def _end_caught(self) -> None:
        """It cannot become a task: its runtime learns of its end only when its tracer has taken notice of it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._caught, signal.SIGKILL)
        with contextlib.suppress(EngineError):
            reap(self.tracer, [self._caught])

    def _take_in(self, pid: int) -> None:
        """Put a process that was caught into the cgroup that all others are born into."""
        if self._cgroup >= 0:
            procs = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._cgroup)
            try:
                os.write(procs, str(pid).encode())
            finally:
                os.close(procs)

    def _highest_descriptor(self) -> int:
        checkpoint = self._restoration.checkpoint
        tables = (checkpoint.records("fdinfo", ident) for ident in checkpoint.idents("fdinfo"))
        return max((record.message.fd for table in tables for record in table), default=2)

    def _introduce(self, task: Task) -> None:
        proc = os.open(f"/proc/{task.pid}", os.O_PATH | os.O_DIRECTORY)
        root = os.open("root", os.O_PATH | os.O_DIRECTORY, dir_fd=proc)
        net = os.open("ns/net", os.O_RDONLY, dir_fd=proc)
        self._restoration.tasks[task.node.pid] = SkeletonTask(task.pid, task.node.pid, proc, root, net)

    def _fork(self, parent: Task, node: plan.Node) -> None:
        same = [kind for kind in plan.SHAREABLE if node.tables[kind] and node.tables[kind] == parent.node.tables[kind]]
        flags = sum(_SHARING_FLAGS[kind] for kind in same)
        user = self.namespaces.user_of_birth(parent.node.pid, node.name(node.pid).way)
        if user:
            self._bear_lower(parent, node, user, flags & ~_SHARING_FLAGS[plan.DIRECTORIES])
            return
        seat = self._bearing.bear(parent, node.name(node.pid), flags=flags, exit_signal=_SIGCHLD)
        task = self._settle_in(parent, node, seat, shares_files=plan.FILES in same)
        if node.exit_code is not None:
            self.namespaces.inherit(node.pid, parent.node.pid)
            return
        self._introduce(task)
        view = self._restoration.tasks[node.pid]
        self.namespaces.enter(view, parent.node.pid, task.table, lambda program: self.run(task, program))

    def _settle_in(self, parent: Task, node: plan.Node, seat: Seat, *, shares_files: bool) -> Task:
        table = parent.table if shares_files else parent.table.copy()
        task = Task(node, {node.pid: seat}, table, list(parent.areas))
        task.vdso, task.vdso_elsewhere = parent.vdso, parent.vdso_elsewhere
        task.heir_of = parent.node.pid
        self.tasks[node.pid] = task
        return task

    def _bear_lower(self, parent: Task, node: plan.Node, user: int, flags: int) -> None:
        """Process 1 of a pid namespace that belongs to a user namespace which its parent is above. It has to be born in
        there; so a task does it that goes there first, to whatever else is the child's, and then ends."""
        numbering, here = self._restoration.numbering, not self.init and not self.namespaces.numbered
        way = parent.node.name(parent.node.pid).way
        name = numbering.unused(way, lambda number: here and os.path.exists(f"/proc/{number}"))
        number, names = name.numbers[0], {name.numbers[0]: name}
        maker = plan.Node(
            *(number, parent.node.pid, parent.node.pgid, parent.node.sid, (number,), 0, True), names=names
        )
        seat = self._bearing.bear(parent, name, flags=flags, exit_signal=_SIGCHLD)
        task = self._settle_in(parent, maker, seat, shares_files=bool(flags))

        def run(program: Program) -> Results:
            return self.run(task, program)

        new = self.namespaces.go(node.pid, parent.node.pid, task.table, run)
        self.namespaces.go_lower(task.pid, number, node.pid, user, task.table, run)
        flags |= CLONE_PARENT
        seat = self._bearing.bear(task, node.name(node.pid), flags=flags, exit_signal=0, beside=parent)
        self._die(task, parent)
        born = self._settle_in(parent, node, seat, shares_files=bool(flags & ~CLONE_PARENT))
        self._introduce(born)
        self.namespaces.arrive(self._restoration.tasks[node.pid], new, user)

    def point_children(self) -> None:
        """Where the children of tasks will be born, if that is another pid namespace than their own: when we bear none
        any more."""
        self._bearing.close()
        for record in self._restoration.checkpoint.records("pstree"):
            entry, task = record.message, self.tasks.get(record.message.pid)
            if task is None or not entry.HasField("phaul_children_pid_ns"):
                continue
            if entry.phaul_children_pid_ns:
                self._bearing.go(task, self.namespaces.numbers_of(entry.phaul_children_pid_ns))
            else:
                program = Program()
                program.order(NR.unshare, CLONE_NEWPID, label="have children in a new pid namespace")
                self.run(task, program)

    def descend(self, task: Task) -> None:
        """Have a task go into a user namespace below the tree's, if it is to be there: before it has threads."""
        view = self._restoration.tasks[task.node.pid]
        self.namespaces.descend(view, task.table, lambda program: self.run(task, program))

    def _die(self, task: Task, parent: Task | None) -> None:
        """End a task as its image says; its number stays taken until the parent reaps it."""
        code = task.node.exit_code or 0
        program = Program()
        if code & _SIGNAL:
            program.order(NR.prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0)  # no core dump here: there was one, or none, before
            self.run(task, program)
            err = new_error()
            check(lib.ph_end(self.tracer.handle, task.pid, code & _SIGNAL, err), err)
        else:
            program.order(NR.exit_group, code >> 8 & 0xFF)
            with contextlib.suppress(GoneError):
                self.run(task, program)
        self._free.extend(seat.slot for seat in task.seats.values())
        task.seats = {task.node.pid: task.seats[task.node.pid]}
        if parent is not None:
            self._mourn(task, parent, reap=task.node.placeholder)
        if task.node.placeholder:
            del self.tasks[task.node.pid]

    def _mourn(self, task: Task, parent: Task, *, reap: bool) -> None:
        """Nothing is pending of a death of ours: the parent was told of any, or not, long ago at the source."""
        self.reap(task.node.name(task.node.pid).seen(parent.node.space) if reap else 0, parent)

    def reap(self, pid: int, parent: Task) -> None:
        """Have a parent take notice of a death, and reap what it calls `pid`, if that is not 0."""
        program = Program()
        if pid:
            program.order(NR.wait4, pid, 0, _WALL, 0, label=f"reap task {pid}")
        mask, now = program.data(struct.pack("<Q", 1 << _SIGCHLD - 1)), program.space(16)
        program.order(NR.rt_sigtimedwait, mask, 0, now, 8, keep_errors=True)
        self.run(parent, program)


def _idle() -> Program:
    program = Program()
    program.order(NR.gettid)
    return program


def _raise_file_limit(program: Program) -> None:
    """So that any number can be used; the task's own limit comes last."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = program.data(struct.pack("<QQ", hard & (1 << 64) - 1, hard & (1 << 64) - 1))
    program.order(NR.prlimit64, 0, _RLIMIT_NOFILE, limit, 0, label="raise the limit of descriptors")

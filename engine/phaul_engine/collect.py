"""One pass over a stopped tree: everything but the contents of memory becomes images.

A `Collector` lives as long as a migration or dump: what does not change from pass to pass (where an injection begins,
which descriptor was which) it keeps, so that the pass in the freeze costs little.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, TypeAlias

from . import calls, gadgets, lineup, lock_move, sharing, vdso
from .clocks import Clocks, tree_clocks
from .cores import begin_core, dead_core, fill_core, judge_sleep
from .errors import BusyError, EngineError
from .gadgets import Gadgets, find_gadgets, search_gadgets
from .images.checkpoint import Checkpoint
from .images.pb import core_pb2, inventory_pb2, timens_pb2, vma_pb2
from .inquiry import Inquiry, inquire, standing
from .lock_move import Surrender
from .members import Member, Seen, name_threads, opened, read_name
from .memory import guards
from .namespaces import census, lodging
from .namespaces.mnt import source as mounts
from .namespaces.net import kind as net
from .objects import address_space, catalogue, network_files, sysv_shm
from .objects.base import Collection, Owner, TaskKind, ThreadView, descriptor_kinds, task_kinds
from .objects.files import FilesPass, OpenFiles, Table
from .proc.access import open_at, open_process, read_bytes, read_link
from .proc.maps import Area, parse_maps, read_maps, read_smaps
from .proc.status import Statuses
from .proc.tree import read_tree
from .program import Program, Reg, Results
from .survey import judge_threads, judge_tree
from .syscalls import NR
from .target import Asking, Filter, Process, Thread, Tree, Visit

__all__ = ["Collector", "Member", "catalogue"]

_IMAGE_VERSION = 2
_OURS = 0x7FFFFFFF  # the number of whatever the engine has itself: no process gets to it
# With UFFD_USER_MODE_ONLY (1; userfaultfd(2), Linux 5.11) no privilege is needed. What it gives up, faults handled in
# the kernel's own accesses, is not missed: with WP_ASYNC no fault is handed to anybody.
_UFFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | 1
_FILTERED = 2  # what it answers
_SECOND = 1_000_000_000


Seal: TypeAlias = Callable[[Collection], None]


def _nothing() -> None:
    """No hold: the tree stands by ptrace alone."""


def _no_seal(_: Collection) -> None:
    """Nobody has to know."""


class _Told(NamedTuple):
    """What a thread answered at the last pass, what kinds that repeat themselves have made of it (a part of a core),
    the others, each with its token, and its seccomp filters."""

    inquiry: Inquiry
    answers: bytes
    part: bytes
    others: tuple[tuple[TaskKind, Any], ...]
    filters: tuple[Filter, ...]


@dataclass
class _Mapped:
    """What the last look at the areas of a process has made of them. `text` is that of /proc/PID/maps which is known
    to say the same."""

    areas: list[Area]
    entries: list[vma_pb2.vma_entry]
    text: bytes = b""

    @functools.cached_property
    def file_ids(self) -> set[int]:
        """The files that are mapped."""
        file = int(address_space.Status.FILE_PRIVATE | address_space.Status.FILE_SHARED)
        return {entry.shmid for entry in self.entries if entry.status & file}


@dataclass
class _Known:
    """A process as it was at the last pass. `mem` is its address space of then (/proc/PID/mem); `number` and `memory`
    are what process and address space are called in the images."""

    start: int
    mem: int
    number: int
    memory: int

    @property
    def executed(self) -> bool:
        """Whether it has called execve(2) since: an address space without users has nothing to read."""
        try:
            return os.pread(self.mem, 1, 0) == b""
        except OSError:
            return False


class _Pass(NamedTuple):
    """A pass whose threads are being asked. `stack` ends it; `passing`, which is in it, what the kinds need open."""

    tree: Tree
    collection: Collection
    now: Clocks
    members: list[Member]
    living: list[Member]
    files: FilesPass
    asking: Asking
    stack: contextlib.ExitStack
    passing: contextlib.ExitStack


class Collector:
    """Collects a tree, any number of times. `uffds` are userfaultfds made inside the processes, by pid;
    `guards` is told what scans see between passes."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.options = options or {}
        self.uffds: dict[int, int] = {}
        self._files = OpenFiles()
        self._statuses = Statuses()
        self._tables, self._directories = sharing.Sharing(calls.KCMP_FILES), sharing.Sharing(calls.KCMP_FS)
        self._memory: dict[str, Any] = {}
        self._lent = bool(self.options.get(lodging.LENT))
        self._census = census.Census(lent=self._lent)
        self._gadgets: dict[int, Gadgets] = {}
        self._mapped: dict[int, _Mapped] = {}
        self._seen: dict[int, tuple[list[Area], Gadgets | None]] = {}  # by `prepare`, for the pass that follows
        self._known: dict[int, _Known] = {}
        self._told: dict[int, _Told] = {}
        self._names: dict[int, int] = {}  # of threads in their own pid namespace, by tid
        self.guards = guards.Log()
        self._last_number = 0
        self._pass: _Pass | None = None

    def close(self) -> None:
        """Close what is kept between passes."""
        self.drop()
        for pid in list(self._known):
            self._forget(pid)
        for kind in task_kinds():
            kind.close()
        self._files.close()
        self._census.close()
        net.close(self._memory)
        mounts.close(self._memory)

    def memories(self) -> dict[int, int]:
        """The living processes of the last pass, with the number of the address space of each: it changes when a
        program executes another one, or the pid becomes another process's."""
        return {pid: known.memory for pid, known in self._known.items()}

    def areas(self, pid: int) -> list[Area]:
        """The areas of a living process as the last pass has described them."""
        return self._mapped[pid].areas

    def network_files(self) -> Iterable[int]:
        """Descriptors of the files on network storage that the tree of the last pass writes."""
        return network_files.kept(self._memory)

    def _forget(self, pid: int) -> None:
        mem = self._known.pop(pid).mem
        found = self._gadgets.pop(pid, None)
        if found is not None:
            gadgets.remove(mem, found)
        os.close(mem)
        self._mapped.pop(pid, None)
        self.guards.forget(pid)
        uffd = self.uffds.pop(pid, None)
        if uffd is not None:
            os.close(uffd)

    def _recognize(self, members: list[Member]) -> None:
        """Give processes the numbers that they had, and forget what is gone."""
        living = {member.pid: member for member in members if not member.process.zombie}
        for pid in self._known.keys() - living.keys():
            self._forget(pid)
        for pid, member in living.items():
            known = self._known.get(pid)
            number = known.number if known is not None and known.start == member.stat.start else 0
            if known is not None and (not number or known.executed):
                self._forget(pid)
            if pid not in self._known:
                mem = open_at(member.process.proc, "mem")
                self._last_number += 1
                self._known[pid] = _Known(member.stat.start, mem, number or self._last_number, self._last_number)
            member.number, member.memory = self._known[pid].number, self._known[pid].memory
        numbers = {pid: member.number for pid, member in living.items()}
        files, fs = self._tables.numbers(numbers), self._directories.numbers(numbers)
        for pid, member in living.items():
            member.files, member.fs = files[pid], fs[pid]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def begin(self, tree: Tree, *, survey: bool, same: Mapping[int, Seen] | None = None) -> None:
        """The first part of a pass. Threads are being asked when it returns: what needs no tracer may be done before
        `collect`, which goes on from here; `drop` if it is not to. With `same`, tasks and areas are known to be as at
        the last pass, and threads are asked before all else; this is what was read of processes before, by pid: later
        their areas show what is injected too."""
        self.drop()
        with contextlib.ExitStack() as stack:
            collection = Collection(Checkpoint(), survey=survey, options=self.options, memory=self._memory)
            now = tree_clocks(next(iter(tree.processes.values())).proc)  # what sleeps have left counts from the stop
            tree.read_states()
            judge_threads(tree.threads)
            asking: Asking | None = None
            seen: Mapping[int, Seen] = {}
            if same is not None and (visits := self._as_before(tree)) is not None:
                asking, seen = stack.enter_context(tree.asking(visits)), same
            members = self._meet(tree, stack, seen, survey=survey)
            passing = stack.enter_context(contextlib.ExitStack())
            passing.enter_context(collection.passing)
            living = [member for member in members if not member.process.zombie]
            collection.nested += [(one.numbers, self._census.space(one.pid)) for one in living if one.nested]
            sysv_shm.collect(self._areas(living), collection)
            files = passing.enter_context(FilesPass(self._files, collection))
            if asking is None:
                visits = [self._visit(member.process, member.areas) for member in living]
                asking = stack.enter_context(tree.asking(visits))
            self._pass = _Pass(tree, collection, now, members, living, files, asking, stack.pop_all(), passing)

    def drop(self) -> None:
        """Give up a pass that has been begun, if there is one: nothing of it is left in the tree."""
        begun, self._pass = self._pass, None
        if begun is not None:
            with contextlib.suppress(EngineError):  # one that was asked has ended
                begun.stack.close()

    def collect(
        self,
        tree: Tree,
        *,
        survey: bool,
        track: bool = False,
        hold: Callable[[], None] = _nothing,
        seal: Seal = _no_seal,
        surrender: Surrender | None = None,
    ) -> Collection:
        """Make images of a stopped tree. With `track`, processes that have none yet get a userfaultfd.

        In the final pass, `hold` is called when nothing is injected any more: it freezes the tree for good; and `seal`
        when everything is collected but what changes the tree's own objects (sockets go into repair mode): it writes
        down how to undo that, and holds the network. With `surrender`, the tree gives up its exclusive file locks.
        """
        if self._pass is None or self._pass.tree is not tree:
            self.begin(tree, survey=survey)
        begun, self._pass = self._pass, None
        assert begun is not None
        with begun.stack:
            collection, members = begun.collection, begun.members
            if not survey:  # what is looked at from outside can be while threads answer inside
                collection.inner_pids.update(self._foresee(members))
                self._look_outside(members, begun.files, collection)
            cores = {thread.tid: begin_core(thread) for thread in tree.threads}
            _collect_inventory(begun.now, collection)
            answers = begun.asking.answers()
            self._name(members, answers, collection)
            told: dict[int, _Told] = {}
            leaders: list[tuple[Member, ThreadView]] = []
            for member in begun.living:
                told |= self._collect_tasks(tree, member, answers, cores, leaders, collection)
            self._collect_varying(tree, leaders, cores, collection, track=track)
            self._told = told
            if surrender is not None:
                for member in begun.living:
                    visit = Visit(member.process, self._gadgets[member.pid], member.areas, {})
                    surrender.from_inside(tree, visit, begun.files.locks(member.files))
            self._collect_dead(members, collection)
            if not survey:  # while threads are on their way out
                self._complete(begun, collection)
            tree.over()
            hold()
            if survey:
                self._look_outside(members, begun.files, collection)
                self._complete(begun, collection)
            self._seal(collection, seal, surrender)
            begun.passing.close()
            for kind in task_kinds():
                kind.finish(collection)
            if survey:
                judge_tree(members, collection)
        return collection

    def _complete(self, begun: _Pass, collection: Collection) -> None:
        """What takes both what was seen from outside and what threads have said."""
        for member in begun.living:
            mm = collection.checkpoint.one("mm", member.owner.inner_pid)
            mm.mm_brk = collection.scratch["brk"][member.pid]
        lineup.collect(begun.members, self._census, collection)

    def _meet(self, tree: Tree, stack: contextlib.ExitStack, seen: Mapping[int, Seen], *, survey: bool) -> list[Member]:
        """The processes, what they are called, and their areas."""
        members: list[Member] = []
        for process in tree.processes.values():
            level = members[0].level if members else None
            members.append(stack.enter_context(opened(process, level, self._statuses, seen.get(process.pid))))
        self._statuses.keep(tree.processes.keys())
        self._recognize(members)
        self._census.take(members)
        living = [member for member in members if not member.process.zombie]
        self._find_tops(living, stack)
        for member in living:
            known = seen.get(member.pid)
            member.areas = self._read_areas(member, None if known is None else known.maps, survey=survey)
        return members

    def _find_tops(self, members: list[Member], stack: contextlib.ExitStack) -> None:
        """The root of each process's mount namespace, through whichever of them sees it."""
        tops: dict[int, int] = {}
        if not self._lent:
            tops[census.HOST["mnt"]] = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, tops[census.HOST["mnt"]])
        for member in members:
            number = self._census.numbers(member.pid)["mnt"]
            if number not in tops and read_link(member.process.proc, "root") == "/":
                tops[number] = member.owner.root
        for member in members:
            top = tops.get(self._census.numbers(member.pid)["mnt"], -1)
            member.owner = replace(member.owner, top=top)

    def _areas(self, members: list[Member]) -> Iterator[tuple[Owner, Area, int]]:
        """All areas, with the IPC namespace of each."""
        for member in members:
            number = self._census.numbers(member.pid)["ipc"]
            for area in member.areas:
                yield member.owner, area, number

    def prepare(self, root: int) -> None:
        """Before a survey stops the tree: what can be read while it runs, and is only compared when it stands."""
        for leader in (True, False):
            standing(leader)
        processes = list(read_tree(root))
        with contextlib.suppress(EngineError):
            self._census.prepare([process.pid for process in processes if not process.dead])
        for process in processes:
            with contextlib.suppress(EngineError), contextlib.ExitStack() as stack:
                proc = open_process(process.pid)
                stack.callback(os.close, proc)
                if not process.dead:
                    for kind in task_kinds():
                        kind.prepare(proc)
                areas = read_smaps(proc)
                if areas and not process.dead:
                    way = None if process.pid in self._gadgets else search_gadgets(process.pid, areas)
                    self._seen[process.pid] = areas, way

    def _read_areas(self, member: Member, text: bytes | None, *, survey: bool) -> list[Area]:
        """The areas of a process. While it stands, smaps would walk all page tables: where maps says that nothing
        moved, the flags are those of a moment before, or, in the freeze, of the last survey (advice that changes splits
        or joins areas, in all but rare cases)."""
        if survey:
            seen, way = self._seen.pop(member.pid, ([], None))
            if not seen or _bounds(seen) != _bounds(read_maps(member.process.proc)):
                return read_smaps(member.process.proc)
            if way is not None:
                self._gadgets.setdefault(member.pid, way)
            return seen
        known = self._mapped.get(member.pid)
        text = read_bytes(member.process.proc, "maps") if text is None else text
        if known is not None and known.text != text and _bounds(known.areas) == _bounds(parse_maps(text)):
            known.text = text
        return known.areas if known is not None and known.text == text else read_smaps(member.process.proc)

    def _foresee(self, members: list[Member]) -> dict[int, int]:
        """The numbers of threads in their own pid namespace, as they were at the last pass; `_name` looks again."""
        numbers = {}
        for member in members:
            for thread in member.process.threads:
                known = self._names.get(thread.tid)
                numbers[thread.tid] = read_name(member, thread) if known is None else known
        return numbers

    def _name(self, members: list[Member], answers: dict[int, Results], collection: Collection) -> None:
        """The numbers of threads, by what they say themselves."""
        for member in members:
            name_threads(member, answers)
        found = {tid: inner for member in members for tid, inner in member.inner_tids.items()}
        if collection.inner_pids not in ({}, found):
            raise BusyError("a thread has another number than the one before it that had the same for us")
        collection.inner_pids.update(found)
        self._names = found

    def _as_before(self, tree: Tree) -> list[Visit] | None:
        """What every thread is asked, by what is known of the processes; None if one executes another program now."""
        visits = []
        for process in tree.processes.values():
            if process.zombie:
                continue
            known = self._known.get(process.pid)
            if known is None or process.pid not in self._mapped or known.executed:
                return None
            visits.append(self._visit(process, self._mapped[process.pid].areas))
        return visits

    def _visit(self, process: Process, areas: list[Area]) -> Visit:
        """What the threads of a process are asked."""
        if process.pid not in self._gadgets:
            self._gadgets[process.pid] = find_gadgets(process.pid, areas)
        programs = {
            thread.tid: standing(thread is process.driver).program for thread in process.threads if not thread.zombie
        }
        return Visit(process, self._gadgets[process.pid], areas, programs)

    def _collect_tasks(
        self,
        tree: Tree,
        member: Member,
        answers: dict[int, Results],
        cores: dict[int, core_pb2.core_entry],
        leaders: list[tuple[Member, ThreadView]],
        collection: Collection,
    ) -> dict[int, _Told]:
        """Cores of all threads of a process: from ptrace, from inside, from /proc. Its leader is added to `leaders`."""
        process = member.process
        told: dict[int, _Told] = {}
        for thread in process.threads:
            if thread.zombie:
                continue
            view = self._view(tree, member, thread, answers[thread.tid])
            results = answers[thread.tid]
            told[thread.tid] = self._hear(view, results, collection)
            core = cores[thread.tid]
            fill_core(core, tree, member, thread, view)
            judge_sleep(thread, view, collection)
            core.MergeFromString(told[thread.tid].part)
            for kind, token in told[thread.tid].others:
                kind.collect(view, token, results, core, collection)
            collection.checkpoint.put("core", view.inner_tid, core)
            if view.leader:
                leaders.append((member, view))
                brk = results.answer(told[thread.tid].inquiry.brk)
                collection.scratch.setdefault("brk", {})[process.pid] = brk
        return told

    def _view(self, tree: Tree, member: Member, thread: Thread, results: Results) -> ThreadView:
        leader, told = thread is member.process.driver, self._told.get(thread.tid)
        filtered = results.answer(standing(leader).seccomp) == _FILTERED
        filters = tree.seccomp_filters(thread, () if told is None else told.filters) if filtered else ()
        return ThreadView(member.owner, thread.tid, member.inner_tids[thread.tid], leader, filters)

    def _hear(self, view: ThreadView, results: Results, collection: Collection) -> _Told:
        """What has been made of these answers before; what is made of them now, where they are others."""
        inquiry, known = standing(view.leader), self._told.get(view.tid)
        if known is not None and known.inquiry is inquiry and known.answers == results.buffer:
            return known._replace(filters=view.filters)
        part, others = core_pb2.core_entry(), []
        for kind, token in inquiry.kinds:
            if kind.repeats(token, results):
                kind.collect(view, token, results, part, collection)
            else:
                others.append((kind, token))
        return _Told(inquiry, results.buffer, part.SerializePartialToString(), tuple(others), view.filters)

    def _collect_varying(
        self,
        tree: Tree,
        leaders: list[tuple[Member, ThreadView]],
        cores: dict[int, core_pb2.core_entry],
        collection: Collection,
        *,
        track: bool,
    ) -> None:
        """What is asked of one process and of no other, of all at once. With `track`, those that have no userfaultfd
        yet make one."""
        inquiries = {member.pid: inquire(view, varying=True) for member, view in leaders}
        made: dict[int, Reg] = {}
        if track:
            for pid in inquiries.keys() - self.uffds.keys():
                made[pid] = inquiries[pid].program.call(NR.userfaultfd, _UFFD_FLAGS, label="userfaultfd for tracking")
        visits = [
            self._visit_driver(member, inquiries[member.pid].program)
            for member, _ in leaders
            if inquiries[member.pid].program.steps
        ]
        answers, nothing = tree.ask(visits) if visits else {}, Results((), b"")
        for member, view in leaders:
            for kind, token in inquiries[member.pid].kinds:
                kind.collect(view, token, answers.get(view.tid, nothing), cores[view.tid], collection)
        makers = [(member, answers[view.tid].value(made[member.pid])) for member, view in leaders if member.pid in made]
        if makers:
            self._take_uffds(tree, makers)

    def _take_uffds(self, tree: Tree, makers: list[tuple[Member, int]]) -> None:
        """Have what processes have made, by these numbers, in our table and no longer in theirs."""
        drops = {number: Program() for _, number in makers}
        for number, drop in drops.items():
            drop.call(NR.close, number)
        try:
            for member, number in makers:
                self.uffds[member.pid] = calls.pidfd_getfd(member.pidfd, number)
        finally:
            tree.ask([self._visit_driver(member, drops[number]) for member, number in makers])

    def _visit_driver(self, member: Member, program: Program) -> Visit:
        tid = member.process.driver.tid
        return Visit(member.process, self._gadgets[member.pid], member.areas, {tid: program})

    def _collect_dead(self, members: list[Member], collection: Collection) -> None:
        for member in members:
            if member.process.zombie:
                collection.checkpoint.put("core", member.owner.inner_pid, dead_core(member))

    def _look_outside(self, members: list[Member], files: FilesPass, collection: Collection) -> None:
        """What is seen from outside: namespaces, files, memory but for the end of the heap."""
        self._census.collect(members, collection)
        members = [member for member in members if not member.process.zombie]
        tables = {member.files: Table(member.files, member.owner, member.pidfd) for member in reversed(members)}
        files.tables(tables[number] for number in sorted(tables))
        for member in members:
            files.fs(member.owner, member.status.umask or 0)
            self._collect_memory(member, files, collection)
        files.finish()

    @staticmethod
    def _seal(collection: Collection, seal: Seal, surrender: Surrender | None) -> None:
        lock_move.waiters(collection)
        if not collection.survey and not collection.blockers:
            seal(collection)
            if surrender is not None:
                surrender.from_outside(collection)
            for kind in descriptor_kinds():
                kind.seal(collection)

    def _collect_memory(self, member: Member, files: FilesPass, collection: Collection) -> None:
        def mapped(owner: Owner, area: Area) -> int:
            flags = os.O_RDWR if area.shared and "mw" in area.flags else os.O_RDONLY
            link = f"map_files/{area.start:x}-{area.end:x}"
            return files.file_at(owner, link, flags, f"area {area.start:x}-{area.end:x}")

        exe = files.file_at(member.owner, "exe", os.O_RDONLY, "the executable")
        auxv = read_bytes(member.process.proc, "auxv")
        mm = address_space.collect_bounds(member.stat, exe, auxv)
        known = self._mapped.get(member.pid)
        if known and known.areas is member.areas and files.again(known.file_ids):
            mm.vmas.extend(known.entries)
        else:
            sources = address_space.Sources(mapped)
            entries = address_space.collect_areas(member.owner, member.areas, sources, collection)
            mm.vmas.extend(entries)
            self._mapped[member.pid] = _Mapped(member.areas, entries)
        found = self.guards.find(member.pid, member.process.proc, member.areas, survey=collection.survey)
        mm.vmas.extend(address_space.guard_entries(found))
        collection.checkpoint.put("mm", member.owner.inner_pid, mm)


def _bounds(areas: list[Area]) -> list[tuple[Any, ...]]:
    """All but the flags."""
    return [area[:8] for area in areas]


def _collect_inventory(now: Clocks, collection: Collection) -> None:
    collection.checkpoint.put("inventory", None, _inventory())
    clocks = timens_pb2.timens_entry()
    clocks.monotonic.tv_sec, clocks.monotonic.tv_nsec = divmod(now.monotonic, _SECOND)
    clocks.boottime.tv_sec, clocks.boottime.tv_nsec = divmod(now.boottime, _SECOND)
    collection.checkpoint.put("timens", 0, clocks)


@functools.cache
def _inventory() -> inventory_pb2.inventory_entry:
    """What is the same in all images that we write."""
    inventory = inventory_pb2.inventory_entry(img_version=_IMAGE_VERSION, fdinfo_per_id=True, ns_per_id=True)
    inventory.root_ids.CopyFrom(lineup.ids(*[_OURS] * 4))  # no process of the tree shares memory or files with us
    census.write(inventory.root_ids, census.HOST)
    here = vdso.local()
    if here is not None:
        inventory.phaul_vdso = here.code.data
    return inventory

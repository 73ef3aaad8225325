"""The source's side of one tree, from the survey to the last page.

The order is the caller's: `survey`, any number of `send_round`, then `freeze`, `send_last` and `collect`, and at the
end `let_go`. Between `freeze` and `let_go` the tree stands still; before and after it runs, tracked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from . import plan
from .collect import Collector, Seal
from .errors import BusyError, EngineError, GoneError, TargetError, refusal
from .images.checkpoint import Checkpoint
from .lock_move import Note, Surrender
from .looks import look_again
from .members import Seen
from .memory import guards, objects
from .memory.areas import Care, Mapping, care_of, described, open_shared
from .memory.extents import Extents, Kind, Place
from .memory.files import present
from .memory.shared import SharedMemory
from .memory.source import PageSource
from .memory.tracker import Backend, Tracker, available
from .objects import memfd, network_files
from .objects.address_space import areas_of, made_anew
from .objects.base import Collection
from .proc.access import looking, open_at, open_process, read_bytes
from .proc.maps import Area, read_maps
from .proc.stat import Stat, read_stat
from .proc.tree import read_tree
from .target import Tracer, Tree, stop_tree

_SHM_MASK = 0xFFFFFFFF
_MOVING_LOOKS = 2  # at first, while the tree runs
_YOUNG = 50_000_000  # nanoseconds: two changes in one tick of the clock that stamps files cannot be told apart


def _nothing(*_: float) -> None:
    """Nobody wants to know."""


class MemoryObject(NamedTuple):
    """An address space or shared memory: the kind and ident of its image file, the number that both sides know it
    under, where it is, and the pages that are there."""

    kind: str
    ident: int
    number: int
    place: Place
    extents: Extents


@dataclass
class _Space:
    """The tracked address space of one process. `memory` is the collector's number of it. `sent`: a round has had it;
    `lost`: what was sent of it is not at the destination any more; `anew`: likewise of these stretches."""

    pid: int
    number: int
    memory: int
    proc: int
    mem: int
    tracker: Tracker
    cleanup: contextlib.ExitStack
    areas: list[Area] = field(default_factory=list)
    sent: bool = False
    lost: bool = False
    anew: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Shared:
    """A tracked shared object. `compared` in the freeze are the pages of memory files, which may be written without a
    mapping, and of all where soft-dirty bits are all we have: those of a shared page go when it is unmapped."""

    fd: int
    memory: SharedMemory
    compared: bool
    sent: bool = False
    alone: bool = False  # a file with a name, which nobody outside the tree uses
    stamp: tuple[int, int, int] | None = None  # size and times, when what it holds was last sent; None if not known

    def touched(self) -> bool:
        """Whether a system call may have written to it since it was last sent."""
        status = os.fstat(self.fd)
        return self.stamp != (status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def note(self) -> None:
        """What it holds is sent after this. Times that are so young may stand for a later write too."""
        status = os.fstat(self.fd)
        age = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
        known = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        self.stamp = known if age > _YOUNG else None


class Departure:
    """One tree leaving. `source` is where its pages go; it may be set after the survey."""

    def __init__(self, tracer: Tracer, root: int, *, options: dict[str, Any] | None = None) -> None:
        self.root = root
        self.source: PageSource | None = None
        self._tracer = tracer
        self._cleanup = contextlib.ExitStack()
        self._collector = self._cleanup.enter_context(Collector(options))
        self._spaces: dict[int, _Space] = {}
        self._shared: dict[int, _Shared] = {}
        self._shape: object = None
        self._moved: bool | None = None  # what `changed` found in this freeze, in which nothing moves any more
        self._seen: dict[int, Seen] = {}  # of the frozen tree, by pid
        self._told = Checkpoint()  # the images that the destination has
        self._tree: Tree | None = None
        self._track = Backend.WP_ASYNC in available()
        self.look_seconds = 0.0  # that the last survey took from the stop on: about what a freeze takes
        self._devices_write = False  # into memory, behind the page tables that trackers look at

    # -- while the tree runs -------------------------------------------------------------------------------------

    def survey(
        self,
        *,
        timeout_ms: int,
        stopping: Callable[[], None] = _nothing,
        released: Callable[[float], None] = _nothing,
    ) -> Collection:
        """Stop the tree for a moment, learn all of it, and begin to track it.

        It stands only while its registers are read and programs run inside it; files and areas are looked at while it
        runs again, or, where tasks keep ending meanwhile, while it stands. What cannot be carried is in `blockers` of
        what is returned; images of everything else in `checkpoint`. `stopping` is told right before the tree stops,
        `released` when it runs again, after how many seconds. GoneError or TargetError when the tree keeps changing
        under our eyes.
        """
        return look_again(
            lambda number, patience: self._survey(patience, stopping, released, standing=number >= _MOVING_LOOKS),
            timeout_ms,
        )

    def _survey(
        self, timeout_ms: int, stopping: Callable[[], None], released: Callable[[float], None], *, standing: bool
    ) -> Collection:
        self._collector.prepare(self.root)
        stopping()
        with looking(), stop_tree(self._tracer, self.root, timeout_ms=timeout_ms) as tree:
            begun = time.monotonic()

            def hold() -> None:
                if not standing:
                    tree.let_go()
                    released(time.monotonic() - begun)

            shape = self._look(tree)
            collection = self._collector.collect(tree, survey=True, track=self._track, hold=hold)
            self.look_seconds = time.monotonic() - begun
            if collection.blockers and not standing:  # perhaps of files that were closed while they were looked at
                raise BusyError("what was found of the tree does not fit together")
            self._follow_tree(collection)
            self._follow_areas(collection)
            self._follow_devices(collection)
            self._shape = shape
            if not collection.blockers:
                self._tell(collection)
        if standing:
            released(time.monotonic() - begun)
        return collection

    def changed(self) -> bool:
        """Whether tasks or areas are other than at the last survey, so that another one is due before a round."""
        if self._tree is None:
            return self._look(None) != self._shape
        if self._moved is None:
            self._moved = self._look(self._tree) != self._shape
        return self._moved

    @property
    def scans_running(self) -> bool:
        """Whether what changed can be found, and the finding begun anew, while the tree runs."""
        return not any(space.tracker.needs_stop for space in self._spaces.values())

    def send_round(self, number: int, *, flush: bool = True) -> None:
        """Send what changed since the last round, all that is there in round 0; returns when it is queued. `flush`:
        files too go to where they are stored."""
        if flush:
            self.flush_files()
        self._forget_anew()
        for space in self._spaces.values():
            with contextlib.suppress(GoneError), self._standing(space, needed=number > 0):
                self._send_space(space, clear=True)
                space.sent, space.lost, space.anew = True, False, []
        for shmid, shared in self._shared.items():
            compare = shared.memory.lost or (shared.sent and shared.touched())
            shared.memory.lost = False
            shared.note()
            try:
                extents = (
                    shared.memory.everything() if compare else shared.memory.scan(clear=True, first=not shared.sent)
                )
            except TargetError as error:  # a process that mapped it, or the mapping, is gone, and what was written last
                if not isinstance(error, GoneError) and error.errno != errno.EPERM:
                    raise
                extents, compare = shared.memory.everything(), True
            self.page_source.send(objects.shared(shmid), extents, compare=compare)
            shared.sent = True
        self.page_source.end(number)

    def flush_files(self) -> None:
        """Bring what the tree has written to network storage there, so that little is left for the freeze."""
        network_files.flush(self._collector.network_files())

    def dirty_pages(self) -> int:
        """How many private pages a round would send now."""
        pages = 0
        for space in self._spaces.values():
            with contextlib.suppress(GoneError):
                pages += sum(one.pages(Kind.DATA, Kind.PRIVATE) for one in space.tracker.scan(clear=False))
        return pages

    # -- in the freeze -------------------------------------------------------------------------------------------

    def freeze(self, *, timeout_ms: int) -> None:
        """Stop the tree until `let_go`; no thread stands in the vDSO then."""
        self._tree = stop_tree(self._tracer, self.root, timeout_ms=timeout_ms)
        self._moved = None
        try:
            self._tree.step_aside({pid: space.areas for pid, space in self._spaces.items()}, timeout_ms=timeout_ms)
        except BaseException:
            self.let_go()
            raise

    def begin_collect(self) -> None:
        """Have the threads of the frozen tree asked, while `send_last` goes on. Not where areas have changed, which is
        to be seen first (`changed`), nor where pages must not be touched any more: what is injected leaves signal
        frames in unused stack."""
        if self.changed():
            raise EngineError("tasks or areas have changed: threads are asked when that has been seen to")
        with looking():
            self._collector.begin(self._frozen, survey=False, same=self._seen)

    @property
    def stopped_at(self) -> float:
        """When the stop of the frozen tree began (CLOCK_MONOTONIC); what is looked at before costs it nothing."""
        return self._frozen.begun

    def frozen_pids(self) -> list[int]:
        """The processes of the frozen tree."""
        return list(self._frozen.processes)

    def collect(self, *, hold: Callable[[], None], seal: Seal, note: Note) -> Checkpoint:
        """Images of the frozen tree, which gives up its exclusive file locks; `hold` and `seal` as in
        `Collector.collect`, `note` as in `Surrender`.

        Raises BlockedError if something came that cannot be carried, BusyError if it can at another try.
        """
        surrender = Surrender(self.root, note)
        with looking():
            collection = self._collector.collect(
                self._frozen, survey=False, track=self._track, hold=hold, seal=seal, surrender=surrender
            )
        if collection.blockers:
            raise refusal(collection.blockers)
        if _writes_by_device(collection) and not self._devices_write:
            raise TargetError("a file was opened with O_DIRECT since the last round", advice="another try will do")
        if self.changed():
            self._follow_tree(collection)
            self._follow_areas(collection)
            self._tell(collection)
        return collection.checkpoint

    def send_last(self, number: int) -> None:
        """Send what changed since the last round, and nothing will change again."""
        self._forget_anew()
        for space in self._spaces.values():
            self._send_space(space, clear=False)
            if self._devices_write:
                self.page_source.send(space.number, present(space.proc, space.areas), compare=True)
        for shmid, shared in self._shared.items():
            compare = (shared.compared and not self._rests(shared)) or shared.memory.lost or not shared.sent
            extents = shared.memory.everything() if compare else shared.memory.scan(clear=False)
            self.page_source.send(objects.shared(shmid), extents, compare=compare)
        self.page_source.end(number)

    def _rests(self, shared: _Shared) -> bool:
        """Whether a file is certainly as it was sent, and need not be compared."""
        return shared.alone and not shared.memory.mapped and not self._devices_write and not shared.touched()

    def memory(self) -> Iterator[MemoryObject]:
        """All memory of the tree, tracked or not; it has to stand still."""
        for space in self._spaces.values():
            place = Place(space.pid, space.mem)
            yield MemoryObject("pagemap", space.number, space.number, place, present(space.proc, read_maps(space.proc)))
        for shmid, shared in self._shared.items():
            everything = SharedMemory(shared.fd).everything()
            yield MemoryObject("pagemap-shmem", shmid, objects.shared(shmid), Place(0, shared.fd), everything)

    def let_go(self) -> None:
        """Detach from the frozen tree: it runs on, unless a frozen cgroup holds it."""
        self._collector.drop()
        self._collector.guards.released()
        tree, self._tree = self._tree, None
        if tree is not None:
            tree.close()

    def close(self) -> None:
        """Let go of everything and stop tracking."""
        self.let_go()
        for space in self._spaces.values():
            space.cleanup.close()
        self._spaces.clear()
        self._cleanup.close()
        self._shared.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def page_source(self) -> PageSource:
        """Where pages go."""
        if self.source is None:
            raise EngineError("there is no page source to send pages to")
        return self.source

    @property
    def _frozen(self) -> Tree:
        if self._tree is None:
            raise EngineError("the tree is not frozen")
        return self._tree

    def connect(self, source: PageSource) -> None:
        """Where pages go from now on; all objects known so far are made known to it."""
        self.source = source
        for space in self._spaces.values():
            source.add(space.number, Place(space.pid, space.mem), hashed=self._devices_write)
        for shmid, shared in self._shared.items():
            source.add(objects.shared(shmid), Place(0, shared.fd), hashed=True)

    def _tell(self, collection: Collection) -> None:
        """These images go to the destination. What it makes anew then is sent as a whole, whatever was sent before."""
        told, self._told = self._told, collection.checkpoint
        for space in self._spaces.values():
            inner_pid = collection.inner_pids[space.pid]
            if space.sent and told.has("mm", inner_pid):
                old, new = (areas_of(images.one("mm", inner_pid)) for images in (told, self._told))
                space.anew = sorted({*space.anew, *made_anew(old, new)})

    def _forget_anew(self) -> None:
        """What the destination has made anew was never sent: to be said before a round sends anything."""
        for space in self._spaces.values():
            for start, end in space.anew:
                self.page_source.forget(space.number, start, end)

    def _send_space(self, space: _Space, *, clear: bool) -> None:
        """Send what changed in an address space; guard pages that came are among it, and the others where they were.
        Where a scan does not tell what changed, all are looked for: after it, so that the next one tells of later
        ones."""
        whole = not space.sent or space.lost or bool(space.anew) or space.tracker.needs_stop
        changed = Extents()
        for extents in self._scan(space, clear=clear):
            if not whole:
                space.tracker.find_guards(extents, changed)
            self.page_source.send(space.number, extents)
        if whole:
            self._collector.guards.know(space.pid, guards.of_process(space.proc, space.areas))
        else:
            self._collector.guards.note(space.pid, changed, last=not clear)

    def _scan(self, space: _Space, *, clear: bool) -> Iterator[Extents]:
        """What is to be sent of an address space."""
        return space.tracker.scan(clear=clear, first=not space.sent, again=space.lost, anew=space.anew)

    def _follow_tree(self, collection: Collection) -> None:
        """Track the processes that are there now. What the destination makes anew is sent as a whole."""
        unfilled: frozenset[int] = frozenset()
        if self._told.files() and not collection.blockers:
            old, new = plan.read_tree(self._told), plan.read_tree(collection.checkpoint)
            foreign = bool(collection.options.get("shell_job"))
            unfilled = plan.changes(old, new, foreign_session=foreign).unfilled
        memories = self._collector.memories()
        for pid, space in list(self._spaces.items()):
            if memories.get(pid) != space.memory:
                self._drop_space(pid)
            elif collection.inner_pids[pid] in unfilled:
                space.lost = True
                if self.source is not None:
                    self.source.remove(space.number)
                    self.source.add(space.number, Place(pid, space.mem), hashed=self._devices_write)
        for pid, memory in memories.items():
            if pid not in self._spaces:
                self._add_space(pid, objects.address_space(collection.inner_pids[pid]), memory)

    def _add_space(self, pid: int, number: int, memory: int) -> None:
        with contextlib.ExitStack() as stack:
            proc = open_process(pid)
            stack.callback(os.close, proc)
            mem = open_at(proc, "mem")
            stack.callback(os.close, mem)
            uffd = self._collector.uffds.get(pid)
            tracker = Tracker(proc, None if uffd is None else os.dup(uffd))
            stack.callback(tracker.close)
            self._spaces[pid] = _Space(pid, number, memory, proc, mem, tracker, stack.pop_all())
        if self.source is not None:
            self.source.add(number, Place(pid, mem), hashed=self._devices_write)

    def _drop_space(self, pid: int) -> None:
        space = self._spaces.pop(pid)
        if self.source is not None:
            self.source.remove(space.number)
        space.cleanup.close()

    def _keep(self, fd: int) -> int:
        self._cleanup.callback(os.close, fd)
        return fd

    def _follow_areas(self, collection: Collection) -> None:
        """Track what is mapped now."""
        mappings: dict[int, list[tuple[Tracker, Mapping]]] = {}
        files = memfd.sources(collection)
        for space in self._spaces.values():
            space.areas = described(read_maps(space.proc), self._collector.areas(space.pid))
            space.tracker.track(space.areas)
            for area in space.areas:
                file = files.get((area.dev, area.ino)) if area.shared else None
                if file is not None or care_of(area) is Care.SHARED_MEMORY:
                    shmid = area.ino & _SHM_MASK if file is None else file.shmid
                    if shmid not in self._shared:
                        self._add_shared(
                            shmid, open_shared(space.proc, area), compared=area.path != "/dev/zero (deleted)"
                        )
                    place = (space.tracker, Mapping(area.start, area.size, area.offset))
                    mappings.setdefault(shmid, []).append(place)
        for file in files.values():
            if file.shmid not in self._shared:
                fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY)
                self._add_shared(file.shmid, fd, compared=True, alone=file.alone)
        for shmid, shared in self._shared.items():
            shared.memory.follow(mappings.get(shmid, []))

    def _follow_devices(self, collection: Collection) -> None:
        """A program that reads files with O_DIRECT has devices write into its memory, which no tracker sees: from then
        on all of its pages are hashed when they are sent, and compared in the freeze."""
        if self._devices_write or not _writes_by_device(collection):
            return
        self._devices_write = True
        if self.source is not None:
            for space in self._spaces.values():
                space.lost = True
                self.source.remove(space.number)
                self.source.add(space.number, Place(space.pid, space.mem), hashed=True)

    def _add_shared(self, shmid: int, fd: int, *, compared: bool, alone: bool = False) -> None:
        self._shared[shmid] = _Shared(self._keep(fd), SharedMemory(fd), compared or not self._track, alone=alone)
        if self.source is not None:
            self.source.add(objects.shared(shmid), Place(0, fd), hashed=True)

    def _look(self, tree: Tree | None) -> object:
        """Tasks and areas, as one value to compare. A stopped tree is known already but for its areas."""
        if tree is not None:
            self._seen = {one.pid: Seen(read_stat(one.proc), _areas(one.proc)) for one in tree.processes.values()}
            return sorted(
                _shape(self._seen[one.pid].stat, (thread.tid for thread in one.threads), self._seen[one.pid].maps)
                for one in tree.processes.values()
            )
        shapes = []
        for process in read_tree(self.root):
            with contextlib.suppress(GoneError), contextlib.ExitStack() as stack:
                proc = open_process(process.pid)
                stack.callback(os.close, proc)
                shapes.append(_shape(read_stat(proc), process.threads, _areas(proc)))
        return sorted(shapes)

    @contextlib.contextmanager
    def _standing(self, space: _Space, *, needed: bool) -> Iterator[None]:
        """Soft-dirty bits are read and cleared while the process stands."""
        if not (needed and space.tracker.needs_stop):
            yield
            return
        with stop_tree(self._tracer, space.pid, timeout_ms=1000):
            yield


def _shape(stat: Stat, threads: Iterable[int], areas: bytes) -> tuple[object, ...]:
    """All of a process that the destination has to know before pages of it come in."""
    return stat.pid, stat.start, stat.ppid, stat.pgrp, stat.session, stat.dead, sorted(threads), areas


def _areas(proc: int) -> bytes:
    """The areas of a process as the kernel's text; empty if it has none any more."""
    try:
        return read_bytes(proc, "maps")
    except GoneError:
        return b""


def _writes_by_device(collection: Collection) -> bool:
    """Whether a file or block device is open with O_DIRECT (in a pipe that flag means packets)."""
    return any(
        descriptor.info.flags & os.O_DIRECT
        and (stat.S_ISREG(descriptor.status.st_mode) or stat.S_ISBLK(descriptor.status.st_mode))
        for descriptor in collection.descriptors.values()
    )

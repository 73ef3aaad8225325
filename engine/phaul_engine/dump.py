"""A tree to images on disk, and the rounds before it.

`dump` stops the tree for good: it looks for what stands in the way, stores the pages, makes the images of everything
else, and only when all of it is written does it end the tree. Whatever fails before leaves the tree running as it was.
`pre_dump` stores pages while the tree runs: a later dump compares with them and stores only what differs. A page that
was torn by a write in that moment differs from what it is then, so nothing has to stand still.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import silence, vdso
from .collect import Collector
from .errors import BlockedError, EngineError, GoneError, TargetError
from .images.checkpoint import Checkpoint
from .images.directory import ImageDirectory
from .images.framing import Record
from .images.pages import PageImages
from .images.pb import inventory_pb2, stats_pb2
from .memory.areas import Care, care_of, open_shared
from .memory.extents import Extents, Kind, Place
from .memory.files import present
from .memory.shared import SharedMemory
from .network import hold, lock, undo
from .objects import memfd
from .objects.base import Collection
from .page_store import DirectoryStore, PageStore, Stored
from .proc.access import open_at
from .proc.maps import Area
from .proc.stat import stat_of
from .registers import spread
from .target import Process, Tracer, Tree, stop_tree

_STOP_MS = 2000
_GONE_SECONDS = 10.0
_SHM_MASK = 0xFFFFFFFF
_PRE_DUMP_READ = 2  # CRIU's PRE_DUMP_READ: pages were read while the tree ran


@dataclass(frozen=True)
class Dumped:
    """What a dump has done. Pages include those of shared memory; `seconds` is how long the tree stood still."""

    processes: int
    stored: Stored
    seconds: float


@dataclass(frozen=True)
class Space:
    """The pages of one address space or shared object, and where they are read."""

    kind: str
    ident: int
    place: Place
    extents: Extents


@dataclass
class _Sources:
    """What holds the pages of a tree; closed by the stack."""

    stack: contextlib.ExitStack
    spaces: list[Space] = field(default_factory=list)
    shared: set[int] = field(default_factory=set)

    def add_process(self, process: Process, inner_pid: int) -> None:
        """Its private memory, and the shared objects that it maps."""
        mem = self._keep(open_at(process.proc, "mem"))
        areas = process.areas()
        extents = present(process.proc, areas)
        extents.append(vdso.pages(areas), Kind.PRIVATE)
        extents.unite()
        self.spaces.append(Space("pagemap", inner_pid, Place(process.pid, mem), extents))
        for area in areas:
            if care_of(area) is Care.SHARED_MEMORY:
                self._add_area(process, area)

    def _add_area(self, process: Process, area: Area) -> None:
        shmid = area.ino & _SHM_MASK
        if shmid not in self.shared:
            self.add_shared(shmid, self._keep(open_shared(process.proc, area)))

    def add_shared(self, shmid: int, fd: int) -> None:
        """A shared object behind a descriptor, which stays the caller's. Each is stored once."""
        if shmid not in self.shared:
            self.shared.add(shmid)
            self.spaces.append(Space("pagemap-shmem", shmid, Place(0, fd), SharedMemory(fd).everything()))

    def _keep(self, fd: int) -> int:
        self.stack.callback(os.close, fd)
        return fd


@contextlib.contextmanager
def _sources(tree: Tree, collection: Collection) -> Iterator[list[Space]]:
    with contextlib.ExitStack() as stack:
        sources = _Sources(stack)
        for process in tree.processes.values():
            if not process.zombie:
                sources.add_process(process, collection.inner_pids[process.pid])
        for file in memfd.sources(collection).values():
            fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY)
            stack.callback(os.close, fd)
            sources.add_shared(file.shmid, fd)
        yield sources.spaces


def open_store(directory: ImageDirectory, stack: contextlib.ExitStack) -> PageStore:
    """Pages go into the directory; its parent's, if it has one, are compared with."""
    if not directory.has("parent"):
        return DirectoryStore(directory)
    parent = directory.parent()
    if parent is None:
        return DirectoryStore(directory)
    stack.callback(parent.close)
    return DirectoryStore(directory, stack.enter_context(PageImages(parent)))


def dump(
    tracer: Tracer,
    root: int,
    directory: ImageDirectory,
    store: PageStore,
    *,
    options: dict[str, Any] | None = None,
    leave_running: bool = False,
) -> Dumped:
    """Store a tree; afterwards it is gone, unless `leave_running`.

    Packets of its connections are dropped from then on, until it is restored here (`network.lock`).

    Raises BlockedError, with everything that stands in the way, and leaves the tree running then; so it does when
    anything else fails.
    """
    with Collector(options) as collector, contextlib.ExitStack() as stack:
        begun = time.monotonic()
        tree = stack.enter_context(stop_tree(tracer, root, timeout_ms=_STOP_MS))
        tree.step_aside()
        survey = _survey(collector, tree, root)
        with _sources(tree, survey) as spaces:
            _store(spaces, store)
        store.finish()
        sealed = _Sealed(locking=not leave_running and os.path.samefile(f"/proc/{root}/ns/net", "/proc/self/ns/net"))
        try:
            collection = collector.collect(tree, survey=False, seal=sealed.note)
            if collection.blockers:
                raise BlockedError(collection.blockers)
            complete(collection.checkpoint, begun, store.stored)
            if sealed.lock is not None:
                lock.note(sealed.lock, collection.checkpoint)
            collection.checkpoint.save(directory)
        except BaseException:
            sealed.undo()
            raise
        if leave_running:
            sealed.undo()
        else:
            _kill(tree)
        dumped = Dumped(len(tree.processes), store.stored, time.monotonic() - begun)
        pids = list(tree.processes)
    if not leave_running:
        _wait_until_gone(pids)
    return dumped


def pre_dump(
    tracer: Tracer, root: int, directory: ImageDirectory, store: PageStore, *, options: dict[str, Any] | None = None
) -> Dumped:
    """Store the pages of a tree that runs on. Raises BlockedError if a dump would be refused."""
    with Collector(options) as collector, contextlib.ExitStack() as stack:
        begun = time.monotonic()
        with stop_tree(tracer, root, timeout_ms=_STOP_MS) as tree:
            survey = _survey(collector, tree, root)
            spaces = stack.enter_context(_sources(tree, survey))
            processes = len(tree.processes)
        seconds = time.monotonic() - begun
        _store(spaces, store)
        store.finish()
        checkpoint = Checkpoint()
        inventory = inventory_pb2.inventory_entry()
        inventory.CopyFrom(survey.checkpoint.one("inventory"))
        inventory.pre_dump_mode = _PRE_DUMP_READ
        checkpoint.put("inventory", None, inventory)
        complete(checkpoint, begun, store.stored)
        checkpoint.save(directory)
    return Dumped(processes, store.stored, seconds)


def _survey(collector: Collector, tree: Tree, root: int) -> Collection:
    """Everything about a tree but its pages; what stands in the way of storing it is raised."""
    if tree.processes[root].zombie:
        raise GoneError(f"process {root} has ended; its parent has not taken notice yet")
    survey = collector.collect(tree, survey=True)
    if survey.blockers:
        raise BlockedError(survey.blockers)
    return survey


def _store(spaces: list[Space], store: PageStore) -> None:
    for space in spaces:
        store.put(space.kind, space.ident, space.place, space.extents)


def complete(checkpoint: Checkpoint, begun: float, stored: Stored) -> None:
    """What is known at the end: when it was, and what it cost; and what other readers want of the registers and of
    the order of files."""
    for ident in checkpoint.idents("core"):
        spread(checkpoint.one("core", ident))
    if checkpoint.has("files"):
        _order_pairs(checkpoint)
    inventory = checkpoint.one("inventory")
    inventory.dump_uptime = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
    inventory.plugins_entry.SetInParent()
    elapsed = int((time.monotonic() - begun) * 1e6)
    entry = stats_pb2.stats_entry(
        dump=stats_pb2.dump_stats_entry(
            freezing_time=0,
            frozen_time=elapsed,
            memdump_time=0,
            memwrite_time=0,
            pages_scanned=stored.pages + stored.in_parent,
            pages_skipped_parent=stored.in_parent,
            pages_written=stored.pages,
            pages_lazy=0,
        )
    )
    checkpoint.put("stats", "dump", entry)


class _Sealed:
    """Sockets that the final pass has put into repair mode, and with `locking` their packets, which are dropped."""

    def __init__(self, *, locking: bool) -> None:
        self.lock: dict[str, Any] | None = None
        self._locking = locking
        self._entry: dict[str, Any] | None = None

    def note(self, collection: Collection) -> None:
        """Called before it does so."""
        self._entry = undo.repair_entry(collection)
        connections = list(hold.matches(collection.checkpoint, connections=True))
        if self._locking and connections:
            self.lock = lock.plan()
            lock.lock(self.lock, connections)

    def undo(self) -> None:
        """Give them back to the program."""
        for entry in (self.lock, self._entry):
            if entry is not None:
                undo.undo(entry)


def _order_pairs(checkpoint: Checkpoint) -> None:
    """Let the socket of a pair of unix sockets that was found first stand behind the other, as in CRIU's images: CRIU
    makes the pair in the first process that has the socket which stands last, and fails if that is a later one."""
    waiting: dict[int, Record] = {}
    ordered: list[Record] = []
    sockets = {one.message.usk.ino: one for one in checkpoint.records("files") if one.message.HasField("usk")}
    for record in checkpoint.records("files"):
        usk = record.message.usk
        peer = sockets.get(usk.peer) if usk.ino in sockets and usk.peer else None
        if peer is not None and peer is not record and peer.message.usk.peer == usk.ino:
            if usk.peer not in waiting:
                waiting[usk.ino] = record
                continue
            ordered.append(record)
            ordered.append(waiting.pop(usk.peer))
        else:
            ordered.append(record)
    checkpoint.adopt("files", None, ordered)


def _kill(tree: Tree) -> None:
    """End a stopped tree without a word to anybody: no thread runs again, and none writes to files while it dies."""
    silence.hush(tree)
    with contextlib.suppress(TargetError):  # what lives still is waited for without us
        tree.kill()


def _wait_until_gone(pids: list[int]) -> None:
    """Until nothing of them lives: a zombie that its parent has not reaped is gone too."""
    deadline = time.monotonic() + _GONE_SECONDS
    for pid in pids:
        while _lives(pid):
            if time.monotonic() > deadline:
                raise EngineError(
                    f"process {pid} was killed and does not end",
                    advice="the images are complete; restore them when it is gone",
                )
            time.sleep(0.002)


def _lives(pid: int) -> bool:
    try:
        return not stat_of(pid).dead
    except GoneError:
        return False

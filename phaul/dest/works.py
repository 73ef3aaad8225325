"""What the destination does for each step of the protocol (phaul.migration.Work), over the engine's Landing.

State comes beside the protocol's messages, as letters that `take` gets in their order. Nothing that the network could
notice is done before WAKE.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from phaul_engine import catching, cgroup, sleep_log
from phaul_engine.clocks import Clocks, machine_clocks, own_clocks
from phaul_engine.errors import EngineError
from phaul_engine.footprint import footprint
from phaul_engine.images import delta
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.landing import Landing
from phaul_engine.memory import fingerprint
from phaul_engine.memory.sink import PageSink
from phaul_engine.memory.stream import Channel
from phaul_engine.namespaces import control_groups, lodging
from phaul_engine.namespaces.mnt import externals
from phaul_engine.objects import carried_file, confinement, journal_stream, sysv_shm, unix_socket, waking
from phaul_engine.target import Tracer

from phaul import policy, workloads
from phaul.config import SLEEPS
from phaul.dest.directories import Directories
from phaul.dest.network import Network
from phaul.dest.register import Register
from phaul.driver import blocking
from phaul.errors import PhaulError
from phaul.haul import layers
from phaul.journal import Journal, Row, Store, Task, Undo, boot_id
from phaul.migration import Done, Role, Work
from phaul.policy import Incoming, PolicyError
from phaul.recovery import Deeds
from phaul.transport.direct import Kind, Letter
from phaul.urgency import Urgency

log = logging.getLogger(__name__)

_LAST_PAGES_TIMEOUT = 60.0
_FREEZE_TIMEOUT = 5.0
_NEARLY = 1_000_000  # nanoseconds
_LAG = 1.0  # seconds that a tree waits for its clock, at most
_LOOK = 0.25  # seconds between two looks at the memory of a copy that has a limit


class DestinationWorks:
    """The works of one migration at the destination. `report` takes phases of the downtime, in seconds."""

    def __init__(self, migration: str, store: Store, report: Callable[[str, float], None]) -> None:
        self.migration = migration
        self.journal: Journal | None = None
        self.hurried = False  # the freeze is about to begin at the source, or has begun
        self.link: dict[str, Any] = {}  # for the row: as whom, and where, whoever comes after us answers the source
        self._store = store
        self._report = report
        self._cleanup = contextlib.ExitStack()
        self._tracer = self._cleanup.enter_context(Tracer())
        sleep_log.log.remember(SLEEPS)
        self._sink: PageSink | None = None
        self._landing: Landing | None = None
        self._cgroup: cgroup.Hold | None = None
        self._survey: Checkpoint | None = None
        self._images = Checkpoint()  # the last that came as a whole
        self._final: Checkpoint | None = None
        self._settings: dict[str, Any] = {}
        self._clocks: Clocks | None = None
        self._busy = threading.Lock()
        self._round = -1
        self._protection: asyncio.Task[None] | None = None
        self._network = Network(migration)
        self._directories = Directories()
        self._waking: dict[str, Any] = {}
        self._noted: list[dict[str, Any]] = []  # of files that wait beside their places
        self._prints: list[fingerprint.Print] = []
        self._gate = policy.of_agent()
        self._register = Register(migration)
        self._cleanup.callback(self._register.close)
        self._watch: asyncio.Task[None] | None = None
        self.failed: Callable[[str], None] = lambda _: None  # told when nobody has asked
        self.answer: Callable[[bytes], None] = lambda _: None  # to what has come of directories; from any thread
        self._urgency = Urgency()
        self._cleanup.callback(self._urgency.end)

    def connect(self, pages: Sequence[Channel]) -> None:
        """The page streams are there."""
        self._sink = PageSink(pages)
        self._cleanup.callback(self._sink.close)

    async def take(self, letter: Letter) -> None:
        """State from the source. Letters come one at a time, in their order."""
        match letter.kind:
            case Kind.SETTINGS:
                self._settings = letter.settings()
                self._clocks = _offsets(self._settings["clocks"])
            case Kind.SURVEY:
                self._survey = self._images = Checkpoint.from_bytes(letter.body)
            case Kind.CHANGES:
                changed = self._images = self._accepted(Checkpoint.from_bytes(letter.body))
                await self._complete_round()
                await asyncio.to_thread(self._alone, lambda: self.landing.update(changed))
            case Kind.ROUND:
                await self._begin_round(letter.round())
            case Kind.FINAL:
                self.hurried = False
                self._final = self._accepted(delta.apply(self._images, letter.body))
            case Kind.FINGERPRINTS:
                self._prints = fingerprint.unpack(letter.body)
            case Kind.HURRY if letter.body == b"\1":
                self._urgency.begin()
                self._register.warm()
                self._rehearse()
                self.hurried = True
            case Kind.HURRY:
                self.hurried = False
                self._urgency.end()
            case Kind.ALIVE:
                pass  # that it came is all it says
            case Kind.FRAMES:
                self._network.take(letter.body)
            case Kind.HAUL:
                await self._directories.take(letter.body, hurried=self.hurried)
            case _:
                raise EngineError(f"the source sent {letter.kind.name} where it makes no sense")

    def _accepted(self, images: Checkpoint) -> Checkpoint:
        """Images that this host's policy has nothing against. EngineError for others."""
        if self._gate.strict:
            moved = tuple(str(text).partition("/")[0] for text in self._settings.get("moved", ()))
            workload = str(self._settings.get("workload", "pid"))
            try:
                self._gate.demand("destination", Incoming.of(footprint(images), moved=moved, workload=workload))
            except (PolicyError, ValueError) as error:
                raise EngineError(str(error), advice=getattr(error, "advice", "")) from error
        return images

    async def _watch_memory(self) -> None:
        """Pages come by themselves: whether they are more than the policy allows shows only by looking."""
        with contextlib.suppress(OSError):  # a task has ended: who ends it says why
            while True:
                await asyncio.sleep(_LOOK)
                self._check_memory()

    def _check_memory(self) -> None:
        if self._gate.rule.memory and self._landing is not None:
            try:
                self._gate.demand("destination", Incoming(memory=self._landing.memory()))
            except PolicyError as error:
                self.failed(str(error))
                raise EngineError(str(error), advice=error.advice) from error

    @property
    def landing(self) -> Landing:
        """The tree being made."""
        if self._landing is None:
            raise EngineError("nothing is being built here")
        return self._landing

    @property
    def sink(self) -> PageSink:
        """Where pages come in."""
        if self._sink is None:
            raise EngineError("the page streams are not connected")
        return self._sink

    @property
    def place(self) -> int | None:
        """The number of the tree's first process as this host counts, if that is not the one it knows itself by."""
        if self._landing is None or not self._landing.skeleton.renumbered:
            return None
        return next(iter(self._landing.skeleton.pids().values()))

    async def do(self, work: Work) -> Done:
        """Do one; EngineError, PhaulError or OSError when it fails."""
        match work:
            case Work.BUILD:
                await blocking(lambda: self._alone(self._begin))
                await self._directories.have_come()
                await blocking(lambda: self._alone(self._build))
                if self._gate.rule.memory:
                    self._watch = asyncio.create_task(self._watch_memory())
                    self._watch.add_done_callback(lambda task: task.cancelled() or task.exception())
            case Work.LAND:
                if self._watch is not None:
                    self._watch.cancel()
                await self._land()
            case Work.CLAIM:
                await self._register.claim()
            case Work.DETACH:
                self._detach()
            case Work.WAKE:
                self._wake()
            case Work.KILL:
                await asyncio.to_thread(self._alone, self._kill)
            case Work.SYNC:
                if self._landing is not None:
                    await asyncio.to_thread(self._landing.sync)
                await self._sync_directories()
                await asyncio.to_thread(self._deeds().do, work)
            case Work.TIDY:
                self._leave()
                await asyncio.to_thread(self._deeds().do, work)
            case _:
                await asyncio.to_thread(self._deeds().do, work)
        return Done(work)

    def close(self) -> None:
        """Close everything; a tree that was not detached dies."""
        sleep_log.log.save()
        if self._watch is not None:
            self._watch.cancel()
        with self._busy:
            if self._landing is not None:
                self._landing.close()
        self._network.close()
        self._cleanup.close()
        self._directories.close()
        if self._cgroup is not None:
            self._cgroup.close()
        if self.journal is not None:
            self.journal.close()

    def _alone(self, act: Callable[[], None]) -> None:
        """Do something with the tree in a thread; whoever discards it waits for that."""
        with self._busy:
            act()

    def _note(self, entries: Sequence[dict[str, Any]]) -> None:
        """What whoever comes after us has to undo, or to do."""
        if entries and self.journal is not None:
            self.journal.note(undo=tuple(Undo(**entry) for entry in entries))

    def _deeds(self) -> Deeds:
        if self.journal is None:
            raise EngineError("the migration has no row yet")
        return Deeds(self.journal)

    # -- before the freeze ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The row, and a place for directories that come along."""
        arbiter = self._register.find() if self._settings.get("arbiter") else {}
        parent = cgroup.path_of(os.getpid())
        moved = [str(text) for text in self._settings.get("moved", ())]
        hauled = tuple(str(path) for path in self._settings.get("hauled", ()))
        overlays = layers.checked(self._settings.get("layers", {}))
        if hauled:
            workload = str(self._settings.get("workload", "pid"))
            directories = (*hauled, *(path for known in overlays.values() for path in known.directories))
            self._gate.demand("destination", Incoming(workload=workload, hauled=directories))
        row = Row(
            migration=self.migration,
            role=Role.DESTINATION,
            boot=boot_id(),
            owner=Task.of(os.getpid()),
            program=str(self._settings.get("program", "")),
            peer=str(self._settings.get("host", "")),
            cgroup=cgroup.path_of_hold(parent, self.migration),
            addresses=tuple(moved),
            link=self.link,
            caller=self._gate.who,
            arbiter=arbiter,
        )
        self.journal = self._store.create(row)
        if hauled:
            self._note(self._directories.begin(hauled, self.migration, self.answer, self._rooms(), overlays))
            self._directories.make()

    async def _sync_directories(self) -> None:
        why = await self._directories.sync()
        if why and self.journal is not None:
            self.journal.note(warning=f"directories may not be on the disk yet: {why}")

    def _build(self) -> None:
        if self._survey is None or self.journal is None:
            raise EngineError("the source sent no images before PREPARE")
        self._accepted(self._survey)
        hierarchy = self._cleanup.enter_context(cgroup.Hierarchy.find())
        moved = [str(text) for text in self._settings.get("moved", ())]
        place = self._make_ready()
        parent = place.cgroup or cgroup.path_of(os.getpid())
        spread = control_groups.home_of_spread(self._survey) is not None
        where = parent if spread else cgroup.path_of_hold(parent, self.migration)
        self.journal.note(cgroup=where)
        self._cgroup = cgroup.Hold.begin(hierarchy, where)
        self._note(self._network.prepare(moved))
        options = {
            **self._settings.get("options", {}),
            **catching.NOTHING,
            lodging.LODGING: 0,
            **place.options,
            confinement.OPTION: self._gate.confinement,
            journal_stream.UNIT: os.path.basename(parent),  # the unit that the tree lives in
            externals.PLACES: self._directories.places.staged,
        }
        self._landing = Landing(
            self._tracer,
            self._survey,
            self.sink,
            cgroup=self._cgroup.directory,
            clocks=self._clocks,
            options=options,
        )
        self._landing.build()
        tasks = tuple(Task.of(pid) for pid in self._landing.skeleton.pids().values())
        staged = self._staged()
        staged += sysv_shm.undo_entries(self._survey, self._landing.skeleton.pids().values())
        staged += self._network.prepare_own(self._landing.skeleton.restoration)
        self.journal.note(tasks=tasks, undo=tuple(Undo(**entry) for entry in staged))
        self.journal.sync()

    def _make_ready(self) -> workloads.Place:
        """Have the runtime that the program will belong to make a place for it."""
        kind, facts, note = self._workload()
        return workloads.of(kind).prepare(facts, note, self._tracer, self._directories.places)

    def _rooms(self) -> dict[str, str]:
        """Where the runtime has directories that come along."""
        kind, facts, note = self._workload()
        return workloads.of(kind).rooms(facts, note)

    def _workload(self) -> tuple[str, dict[str, Any], workloads.Note]:
        """Its kind, what the source says of it, and what notes go to."""
        kind, facts = str(self._settings.get("workload", "pid")), dict(self._settings.get("facts", {}))
        journal = self.journal

        def note(notes: dict[str, Any]) -> None:
            if journal is not None:
                journal.note(workload={"kind": kind, "notes": notes})

        return kind, facts, note

    @property
    def arbitrated(self) -> bool:
        """Whether an arbiter decides about this migration; known from BUILD on."""
        return self._register.found

    @property
    def overruled(self) -> bool:
        """Whether the source has had the arbiter decide: it waits for no answer."""
        return self._register.overruled

    def _staged(self) -> list[dict[str, Any]]:
        """Journal entries of files that wait beside their places, each once."""
        restoration = self.landing.skeleton.restoration
        entries = unix_socket.staged_entries(restoration) + carried_file.staged_entries(restoration)
        new = [entry for entry in entries if entry not in self._noted]
        self._noted += new
        return new

    async def _begin_round(self, number: int) -> None:
        await self._complete_round()
        if number != self._round + 1:
            raise EngineError(f"the source announced round {number} after {self._round}")
        self._round = number
        self.landing.allow(number)
        if number == 0:
            self._protection = asyncio.create_task(self._protect())
            # what it raises is for whoever waits for it; after an abort that is nobody
            self._protection.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _complete_round(self) -> None:
        """Wait for the pages of the round before: what changes next must find them in place."""
        if self._protection is not None:
            await self._protection
        if self._round >= 0:
            await self.sink.over(self._round)

    async def _protect(self) -> None:
        """Protect areas as soon as their first pages are in: the next word from the source may be of the freeze."""
        await self.sink.over(0)
        await asyncio.to_thread(self._alone, lambda: self.landing.protect())

    # -- in the freeze -------------------------------------------------------------------------------------------

    def _rehearse(self) -> None:
        """Before the freeze: what it takes is done once, to no effect, with the images that are here already."""
        if self._landing is None or self.journal is None or not self._busy.acquire(blocking=False):
            return
        try:
            delta.apply(self._images, delta.Known(Checkpoint()).delta(self._images))
            self._landing.skeleton.rehearse()
            self.journal.note()
        except (EngineError, PhaulError, OSError) as error:  # if it matters, it will be met again
            log.info("the rehearsal ended: %s", error)
        finally:
            self._busy.release()

    async def _land(self) -> None:
        if self._final is None or self._cgroup is None:
            raise EngineError("the source sent no final images")
        marks = [time.monotonic()]
        self.landing.prepare_finish(self._final)
        marks.append(time.monotonic())
        self.sink.wait(self._round, _LAST_PAGES_TIMEOUT)
        self._check_memory()
        self._verify()  # before the final state is given: with a thread's rseq area the kernel writes into memory
        marks.append(time.monotonic())
        self.landing.finish(self._final)
        self._note_waking()
        self._await_clock()
        marks.append(time.monotonic())
        self._cgroup.freeze(_FREEZE_TIMEOUT, self.landing.skeleton.pids().values())
        marks.append(time.monotonic())
        for name, begun, ended in zip(("areas", "pages", "objects", "park"), marks, marks[1:], strict=False):
            self._report(name, ended - begun)

    def _verify(self) -> None:
        """--verify: a page that is not as at the source ends this copy."""
        wrong = self.landing.differences(self._prints) if self._prints else []
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise EngineError(f"memory differs from the source's: {', '.join(wrong[:3])}{more}")

    def _await_clock(self) -> None:
        """The tree's clocks never go back. They were set by what was measured before the first round, to tenths of a
        millisecond; but the clocks of two machines drift apart, and rounds may take hours."""
        behind = self.landing.skeleton.behind() / 1e9
        if behind > _LAG:
            raise EngineError(f"the clocks of the two hosts have drifted apart by {behind:.1f} s during this migration")
        if behind > 0:
            time.sleep(behind)

    def _note_waking(self) -> None:
        """What must be done after the commit stands in the journal before it: we may not live to do it."""
        self._note(self._staged())
        heads = self.landing.skeleton.last_words.entry(self._cgroup.path if self._cgroup is not None else "")
        if heads is not None:
            self._note([heads])
        entry = waking.entry(self.landing.skeleton.restoration, f"/run/phaul/{self.migration}.wake")
        if entry is not None:
            self._waking = entry["data"]
            self._note([entry])

    def _detach(self) -> None:
        """Hardly ever is anything late; the tasks are parked, thawed or not."""
        if self.landing.late and self._cgroup is not None:
            self._cgroup.thaw()
            self.landing.speak()
            self._cgroup.freeze(_FREEZE_TIMEOUT)
        self.landing.detach()

    def _wake(self) -> None:
        """RESUMED is written: be heard of, then run."""
        self._network.be_heard()
        self.landing.wake()
        self._network.replay()
        if self._cgroup is not None:
            self._cgroup.thaw()
        if self._waking:
            waking.forget(self._waking)
        try:
            self._directories.publish()
        except OSError as error:
            if self.journal is not None:
                self.journal.note(warning=f"{error.filename} keeps its name: {error.strerror}")

    def _leave(self) -> None:
        """It runs, and the source knows: nothing of it is ours any more."""
        self._urgency.end()
        if self._landing is not None:
            self._landing.close()
            self._landing = None

    def _kill(self) -> None:
        self._urgency.end()
        if self._landing is not None:
            self._landing.close()
            self._landing = None
        self._network.forget()
        self._directories.close()
        if self.journal is not None:
            self._deeds().do(Work.KILL)


def _offsets(ahead: Sequence[int]) -> Clocks | None:
    """How far the tree's clocks have to be ahead of this machine's, as the source says; None where our own do."""
    clocks = Clocks(int(ahead[0]), int(ahead[1]))
    if all(abs(one) <= _NEARLY for one in clocks.minus(own_clocks().minus(machine_clocks()))):
        return None
    return clocks

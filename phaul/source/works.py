"""What the source does for each step of the protocol (phaul.migration.Work), over the engine's Departure.

The freeze is `freeze`: every part of it is timed and reported as a phase. Its order is the design's: stop, send pages,
collect and cure, freeze the cgroup, note the undo, hold the network, read the sockets, send the images, detach.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from phaul_engine import cgroup, clocks, lock_move, silence, sleep_log
from phaul_engine.departure import Departure
from phaul_engine.errors import BlockedError, EngineError, GoneError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.delta import Known
from phaul_engine.keeping import keep_images, make_directory
from phaul_engine.memory.fingerprint import fingerprint, pack
from phaul_engine.memory.source import PageSource, SourceStatistics
from phaul_engine.memory.stream import Channel, DeadlineError
from phaul_engine.namespaces import control_groups
from phaul_engine.namespaces.net import plug
from phaul_engine.network import hold as network_hold
from phaul_engine.network import replay
from phaul_engine.network import undo as network_undo
from phaul_engine.network.accepting import Queues
from phaul_engine.objects import carried_file, sysv_shm
from phaul_engine.objects.base import Collection
from phaul_engine.proc.access import open_process
from phaul_engine.proc.tree import read_tree
from phaul_engine.target import Tracer

from phaul import claims, events, policy, workloads
from phaul.config import SLEEPS
from phaul.driver import blocking
from phaul.events import Event, Finding
from phaul.journal import Journal, Row, Store, Task, Undo, boot_id
from phaul.migration import Done, Role, Verdict, Work
from phaul.recovery import LOCK_PATIENCE, Deeds
from phaul.source.hauling import Hauling
from phaul.source.orders import Orders, open_register
from phaul.source.phases import Phases
from phaul.source.rounds import Numbers, Passed, decide
from phaul.source.throttle import STEPS, Throttle
from phaul.transport.direct import Direct, Kind
from phaul.urgency import Urgency

_LAST_ACCEPTS = 0.25  # seconds for a server to accept what has come before the stop, at most
_SURVEY_TIMEOUT = 1.0  # seconds that the first stop may take
_ROUND_TIMEOUT = 3600.0
_LAST_PAGES = 10.0  # seconds beyond the downtime that is good enough, for the last pages to be sent
_LOOK = 0.2  # seconds between two looks at a round
_FIXED_GUESS = 0.005  # seconds, until this run has measured something
_PAGE = 4096
_AHEAD = 30.0  # seconds that the round before the stop may take
_FORWARD = 0.05  # seconds that packets for the moved program are still passed on


@dataclass
class _Network:
    """What is set up to hold the tree's packets."""

    hold: network_hold.Hold
    kept: list[bytes] = field(default_factory=list)  # frames read so far: an abort gives them back


class SourceWorks:
    """The works of one migration at the source. `report` takes events; `journal` exists from PREPARE on."""

    def __init__(self, migration: str, orders: Orders, store: Store, report: Callable[[Event], None]) -> None:
        self.migration = migration
        self.journal: Journal | None = None
        self.history: list[Passed] = []
        self.frozen_at = 0.0
        self.clocks_ahead = clocks.Clocks(0, 0)  # of the destination's machine, those of ours
        self.link: dict[str, Any] = {}  # for the row: how whoever comes after us asks the destination
        self._orders = orders
        self._store = store
        self._report = report
        self._cleanup = contextlib.ExitStack()
        self._tracer = self._cleanup.enter_context(Tracer())
        sleep_log.log.remember(SLEEPS)
        self._departure = Departure(self._tracer, orders.root, options={**orders.options, carried_file.OPTION: True})
        self._cleanup.callback(self._departure.close)
        self.alive: Callable[[], None] = lambda: None  # called while a work takes long, but goes on; from any thread
        self._images: Checkpoint | None = None
        self._known = Known(Checkpoint())  # what images the destination has
        self._rounds = Numbers()
        self._stopped = False  # the round that is being sent is not wanted any more
        self._slower = 0  # steps of throttling taken
        self._direct: Direct | None = None
        self._survey: Collection | None = None
        self._cgroup: cgroup.Hold | None = None
        self._network: _Network | None = None
        self.haul = Hauling(orders, report)
        self._cleanup.callback(self.haul.close)
        self._survey_seconds = _FIXED_GUESS
        self.attempts = 0
        self.told = False  # whether the destination was sent the final state: then no other freeze may follow
        self._spared: tuple[network_hold.Match, ...] = ()
        self._urgency = Urgency()
        self._cleanup.callback(self._urgency.end)

    # -- before anything is touched ------------------------------------------------------------------------------

    def examine(self) -> list[Finding]:
        """What forbids to move this tree, from the engine's survey. The program stops for milliseconds."""
        claimed = [claim.finding for claim in claims.find(self._store, self._orders.root)]
        if claimed:
            return claimed
        self._survey = self._look()
        if self._orders.keep_images:
            make_directory(Path(self._orders.keep_images))
        blockers = [*self._survey.blockers, *cgroup.examine(self._pids())]
        return [Finding("blocker", "engine", f"{one.where} is {one.kind}: {one.why}", one.advice) for one in blockers]

    @property
    def there(self) -> bool:
        """Whether the program is there to be moved."""
        try:
            return not read_tree(self._orders.root).dead
        except GoneError:
            return False

    @property
    def survey(self) -> Collection:
        """What the survey found."""
        if self._survey is None:
            raise EngineError("the tree has not been examined")
        return self._survey

    def connect(self, control: Channel, pages: Sequence[Channel]) -> None:
        """The connections to the destination are there: pages and state go over them."""
        self._direct = Direct(control)
        source = PageSource(pages, codec=self._orders.codec, level=self._orders.level, checksum=self._orders.verify)
        self._cleanup.callback(source.close)
        source.set_bandwidth(self._orders.wanted.bandwidth)
        self._departure.connect(source)

    def spare(self, connections: Iterable[network_hold.Match]) -> None:
        """The migration's own connections, whose packets are never held."""
        self._spared = tuple(connections)

    @property
    def direct(self) -> Direct:
        """The connection to the destination's agent."""
        if self._direct is None:
            raise EngineError("the destination is not connected")
        return self._direct

    # -- the works -----------------------------------------------------------------------------------------------

    async def do(self, work: Work) -> Done:
        """Do one; EngineError, PhaulError or OSError when it fails."""
        match work:
            case Work.PREPARE:
                await blocking(self._prepare)
            case Work.COPY:
                return await self._copy_until_stopped()
            case Work.FREEZE:
                await self._freeze()
            case Work.LET_GO:
                self._let_go()
            case Work.UNDO:
                self._let_go()
                await asyncio.to_thread(self._leave_network)
                if self.journal is not None:
                    await asyncio.to_thread(self._deeds().do, work)
            case Work.RELEASE:
                await self._release()
            case _:
                await asyncio.to_thread(self._deeds().do, work)
        return Done(work)

    def close(self) -> None:
        """Close everything; a tree that is not frozen runs on."""
        sleep_log.log.save()
        if self._network is not None:
            self._network.hold.close()
        self._cleanup.close()
        if self._cgroup is not None:
            self._cgroup.close()
        if self.journal is not None:
            self.journal.close()

    def _pids(self) -> list[int]:
        return [process.pid for process in read_tree(self._orders.root)]

    def _deeds(self) -> Deeds:
        if self.journal is None:
            raise EngineError("the migration has no row yet")
        return Deeds(self.journal)

    def _prepare(self) -> None:
        hierarchy = self._cleanup.enter_context(cgroup.Hierarchy.find())
        where = self._where_to_hold()
        pids = self._pids()
        row = Row(
            migration=self.migration,
            role=Role.SOURCE,
            boot=boot_id(),
            owner=Task.of(os.getpid()),
            program=self._orders.program,
            peer=self._orders.peer,
            cgroup=where,
            tasks=tuple(Task.living(pids)),
            undo=(Undo(**network_hold.undo_entry(self.migration, self._own_network)),),
            addresses=self._orders.moved,
            link=self.link,
            caller=policy.of_agent().who,
            workload={"kind": self._orders.workload, "facts": self._orders.facts},
            arbiter=open_register(self.migration, self._report),
        )
        with claims.exclusively(self._store):
            claims.refuse(self._store, self._orders.root)
            self.journal = self._store.create(row)
        if self._orders.workload != "pid":
            workloads.of(self._orders.workload).hold(self._orders.facts)
        self._cgroup = cgroup.Hold.begin(hierarchy, where)
        self._cgroup.gather(self._pids)
        self._prepare_network()
        self._send_settings()
        if self._orders.hauled:
            self.journal.note(undo=self.haul.begin(self.migration, partial(self.direct.send, Kind.HAUL), self.alive))
        else:
            self._announce(Kind.SURVEY, self.survey.checkpoint)
        threads = sum(len(process.threads) for process in read_tree(self._orders.root))
        self._report(events.Prepared(self.migration, len(pids), threads, self._departure.dirty_pages()))

    def _where_to_hold(self) -> str:
        """The cgroup to freeze the tree in: a new one, or, if its tasks are in several, what holds them all."""
        home = control_groups.home_of_spread(self.survey.checkpoint)
        if home is not None:
            return home
        return cgroup.path_of_hold(cgroup.path_of(self._orders.root), self.migration)

    async def send_trees(self) -> None:
        """Directories that go along, while the destination waits; then the images: what they tell of is there."""
        await blocking(self._send_trees, self._stop)

    def _send_trees(self) -> None:
        self.haul.first()
        self._survey = self._checked_look()
        self.haul.round()
        self._announce(Kind.SURVEY, self.survey.checkpoint)
        self.haul.complete()

    def _prepare_network(self) -> None:
        """A hold, switched off, where the tree has sockets whose packets it would lose."""
        matches = list(network_hold.matches(self.survey.checkpoint))
        matches += [network_hold.Match(None, text.partition("/")[0]) for text in self._orders.moved]
        own = self._own_network
        if not matches or (own and not network_hold.outward(own)):
            return
        hold = network_hold.prepare(self.migration, own)
        self._network = _Network(hold)
        hold.add(matches)
        hold.spare(self._spared)

    @property
    def _own_network(self) -> str:
        """The path of the tree's network namespace, empty if it is ours."""
        path = f"/proc/{self._orders.root}/ns/net"
        return "" if os.path.samefile(path, "/proc/self/ns/net") else path

    def _announce(self, kind: Kind, checkpoint: Checkpoint) -> None:
        """Send images as a whole. The final ones are told by what differs from the last of these. A round that was
        announced before them had no pages."""
        if self._rounds.pending:
            self._departure.page_source.end(self._begin_round())
        self.direct.send(kind, checkpoint.to_bytes())
        self._known = Known(checkpoint)

    def _send_settings(self) -> None:
        proc = open_process(self._orders.root)
        try:
            ahead = clocks.offsets(proc)
        finally:
            os.close(proc)
        plain = (str, int, bool, list)
        options = {key: value for key, value in self._orders.options.items() if isinstance(value, plain)}
        who: dict[str, Any] = {
            "program": self._orders.program,
            "host": os.uname().nodename,
            "workload": self._orders.workload,
            **self.haul.told,
        }
        who["arbiter"] = bool(self.journal and self.journal.row.arbiter)
        there = [ahead.monotonic + self.clocks_ahead.monotonic, ahead.boottime + self.clocks_ahead.boottime]
        body = who | {"moved": self._orders.moved, "options": options, "clocks": there, "facts": self._orders.facts}
        self.direct.send(Kind.SETTINGS, json.dumps(body).encode())

    async def _copy_until_stopped(self) -> Done:
        """A round, in a thread."""
        self._stopped = False
        return await blocking(self._copy, self._stop)

    def _stop(self) -> None:
        """Whoever sends a round, or files, comes out of it soon."""
        self._stopped = True
        self.haul.stop()

    def _begin_round(self) -> int:
        """Announce a round, if that has not been done; its number."""
        return self._rounds.begin(self.direct.send_round)

    def _watch_round(self, number: int, wire: int, before: SourceStatistics, begun: float) -> None:
        """Wait for the round's end, and tell how it goes on."""
        source = self._departure.page_source
        while True:
            try:
                return source.wait(wire, _LOOK)
            except DeadlineError:
                if self._stopped:
                    raise EngineError("the round was stopped") from None
            self.alive()
            sent, seconds = source.statistics() - before, time.monotonic() - begun
            rate = sent.bytes_wire / seconds
            self._report(events.RoundProgress(number, sent.pages_data, sent.bytes_wire, seconds * 1000, rate))

    def _copy(self) -> Done:
        number = len(self.history)
        self.haul.round()
        self._look_again(number)
        source = self._departure.page_source
        before, begun = source.statistics(), time.monotonic()
        self._report(events.RoundStarted(number, 0 if number else self._departure.dirty_pages()))
        wire = self._begin_round()
        with self._throttled():
            self._departure.send_round(wire)
            self._watch_round(number, wire, before, begun)
        seconds, sent = time.monotonic() - begun, source.statistics() - before
        dirty = self._departure.dirty_pages()
        self.history.append(Passed(sent.pages_data, sent.bytes_wire, seconds, dirty, self.haul.predict(self._pids())))
        round_ = events.Round(sent.pages_data, sent.bytes_wire, seconds * 1000)
        self._report(events.RoundEnded(number, round_, dirty, dirty * _PAGE / seconds, sent.bytes_wire / seconds))
        return self._decide()

    def _look_again(self, number: int) -> None:
        """Before a round: a survey if the tree has changed. Before round 1 in any case: it refreshes what the freeze
        takes from the last survey, and the second of its kind tells what the freeze will take. And where the last one
        took so long that a freeze were too long by itself.

        The destination has the images of every survey before the round: a survey may find what was not there a moment
        ago, when nothing had changed yet."""
        slow = self._survey_seconds > self._orders.wanted.max_downtime
        if number == 0 or not (number == 1 or slow or self._departure.changed()):
            return
        self._survey = self._checked_look()
        self.haul.round()
        self._announce(Kind.CHANGES, self._survey.checkpoint)

    def _checked_look(self) -> Collection:
        """A survey of a tree that can be moved, still."""
        collection = self._look()
        if collection.blockers:
            raise BlockedError(collection.blockers)
        return collection

    def _look(self) -> Collection:
        """A survey. The program stands for a part of it, in which nothing else comes first."""

        def released(seconds: float) -> None:
            self._urgency.end()
            self._report(events.Surveyed(seconds * 1000))

        try:
            timeout = int(_SURVEY_TIMEOUT * 1000)
            return self._departure.survey(timeout_ms=timeout, stopping=self._urgency.begin, released=released)
        finally:
            self._urgency.end()
            self._survey_seconds = self._departure.look_seconds

    def _decide(self) -> Done:
        fixed = max(_FIXED_GUESS, self._survey_seconds)
        decision = decide(self.history, fixed, self._orders.wanted)
        verdict = Verdict.SWITCH if self._orders.stop_copy else decision.verdict
        names = {Verdict.ANOTHER: "round", Verdict.SWITCH: "switchover", Verdict.GIVE_UP: "give-up"}
        slower = verdict is Verdict.ANOTHER and decision.throttle and self._slower < len(STEPS)
        limit = self._orders.wanted.max_downtime * 1000
        name = "throttle" if slower else names[verdict]
        self._report(events.Predicted(decision.predicted * 1000, limit, name))  # type: ignore[arg-type]
        if slower:
            self._slower += 1
            self._report(events.Throttled(STEPS[self._slower - 1]))
        return Done(Work.COPY, verdict, decision.why)

    def _throttled(self) -> contextlib.AbstractContextManager[object]:
        """--auto-converge, as far as it has gone."""
        if not self._slower or self._cgroup is None:
            return contextlib.nullcontext()
        return Throttle(self._cgroup, STEPS[self._slower - 1])

    # -- the freeze ----------------------------------------------------------------------------------------------

    def hurry(self) -> None:
        """Before the freeze: the destination is to be ready when it begins. It answers. What is done here in the freeze
        only is done once meanwhile, to no effect: the first time takes longest."""
        self._rounds.announce(self.direct.send_round)
        self.direct.send(Kind.HURRY, b"\1")
        self._known.delta(self.survey.checkpoint)

    def send_ahead(self) -> None:
        """One more round, while nothing is urgent yet: of what was written since the last one ended, while the row went
        to the disk and the destination was told. Not where the tree has to stand for it."""
        if not self._departure.scans_running or self._orders.stop_copy:
            return
        self.haul.round()
        number = self._begin_round()
        self._departure.send_round(number, flush=False)
        self._departure.page_source.wait(number, _AHEAD)  # the next round cannot end before

    async def _freeze(self) -> None:
        self.attempts += 1
        timeout = self._orders.wanted.max_downtime
        self._urgency.begin()
        with Phases(self._report) as phases:
            if self._network is not None:  # no new connections: what waits to be accepted is accepted before the stop
                self._network.hold.set(network_hold.Stage.SYN)
                if (queues := Queues.of(self.survey.checkpoint)) is not None:
                    with contextlib.closing(queues):
                        queues.drain(_LAST_ACCEPTS)
            self.frozen_at = phases.begin()
            self._departure.freeze(timeout_ms=max(1, int(timeout * 1000)))
            self.frozen_at = phases.begin(self._departure.stopped_at)
            phases.over("freeze")
            same = not self._departure.changed()
            if same:
                if not (self._orders.verify or self.haul.active):
                    self._departure.begin_collect()
                    phases.over("ask")
                self._send_last()
                phases.over("last scan")
            if self.haul.active:
                await self.haul.last(self._departure.frozen_pids())
                phases.over("files")
            checkpoint = self._collect(timeout)
            phases.over("collect")
            await self.haul.last()  # the engine may have given names to files that had none
            self._send_final(checkpoint, announced=same)
            phases.over("send")
            self._departure.let_go()
            async with asyncio.timeout(timeout + _LAST_PAGES):  # may take long: it can be called off meanwhile
                await self._departure.page_source.over(self._rounds.last)
            phases.over("last pages")

    def _collect(self, timeout: float) -> Checkpoint:
        hold, journal = self._cgroup, self.journal
        if hold is None or journal is None:
            raise EngineError("the tree has no cgroup to be frozen in")

        def seal(collection: Collection) -> None:
            pids = self._departure.frozen_pids()
            entries = sysv_shm.undo_entries(collection.checkpoint, pids)
            entries += carried_file.undo_entries(collection.checkpoint, pids)
            entries += self.haul.left_entries(pids)
            repair = network_undo.repair_entry(collection)
            if repair["data"]["sockets"]:
                entries.append(repair)
            if entries:
                journal.note(undo=tuple(Undo(**entry) for entry in entries))
            if self._network is not None:
                self._network.hold.add(network_hold.matches(collection.checkpoint))
                self._network.hold.set(network_hold.Stage.ALL)

        def note(deed: dict[str, Any]) -> None:
            journal.note(undo=(Undo(**deed),))

        def hold_all() -> None:
            hold.freeze(timeout, self._departure.frozen_pids())

        return self._departure.collect(hold=hold_all, seal=seal, note=note)

    def _send_last(self) -> None:
        """The last pages, and with --verify what all pages hold. It waits for them then: what is injected afterwards
        writes signal frames below the stack pointers, and pages are read while they are sent."""
        number = self._begin_round()
        self._departure.send_last(number)
        if self._orders.verify:
            self._departure.page_source.wait(number, _ROUND_TIMEOUT)
            prints = [one for part in self._departure.memory() for one in fingerprint(*part[2:])]
            self.direct.send(Kind.FINGERPRINTS, pack(prints))

    def _send_final(self, checkpoint: Checkpoint, *, announced: bool) -> None:
        """Pages of areas that the destination does not know follow their announcement."""
        self.told = True
        self._images = checkpoint
        if not announced:
            self._announce(Kind.CHANGES, checkpoint)
            self._send_last()
        self.direct.send(Kind.FINAL, self._known.delta(checkpoint))

    def forward(self) -> bool:
        """Send on the packets that were held so far; to be called while the destination takes over, and a while
        after. Whether there may be more."""
        if self._network is None:
            return False
        frames = replay.drain(self._network.hold.tap)
        if frames:
            self._network.kept += frames
            self.direct.send(Kind.FRAMES, replay.pack(frames))
        return True

    def fall_silent(self) -> None:
        """The destination may take over from now on: of two kernels with the same addresses one answers."""
        if self._network is not None and self._network.hold.netns:
            self._network.hold.set(network_hold.Stage.MUTE)

    def _let_go(self) -> None:
        """Everything goes on here: packets, sockets, tasks."""
        network = self._network
        if network is not None:
            network.hold.set(network_hold.Stage.OFF)
        self._undo_sockets()
        if network is not None:
            for frame in network.kept:
                os.write(network.hold.tap.fd, frame)
            network.kept.clear()
            replay.give_back(network.hold.tap)
        self._departure.let_go()
        if self._cgroup is not None:
            with contextlib.suppress(cgroup.HoldGoneError):  # removed with the one above it, when all had ended
                self._thaw(self._cgroup)
        self.calm()
        if self._direct is not None:
            with contextlib.suppress(EngineError, OSError):
                self._direct.send(Kind.HURRY, b"\0")

    def _thaw(self, hold: cgroup.Hold) -> None:
        """With the file locks that it has given up."""
        deeds = [] if self.journal is None else [e.data for e in self.journal.row.undo if e.kind == lock_move.KIND]
        lost = lock_move.thaw(hold, deeds, LOCK_PATIENCE)
        if self.journal is not None and deeds:
            self.journal.note(undo=(Undo(kind=lock_move.KIND, data={"locks": []}),))
        if lost:
            self._report(events.Notice("warning", lost, "the program runs without it: see who has it (lslocks)"))

    def calm(self) -> None:
        """The program runs: no hurry any more."""
        self._urgency.end()

    def _undo_sockets(self) -> None:
        if self.journal is not None:
            for entry in self.journal.row.undo:
                if entry.kind == "tcp-repair":
                    network_undo.undo({"kind": entry.kind, "data": entry.data})

    async def _release(self) -> None:
        """The destination runs it: the frozen copy goes, without a word to anybody."""
        deadline = time.monotonic() + (_FORWARD if self._network is not None else 0.0)
        while time.monotonic() < deadline:
            self.forward()
            await asyncio.sleep(0.002)
        await self._keep_images()
        if self._network is not None and (own := self._network.hold.netns):
            with contextlib.suppress(OSError):  # an earlier try has killed it
                plug.fall_silent(own)
        if self._cgroup is not None:
            with contextlib.suppress(cgroup.HoldGoneError):  # killed and removed by an earlier try
                problem = await asyncio.to_thread(silence.kill, self._cgroup, 10.0)
                if problem:
                    self._report(events.Notice("warning", problem))
        await asyncio.to_thread(self._leave_network)
        await asyncio.to_thread(self._deeds().do, Work.RELEASE)

    async def _keep_images(self) -> None:
        """--keep-images: from the frozen copy; the program is elsewhere and waits for nothing."""
        images, self._images = self._images, None
        if not self._orders.keep_images or images is None:
            return
        path = Path(self._orders.keep_images)
        keeping = asyncio.create_task(asyncio.to_thread(keep_images, path, self._departure, images, self.frozen_at))
        while not (await asyncio.wait({keeping}, timeout=1.0))[0]:
            self.alive()
        if keeping.exception() is not None:
            advice = "the program has moved; only its images are not kept"
            self._report(events.Notice("warning", f"no images in {path}: {keeping.exception()}", advice))

    def _leave_network(self) -> None:
        """Nothing is held any more."""
        network, self._network = self._network, None
        if network is not None:
            network.hold.close()

"""The agent at the source: what was asked of it, seen through to its result.

It is started by its keeper with a listening socket; the first who connects is phaul, through a relay. When phaul goes
away the migration goes on: it was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from phaul_engine import clocks as own
from phaul_engine.cgroup import FreezeTimeoutError
from phaul_engine.errors import EngineError, TargetError
from phaul_engine.footprint import footprint
from phaul_engine.memory.source import Codec
from phaul_engine.memory.stream import Channel
from phaul_engine.namespaces.mnt import externals
from phaul_engine.network.hold import Match
from phaul_engine.objects import carried_file

from phaul import asking, events, faults, jsontext, policy, workloads
from phaul.driver import Driver, WorkFailedError, blocking
from phaul.errors import PhaulError
from phaul.haul import rsync
from phaul.journal import Journal, Store
from phaul.migration import Cancel, Done, Ended, Failed, Message, Outcome, Role, State, Work
from phaul.migration.source import Committed, Parting, Releasing, Undoing, begin
from phaul.recovery import forget_register
from phaul.session import Front, Request
from phaul.source.orders import Orders
from phaul.source.rounds import Wanted
from phaul.source.works import SourceWorks
from phaul.transport import pages
from phaul.transport.bootstrap import Bootstrap, ident
from phaul.transport.control import ChannelClosed, StreamLink
from phaul.transport.direct import Direct, Kind, Letter
from phaul.transport.pages import Identity
from phaul.transport.relay import ATTRIBUTES, peer_is_root

_PATIENCE = 30.0  # seconds for phaul to connect
_CONNECT_TIMEOUT = 15.0
_ALIVE = 5.0  # seconds between two signs of life in a long round
_HURRY = 0.2  # seconds for the destination to hear of the freeze before it begins
_CLOCK_LOOKS, _CLOCK_TIMEOUT = 8, 10.0
_STREAMS = 4  # page connections at most, where the operator leaves the choice to us: more than processors are slower
_REACH, _RETRY = 3.0, 0.3  # seconds to reach a silent destination, and between two attempts
_SOON = 0.05  # seconds until the operator hears of a commit that is not answered
_LATE = 10.0  # seconds for whoever comes after a dead destination agent to be there
_LOOPBACK = "127.0.0.1"
_TCP = socket.IPPROTO_TCP


class SourceAgent:
    """One migration at the source: what its driver asks for."""

    def __init__(self, request: Request, front: Front, store: Store) -> None:
        self.request = request
        found = workloads.of(request.workload).find(request.subject)
        self.pid = found.pid
        self.resumed_at = 0.0
        self._after_ms = 0.0
        self._told_alive = 0.0
        self.works = SourceWorks(request.migration, _orders(request, found), store, front.emit)
        self.driver = Driver(begin(), self, points=faults.load(store.directory, Role.SOURCE))
        self._loop = asyncio.get_running_loop()
        self.works.alive = self._sign_of_life
        self._front = front
        self._bootstrap = Bootstrap(front.peer)
        self._identity: Identity = pages.make_identity()
        self._address: tuple[str, int] = ("", 0)
        self._pin = b""
        self._link: Direct | None = None
        self._hurrying = asyncio.Event()  # the destination has heard that the freeze begins
        self._clocks: asyncio.Queue[tuple[own.Clocks, own.Clocks]] = asyncio.Queue()  # here and there, as answers came
        self._hearing: asyncio.Task[None] | None = None
        self._hauling: asyncio.Task[None] | None = None
        self._telling: asyncio.TimerHandle | None = None  # of the commit
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what the driver asks for ----------------------------------------------------------------------------------

    @property
    def journal(self) -> Journal | None:
        """The row, from PREPARE on."""
        return self.works.journal

    @property
    def link(self) -> Direct | None:
        """The connection to the destination's agent, from CONNECT on."""
        return self._link

    @property
    def hurried(self) -> bool:
        """The destination says one thing at a time."""
        return False

    async def do(self, work: Work) -> Done:
        """Do a work; what only an agent can do is done here, the rest by `SourceWorks`."""
        match work:
            case Work.CONNECT:
                await self._connect()
                return Done(work)
            case Work.EXAMINE:
                self._examine()
                return Done(work)
            case Work.PREPARE:
                await self._compare_clocks()
                done = await self.works.do(work)
                if self.journal is not None and self.journal.row.arbiter:
                    self.driver.arbitrate()
                if self.works.haul.active:
                    self._hauling = self._start(self._send_trees())
                return done
            case Work.UNDO if self._hauling is not None:
                self._hauling.cancel()
                await asyncio.wait({self._hauling})
                return await self.works.do(work)
            case Work.FREEZE:
                return await self._freeze()
            case _:
                return await self.works.do(work)

    async def take(self, letter: Letter) -> None:
        """The destination sends nothing beside the protocol but its part of the downtime, and that it is in a hurry."""
        if letter.kind is Kind.HURRY:
            self._hurrying.set()
            return
        if letter.kind is Kind.CLOCK:
            self._clocks.put_nowait((own.machine_clocks(), letter.clocks()))
            return
        if letter.kind is Kind.PHASES:
            self._take_phases(letter.body)
            return
        if letter.kind is Kind.HAUL:
            self.works.haul.take(letter.body)
            return
        if letter.kind is Kind.PLACE:
            there, host = letter.place(), self.request.wishes.destination
            text = f"process {self.pid} lives in a PID namespace on {host}, where it is process {there}"
            named = self.request.workload != "pid"
            self._front.emit(events.Notice("info", text, "" if named else f"phaul migrate {there} HOST moves it on"))
            return
        raise EngineError(f"the destination sent {letter.kind.name} where it makes no sense")

    def _take_phases(self, body: bytes) -> None:
        """What took how long there. Its journal is brought to the disk when the program runs already."""
        try:
            phases = [(str(name), float(ms)) for name, ms in jsontext.parse(body)]
        except (ValueError, TypeError, OverflowError) as error:
            raise EngineError(f"the destination sent phases that make no sense: {error}") from error
        for name, ms in phases:
            if name == "journal":
                self._after_ms = ms
            else:
                self._front.emit(events.Phase(name, ms, side="destination"))

    async def reconnect(self) -> None:
        """Reach the destination's agent again, or who answers in its place, with the keys that it knows us by."""
        if self._hearing is not None:
            self._hearing.cancel()
        if self._link is not None:
            self._link.channel.shutdown()  # whoever reads it there takes another connection only after its end
        tls = self._identity.context(server=False, pin=self._pin)
        deadline = time.monotonic() + _REACH
        while time.monotonic() < deadline:
            with contextlib.suppress(EngineError, OSError):
                self._connected(await pages.reconnect(self._address, tls, ident(self.request.migration), _REACH))
                return
            await asyncio.sleep(_RETRY)

    def entered(self, state: State) -> None:
        """Tell the operator what the protocol decided; while the destination takes over, packets are passed on."""
        if not isinstance(state, Committed):
            self._tell_committed()
        match state:
            case Committed(asks=0):
                self.works.fall_silent()
                self._loop.call_soon(lambda: self._start(self._forward()))  # COMMIT leaves first
                self._telling = self._loop.call_later(_SOON, self._tell_committed)
            case Releasing(tries=1):
                self.resumed_at = time.monotonic()
                self.works.calm()
                self._front.emit(events.Resumed(self.downtime_ms))
            case Parting(tries=1):
                self._front.emit(events.Released())
            case Undoing(why=why, tries=1):
                self._front.emit(events.Notice("warning", f"the program goes on at the source: {why}"))

    def _tell_committed(self) -> None:
        """As a rule that it runs there is told at the same time: nothing is said while it stands."""
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.cancel()
            self._front.emit(events.Committed())

    @property
    def downtime_ms(self) -> float:
        """From the stop here to the word that it runs there, without what that word waited for."""
        return (self.resumed_at - self.works.frozen_at) * 1000 - self._after_ms

    # -- the works -------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        request = self.request
        streams = request.streams or min(_STREAMS, len(os.sched_getaffinity(0)))
        self._start(self._until_closed(self._bootstrap))
        host = _LOOPBACK if request.tunnel else ""
        opened = await self._bootstrap.open(request.migration, self._identity.fingerprint, streams, host)
        self._pin = opened.fingerprint
        if request.tunnel:
            self._address = (_LOOPBACK, await self._front.forward(_LOOPBACK, opened.port))
        else:
            self._address = (request.page_host, opened.port)
        tls = self._identity.context(server=False, pin=self._pin)
        control, channels = await pages.connect(self._address, tls, ident(request.migration), streams, _CONNECT_TIMEOUT)
        self.works.spare(_own(channel) for channel in (control, *channels))
        self.works.connect(control, channels)
        self.works.link = asking.link_of(self._identity, self._pin, *self._address)
        self._connected(control)

    def _sign_of_life(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._alive)

    def _alive(self) -> None:
        """A long work goes on: neither side's deadline for silence is meant for it."""
        self.driver.progress()
        now = time.monotonic()
        if self._link is not None and now - self._told_alive > _ALIVE:
            self._told_alive = now
            with contextlib.suppress(EngineError, OSError):
                self._link.send(Kind.ALIVE)

    def _connected(self, control: Channel) -> None:
        self._link = Direct(control)
        self._hearing = self._start(self.driver.listen(self._link))

    async def _send_trees(self) -> None:
        """While the destination waits for them: it makes nothing before."""
        try:
            await self.works.send_trees()
        except (EngineError, PhaulError, OSError) as error:
            self.driver.post(Failed(Work.PREPARE, str(error)))

    def _examine(self) -> None:
        """The survey's own findings: phaul has asked both hosts everything else. Nothing has been touched."""
        blockers = self.works.examine()
        if not blockers:
            program = policy.Incoming.of(footprint(self.works.survey.checkpoint), workload=self.request.workload)
            refusals = policy.of_agent().refusals("source", program)
            blockers = [events.Finding("blocker", "policy", text, f"see {policy.FILE}") for text in refusals]
        if blockers:
            self._front.emit(events.Preflight(tuple(blockers)))
            raise WorkFailedError("\n".join(map(str, blockers)), outcome=Outcome.REFUSED)

    async def _compare_clocks(self) -> None:
        """How far the clocks of this machine are ahead of the destination's. It looked at them between our question and
        its answer, so the shortest of some exchanges says it to half of that: tenths of a millisecond."""
        assert self._link is not None
        shortest = None
        async with asyncio.timeout(_CLOCK_TIMEOUT):
            for _ in range(_CLOCK_LOOKS):
                asked = own.machine_clocks()
                self._link.send(Kind.CLOCK)
                answered, there = await self._clocks.get()
                took = answered.minus(asked)
                if shortest is None or took.monotonic < shortest:
                    shortest = took.monotonic
                    middle = own.Clocks(*(clock + shortest // 2 for clock in asked))
                    self.works.clocks_ahead = middle.minus(there)

    async def _freeze(self) -> Done:
        attempt = self.works.attempts + 1
        self._front.emit(events.SwitchoverStarted(attempt))
        await blocking(self.works.send_ahead)
        await self._hurry()
        begun = time.monotonic()
        try:
            return await self.works.do(Work.FREEZE)
        except (TargetError, FreezeTimeoutError) as error:
            self._front.emit(events.FreezeLetGo(attempt, (time.monotonic() - begun) * 1000, str(error)))
            raise WorkFailedError(str(error), again=not self.works.told and self.works.there) from error

    async def _hurry(self) -> None:
        """Have the destination be ready for the freeze before it begins: on a busy host it may be long in hearing of
        it, and the program would stand. One that does not answer has its say when the protocol asks for it."""
        self._hurrying.clear()
        self.works.hurry()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HURRY):
                await self._hurrying.wait()

    async def _forward(self) -> None:
        """Held packets follow the program until it is released."""
        with contextlib.suppress(EngineError, OSError):
            while isinstance(self.driver.state, Committed):
                if not self.works.forward():
                    break
                await asyncio.sleep(0.0005)

    # -- tasks -----------------------------------------------------------------------------------------------------

    def _start(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @staticmethod
    async def _until_closed(bootstrap: Bootstrap) -> None:
        """SSH may go when the agents have their own connection."""
        with contextlib.suppress(PhaulError):
            await bootstrap.run()

    async def cancelled(self) -> None:
        """The operator's wish becomes an event."""
        await self._front.cancelled.wait()
        self.driver.post(Cancel())

    async def run(self) -> Ended:
        """To the end, with everything let go of."""
        self._start(self.cancelled())
        try:
            ended = await self.driver.run()
            if self.journal is not None and not ended.unfinished:
                self.journal.end()
                await asyncio.to_thread(forget_register, self.journal.row)
            return ended
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.works.close()

    def tell_late(self) -> None:
        """Tell whoever comes after a dead destination agent that it was called off: on a busy host that takes seconds,
        and it would wait for our word for minutes."""
        if self.driver.untold and self.works.link:
            line = asking.Line(self.request.migration, self.works.link)
            line.tell(Message.ABORT, self.driver.untold, _LATE)
            line.close()


async def serve(listener: socket.socket, store: Store) -> None:
    """Take one request and carry it out; nothing, if whoever had us started leaves without one."""
    listener.setblocking(False)
    async with asyncio.timeout(_PATIENCE):
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    if not peer_is_root(connection):
        connection.close()
        return
    reader, writer = await asyncio.open_connection(sock=connection)
    async with Front(StreamLink(reader, writer)) as front:
        with contextlib.suppress(ChannelClosed):
            request = await front.request()
            result, last_word = await migrate(request, front, store)
            front.emit(result)
            await asyncio.to_thread(last_word)
    writer.close()


async def migrate(request: Request, front: Front, store: Store) -> tuple[events.Result, Callable[[], None]]:
    """One migration, from the first connection to its result; and what may be done when the operator knows that."""
    begun = time.monotonic()
    try:
        agent = SourceAgent(request, front, store)
        ended = await agent.run()
    except (EngineError, PhaulError, OSError) as error:
        return events.Result("error", request.pid, reason=str(error)), lambda: None
    rounds = tuple(events.Round(one.pages, one.bytes, one.seconds * 1000) for one in agent.works.history)
    result = events.Result(
        ended.outcome.value,
        agent.pid,
        agent.downtime_ms if ended.outcome is Outcome.MIGRATED else None,
        (time.monotonic() - begun) * 1000,
        rounds,
        sum(one.bytes for one in agent.works.history),
        ended.why,
    )
    return result, agent.tell_late


def _orders(request: Request, found: workloads.Found) -> Orders:
    codec, _, level = request.compress.partition(":")
    wishes = request.wishes
    return Orders(
        root=found.pid,
        workload=request.workload,
        facts=found.facts,
        wanted=Wanted(request.max_downtime / 1000, request.max_rounds, request.bandwidth, request.auto_converge),
        codec={"auto": Codec.AUTO, "none": Codec.RAW, "zstd": Codec.ZSTD}[codec],
        level=int(level or 1),
        verify=request.verify,
        keep_images=request.keep_images,
        peer=request.destination,
        stop_copy=wishes.stop_copy,
        moved=request.moved,
        hauled=request.hauled,
        rooms=found.rooms,
        rsync=request.rsync and rsync.here(),
        subvolumes=request.subvolumes,
        flagged=ATTRIBUTES in request.features,
        options={
            **found.options,
            "tcp": wishes.tcp,
            "shell_job": request.shell_job,
            "pidns": wishes.pidns,
            carried_file.DIRECTORIES: request.carried,
            externals.TREES: request.hauled,
        },
    )


def _own(channel: Channel) -> Match:
    """A connection of our own, whose packets must never be held."""
    with socket.socket(fileno=os.dup(channel.fileno())) as ours:
        local, remote = ours.getsockname(), ours.getpeername()
        return Match(_TCP, local[0], local[1], (remote[0], remote[1]))


def run(listener: int, directory: Path) -> int:
    """The process: see `__main__`."""
    asyncio.run(serve(socket.socket(fileno=listener), Store(directory)))
    return 0

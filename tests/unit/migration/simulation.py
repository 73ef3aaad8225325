"""Migrations on a simulated clock, network and journal: the real drivers and the real recovery, and everything that
may go wrong, drawn from a seed.

A run is deterministic (see clock.py). What a host has of the
program is a word (as in world.py), which works change; `Simulation` raises AssertionError as soon as two copies could
run, or one runs that must not.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from phaul_engine.errors import EngineError

from phaul import asking
from phaul.driver import Driver, WorkFailedError
from phaul.errors import ArbiterError, JournalError, LostRaceError, OverruledError
from phaul.journal import Journal, Row, Task, boot_id
from phaul.migration import Cancel, Done, Ended, Limits, Message, Outcome, Received, Role, Send, State, Verdict, Work
from phaul.migration import Row as Says
from phaul.migration.destination import begin as begin_destination
from phaul.migration.source import begin as begin_source
from phaul.recovery import Recovery
from phaul.transport.direct import Direct, Kind, Letter
from tests.unit.migration.clock import Clock

BOOT = boot_id()
OWNER = Task(pid=os.getpid(), start=0)
REACH = 3.0  # seconds to reach a silent destination
LINGER = 120.0
NOWHERE = {"endpoints": 0}  # what rows say of an arbiter that only `Simulation` knows
FOREVER = 3600.0  # seconds in which everything must be over


class Killed(BaseException):
    """A process ends here."""


class Record:
    """A row, as a Journal has it. `synced` is what a host that went down finds."""

    def __init__(self, role: Role) -> None:
        self.row = Row.model_construct(
            migration="m", role=role, state=Says.PREPARED, boot=BOOT, owner=OWNER, why="", ended=0.0, undo=(), cgroup=""
        )
        self.synced = Says.PREPARED
        self.there = True
        self.broken = False

    @property
    def path(self) -> Record:
        return self

    def exists(self) -> bool:
        return self.there

    def refresh(self) -> Row:
        return self.row

    def transition(self, expected: Says, to: Says, *, why: str = "", **_: Any) -> Row:
        if self.broken:
            raise JournalError("a broken disk")
        if self.row.state is not expected:
            raise LostRaceError("no", state=self.row.state)
        return self._set(state=to, why=why)

    def note(self, **facts: Any) -> Row:
        return self._set(**facts)

    def end(self) -> Row:
        return self._set(ended=1.0)

    def sync(self) -> None:
        self.synced = self.row.state

    def remove(self) -> None:
        self.there = False

    def crash(self) -> None:
        self._set(state=self.synced, boot="another", ended=0.0)

    def _set(self, **facts: Any) -> Row:
        self.row = self.row.model_copy(update=facts)
        return self.row


class End:
    """One end of a connection. `handler` is told of letters where nobody reads."""

    def __init__(self, world: Simulation) -> None:
        self._world = world
        self._inbox: deque[Letter] = deque()
        self._came = asyncio.Event()
        self._last = 0.0
        self.cut = False
        self.other: End | None = None
        self.handler: Callable[[Letter], None] | None = None

    def has_news(self) -> bool:
        """Whether there is anything to take, or never will be."""
        return self.cut or bool(self._inbox)

    def send_protocol(self, message: Message, why: str = "") -> None:
        if self.cut:
            raise EngineError("the connection is gone")
        letter = Letter(Kind.PROTOCOL, json.dumps({"message": message.value, "why": why}).encode())
        arrives = max(self._last, self._world.arrival())
        self._last = arrives
        self._world.clock.call_at(arrives, self._deliver, letter)

    def _deliver(self, letter: Letter) -> None:
        other = self.other
        if other is None or other.cut:
            return
        if self._world.partitioned:
            self._world.clock.call_at(self._world.heals, self._deliver, letter)
            return
        if other.handler is not None:
            other.handler(letter)
        else:
            other._inbox.append(letter)
            other._came.set()

    async def next(self) -> Letter:
        while not self._inbox:
            if self.cut:
                raise EngineError("the peer closed the connection")
            self._came.clear()
            await self._came.wait()
        return self._inbox.popleft()

    def receive(self, timeout: float) -> Letter:
        """The clock stands meanwhile: only what is there already."""
        if not self._inbox:
            raise EngineError("nothing has come")
        return self._inbox.popleft()

    def take(self) -> Letter | None:
        return self._inbox.popleft() if self._inbox else None

    def close(self) -> None:
        """Both ends see it; what is on the way is lost."""
        for end in (self, self.other):
            if end is not None:
                end.cut = True
                end._came.set()


class Host:
    """One side of the world."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.copy = "running" if role is Role.SOURCE else "none"
        self.record: Record | None = None
        self.agent: Agent | None = None
        self.answers_until = 0.0
        self.same_boot = True
        self.tidy = False


class Agent:
    """An agent's process: the driver's party, and what it does when the driver has ended."""

    def __init__(self, world: Simulation, host: Host) -> None:
        self.world, self.host = world, host
        self.link: Any = None
        self.hurried = host.role is Role.DESTINATION
        self.alive = True
        self.ended: Ended | None = None
        self.waiting: deque[End] = deque()
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[Any]] = []
        first = begin_source() if host.role is Role.SOURCE else begin_destination()
        self.driver = Driver(first, cast("Any", self), Limits(), points=self._point)
        self.made = False
        self.start(self.run())

    def start(self, work: Any) -> None:
        self._tasks.append(self.world.clock.create_task(work))

    @property
    def journal(self) -> Journal | None:
        return cast("Journal", self.host.record) if self.made else None

    def _point(self, name: str) -> None:
        if not self.alive:
            raise Killed
        if self.world.dies_here(self.host.role):
            self.kill()
            raise Killed

    def kill(self) -> None:
        """kill -9: what it had parked dies, its connections are reset, its keeper sees it."""
        if not self.alive:
            return
        self.alive = False
        self.host.agent = None
        if self.host.copy == "parked":
            self.host.copy = "dead"
        for end in (self.link, *self.waiting):
            if end is not None:
                end.close()
        work = self.driver._work
        for task in (*self._tasks, *([work] if work is not None else [])):
            task.cancel()
        if self.host.same_boot:
            self.world.clock.call_later(self.world.random.uniform(0.1, 2.0), self.world.recover, self.host, 0)

    def entered(self, state: State) -> None:
        pass

    async def take(self, letter: Letter) -> None:
        raise AssertionError(letter)

    async def do(self, work: Work) -> Done:
        seconds, fails = self.world.fate(work)
        decides = work in (Work.CLAIM, Work.REVOKE)
        if fails == "before":
            raise ArbiterError("no") if decides else OSError(5, "no")
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            if self.alive and fails != "stopped":  # it was in a thread, which went on to its end
                self._effect(work)
            raise
        if not self.alive:
            raise Killed
        self._effect(work)
        if work is Work.FREEZE and self.link is not None:
            self.link.send_protocol(Message.FINAL)
        if fails == "after" and decides:
            raise ArbiterError("no")
        if fails == "after":
            raise WorkFailedError("no", again=work is Work.FREEZE and self.world.random.random() < 0.5)
        return Done(work, self.world.verdict() if work is Work.COPY else None)

    def _effect(self, work: Work) -> None:
        match work:
            case Work.CONNECT:
                self.link = self.world.connect(wait=True)
                if self.link is None:
                    raise EngineError("nobody is there")
                self.start(self.driver.listen(self.link))
            case Work.PREPARE | Work.BUILD:
                self.host.record, self.made = Record(self.host.role), True
                if work is Work.BUILD:
                    self.host.copy = "parked"
                if self.world.arbiter is not None:
                    self.host.record.note(arbiter=NOWHERE)
                    self.driver.arbitrate()
            case _:
                self.world.effect(self.host, work)

    async def reconnect(self) -> None:
        if self.link is not None:
            self.link.close()
        deadline = self.world.clock.now + REACH
        while self.world.clock.now < deadline:
            end = self.world.connect()
            if end is not None:
                self.link = end
                self.start(self.driver.listen(cast("Direct", end)))
                return
            await asyncio.sleep(0.3)

    async def cancelled(self) -> None:
        self.driver.post(Cancel())

    async def run(self) -> None:
        if self.host.role is Role.DESTINATION:
            self.start(self._hear())
        self.ended = await self.driver.run()
        record = self.host.record
        if self.made and record is not None and record.there and not self.ended.unfinished:
            record.end()
        self._leave()

    def _leave(self) -> None:
        """The driver has ended. A destination that said READY still answers, for a while."""
        self.alive = False
        self.host.agent = None
        if self.host.copy == "parked":
            self.host.copy = "dead"
        if self.host.role is Role.DESTINATION and Message.READY in self.driver.sent:
            self.host.answers_until = self.world.clock.now + LINGER
            if self.link is not None and not self.link.cut:
                self.world.answer_on(self.link)
                return
        if self.link is not None:
            self.link.close()

    async def _hear(self) -> None:
        while True:
            while not self.waiting:
                self._news.clear()
                await self._news.wait()
            self.link = self.waiting.popleft()
            await self.driver.listen(self.link)

    def arrive(self, end: End) -> None:
        self.waiting.append(end)
        self._news.set()


class Simulation:
    """One run. `faults` is how many accidents there are."""

    def __init__(self, seed: int, clock: Clock) -> None:
        self.random = random.Random(seed)
        self.clock = clock
        self.begun = clock.now
        self.source, self.destination = Host(Role.SOURCE), Host(Role.DESTINATION)
        self.ran_there = False
        self.by_word = False
        self.heals = 0.0
        self.log: list[str] = []
        self._steps = dict.fromkeys(Role, 0)
        self._deaths: dict[Role, int] = {}
        self._clumsy = 0.0
        self._hosts_stay = True
        own = random.Random(f"arbiter {seed}")  # so that runs without one are what they were
        self.arbiter = own.choice((None, "open"))
        self._away = {role: (own.uniform(0, 30), own.choice((0.0, 0.0, 5.0, 60.0))) for role in Role}
        self._draw(self.random.choice((0, 1, 1, 2, 2, 3, 4)))

    # -- what goes wrong -------------------------------------------------------------------------------------------

    def _draw(self, faults: int) -> None:
        for _ in range(faults):
            at = self.clock.now + self.random.choice((self.random.uniform(0, 3), self.random.uniform(0, 30)))
            role = self.random.choice(list(Role))
            match self.random.choice(("kill", "kill", "kill", "cut", "part", "cancel", "clumsy", "down", "disk")):
                case "kill":
                    self._deaths[role] = self.random.randrange(1, 40)
                case "cut":
                    self.clock.call_at(at, self._cut)
                case "part":
                    self.clock.call_at(at, self._part, self.random.choice((0.5, 3.0, 12.0, 70.0)))
                case "cancel":
                    self.clock.call_at(at, self._cancel)
                case "clumsy":
                    self._clumsy = 0.15
                case "down":
                    self.clock.call_at(at, self._down, self._host(role))
                case "disk":
                    self.clock.call_at(at, self._break, self._host(role))

    def _host(self, role: Role) -> Host:
        return self.source if role is Role.SOURCE else self.destination

    def dies_here(self, role: Role) -> bool:
        self._steps[role] += 1
        return self._deaths.get(role) == self._steps[role]

    def fate(self, work: Work) -> tuple[float, str]:
        """How long a work takes, and whether it fails."""
        seconds = self.random.choice((0.0, 0.001, 0.01, self.random.uniform(0, 2)))
        fails = (
            self.random.choice(("before", "after", "stopped", "slow")) if self.random.random() < self._clumsy else ""
        )
        return (self.random.uniform(1, 80) if fails == "slow" else seconds), fails

    def verdict(self) -> Verdict:
        return self.random.choice((Verdict.ANOTHER, Verdict.SWITCH, Verdict.SWITCH))

    @property
    def partitioned(self) -> bool:
        return self.clock.now < self.heals

    def arrival(self) -> float:
        """When what is sent now comes."""
        return max(self.clock.now, self.heals) + self.random.choice((0.0, 0.0001, 0.01, 0.2))

    def _cut(self) -> None:
        self.log.append(f"{self.clock.now:.2f} cut")
        for host in (self.source, self.destination):
            if host.agent is not None and host.agent.link is not None:
                host.agent.link.close()

    def _part(self, seconds: float) -> None:
        self.log.append(f"{self.clock.now:.2f} no packets for {seconds} s")
        self.heals = self.clock.now + seconds

    def _cancel(self) -> None:
        if self.source.agent is not None:
            self.log.append(f"{self.clock.now:.2f} cancel")
            self.source.agent.driver.post(Cancel())

    def _break(self, host: Host) -> None:
        if host.record is not None:
            self.log.append(f"{self.clock.now:.2f} the disk of {host.role} breaks")
            host.record.broken = True
            self.clock.call_later(20.0, setattr, host.record, "broken", False)

    def _down(self, host: Host) -> None:
        self.log.append(f"{self.clock.now:.2f} {host.role} goes down")
        self._hosts_stay = False
        host.same_boot = False
        if host.agent is not None:
            host.agent.kill()
        host.answers_until = 0.0
        if host.copy != "none":
            host.copy = "dead"
        if host.record is not None:
            host.record.crash()

    # -- the network -----------------------------------------------------------------------------------------------

    def connect(self, *, wait: bool = False) -> End | None:
        """A connection to whoever speaks for the destination; None if nobody does. `wait`: SSH starts an agent."""
        there = self.destination
        if self.partitioned or not there.same_boot:
            return None
        here, far = End(self), End(self)
        here.other, far.other = far, here
        if wait:
            there.agent = Agent(self, there)
        if there.agent is not None:
            there.agent.arrive(far)
        elif self.clock.now < there.answers_until:
            self.answer_on(far)
        else:
            return None
        return here

    def answer_on(self, end: End) -> None:
        """From the row, as whoever listens after the driver does."""

        def decide() -> list[Send]:
            recovery = self._recovery(self.destination, asked=True)
            recovery.run()
            return recovery.sent

        def handler(letter: Letter) -> None:
            record = self.destination.record
            if record is not None and record.there and self.destination.same_boot and not end.cut:
                asking._answered(letter, cast("Any", end), cast("Journal", record), decide)

        end.handler = handler
        while (letter := end.take()) is not None:
            handler(letter)

    # -- works and recovery ----------------------------------------------------------------------------------------

    def do(self, host: Host, work: Work) -> None:
        """A recovery's."""
        self.effect(host, work)

    def _decide(self, role: Role, work: Work) -> None:
        """At the arbiter, if that can be reached from there."""
        begins, lasts = self._away[role]
        if begins <= self.clock.now - self.begun < begins + lasts:
            raise ArbiterError("nobody answers")
        wanted = "resumed" if work is Work.CLAIM else "discarded"
        if self.arbiter == "open":
            self.arbiter = wanted
        if self.arbiter != wanted:
            raise OverruledError(f"it says {self.arbiter}")

    def effect(self, host: Host, work: Work) -> None:
        self.log.append(f"{self.clock.now:.2f} {host.role} {work.name}: {host.copy}")
        record = host.record
        match work:
            case Work.CLAIM | Work.REVOKE:
                self._decide(host.role, work)
            case Work.FREEZE if host.copy == "running":
                host.copy = "frozen"
            case Work.LET_GO | Work.UNDO if host.copy == "frozen":
                assert not self.ran_there or self.by_word, f"what ran there runs here again\n{self}"
                host.copy = "running"
            case Work.RELEASE if host.copy != "none":
                ran = self.ran_there or self.by_word
                assert ran, f"the only copy is killed\n{self}"
                host.copy = "dead"
            case Work.DETACH if host.copy == "parked":
                host.copy = "frozen"
            case Work.WAKE if host.copy == "frozen":
                assert record is not None
                assert record.row.state is Says.RESUMED, f"it runs before it may\n{self}"
                assert self.arbiter in (None, "resumed"), f"the arbiter says {self.arbiter}\n{self}"
                host.copy, self.ran_there = "running", True
            case Work.SYNC if record is not None:
                record.sync()
            case Work.TIDY:
                host.tidy = True
            case Work.FORGET if record is not None:
                record.remove()
            case Work.KILL:
                assert host.copy != "running", f"the copy that runs is killed\n{self}"
                host.copy = "dead" if host.copy != "none" else "none"
        running = [one for one in (self.source, self.destination) if one.copy == "running"]
        assert len(running) < 2, f"two copies run\n{self}"

    def _recovery(self, host: Host, keep: Role | None = None, *, asks: bool = False, asked: bool = False) -> Recovery:
        class Deeds:
            def do(_, work: Work) -> None:
                self.do(host, work)

        journal = cast("Journal", host.record)
        return Recovery(journal, ask=self._ask if asks else None, keep=keep, deeds=Deeds(), asked=asked)

    def recover(self, host: Host, tries: int) -> None:
        """What a keeper does."""
        if host.record is None or not host.same_boot or host.agent is not None:
            return
        if not host.record.there:
            if host.role is Role.DESTINATION and host.copy == "frozen":  # recovery.kill_unknown
                host.copy = "dead"
            return
        before = host.record.row.state
        try:
            ended = self._recovery(host, asks=host.role is Role.SOURCE).run()
        except JournalError:
            if tries < 5:
                self.clock.call_later(0.5 * 2**tries, self.recover, host, tries + 1)
            return
        self.log.append(f"{self.clock.now:.2f} {host.role} recovered from {before}: {ended.outcome}")
        if host.role is Role.DESTINATION and before in (Says.PARKED, Says.RESUMED, Says.DISCARDED):
            host.answers_until = self.clock.now + LINGER

    def _ask(self, message: Message, timeout: float) -> Received | None:
        deadline = self.clock.now + timeout
        while self.clock.now < deadline:
            end = self.connect()
            if end is not None:
                end.send_protocol(message)
                while self.clock.pump(deadline, end.has_news):
                    letter = end.take()
                    if letter is None:
                        break
                    if letter.protocol()[0] in asking._ANSWERS:
                        end.close()
                        return Received(*letter.protocol())
                end.close()
            self.clock.pump(min(deadline, self.clock.now + 0.3), lambda: False)
        return None

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """To the end, and what an operator does then. How it came out, in a word."""
        agent = self.source.agent = Agent(self, self.source)
        self._settle()
        said = agent.ended.outcome if agent.ended is not None else None
        self._check_said(said)
        self._resolve()
        self._check_end()
        return str(said or "killed")

    def _settle(self) -> None:
        """Until nothing happens by itself any more."""
        self.clock.pump(self.begun + FOREVER, lambda: self._quiet())
        assert self._quiet(), f"it does not end\n{self}"
        self.clock.pump(self.clock.now + 400, lambda: False)  # keepers, and answers that linger

    def _quiet(self) -> bool:
        return self.source.agent is None and self.destination.agent is None

    def _check_said(self, said: Outcome | None) -> None:
        if said is Outcome.MIGRATED:
            assert self.ran_there, f"it says migrated\n{self}"
        if said in (Outcome.STAYED, Outcome.CANCELLED) and self.source.same_boot:
            assert self.source.copy == "running", f"it says {said}\n{self}"

    def _resolve(self) -> None:
        """`phaul resolve` on either side; --keep where nobody else knows."""
        self.heals = 0.0
        self._away = dict.fromkeys(Role, (0.0, 0.0))
        for host in (self.destination, self.source):
            if host.record is not None:
                host.record.broken = False
        there = self.destination
        if there.record is not None and there.record.there and not there.record.row.ended:
            self._recovery(there).run()
        here = self.source
        if here.record is None or here.record.row.ended:
            return
        ended = self._recovery_with_answers().run()
        if ended.outcome in (Outcome.IN_DOUBT, Outcome.LOST) and here.copy == "frozen":
            self.by_word = True
            if self.arbiter is not None and there.copy != "running":
                self.arbiter = "discarded"
            self._recovery(here, keep=Role.DESTINATION if there.copy == "running" else Role.SOURCE).run()

    def _recovery_with_answers(self) -> Recovery:
        """As `phaul resolve` does: the destination's desk answers from its row."""

        def ask(message: Message, _: float) -> Received | None:
            there = self.destination.record
            if there is None or not there.there:
                return Received(Message.UNKNOWN)
            if message is not Message.ASK:
                return Received(Message.GOODBYE)
            recovery = self._recovery(self.destination, asked=True)
            recovery.run()
            return Received(recovery.sent[-1].message) if recovery.sent else None

        recovery = self._recovery(self.source)
        recovery._ask = ask
        return recovery

    def _check_end(self) -> None:
        copies = (self.source.copy, self.destination.copy)
        assert copies.count("running") <= 1, f"two copies in the end\n{self}"
        if self._hosts_stay:
            assert copies.count("running") == 1, f"no copy in the end\n{self}"
            assert "frozen" not in copies, f"a copy is left\n{self}"
            assert self.destination.tidy or copies[1] != "running", f"a cgroup is left\n{self}"

    def __str__(self) -> str:
        rows = [host.record.row.state if host.record else None for host in (self.source, self.destination)]
        head = f"copies {self.source.copy}, {self.destination.copy}; rows {rows[0]}, {rows[1]}"
        return "\n".join([head, *self.log[-60:]])


def simulate(seed: int, clock: Clock) -> str:
    """One run. AssertionError tells what went wrong, and the seed."""
    asyncio._set_running_loop(clock)
    try:
        return Simulation(seed, clock).run()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    finally:
        for task in asyncio.all_tasks(clock):
            task.cancel()
        asyncio._set_running_loop(None)

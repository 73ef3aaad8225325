"""The hosts of simulated migrations: what is there of the program, in a word, a row, and an agent with the real
driver."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from phaul_engine.errors import EngineError

from phaul.driver import Driver, WorkFailedError
from phaul.errors import ArbiterError, JournalError, LostRaceError
from phaul.journal import Journal, Row, Task, boot_id
from phaul.migration import Cancel, Done, Ended, Limits, Message, Role, State, Work
from phaul.migration import Row as Says
from phaul.migration.destination import begin as begin_destination
from phaul.migration.source import begin as begin_source
from phaul.transport.direct import Direct, Letter
from tests.unit.migration.network import End

if TYPE_CHECKING:
    from tests.unit.migration.simulation import Simulation

BOOT = boot_id()
OWNER = Task(pid=os.getpid(), start=0)
REACH = 3.0  # seconds to reach a silent destination
LINGER = 120.0  # seconds that a destination answers
NOWHERE = {"endpoints": 0}  # what rows say of an arbiter that only `Simulation` knows


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

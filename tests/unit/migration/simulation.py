"""Migrations on a simulated clock, network and journal: the real drivers and the real recovery, and everything that
may go wrong, drawn from a seed.

A run is deterministic (see clock.py). What a host has of the program is a word (as in world.py), which works change;
`Simulation` raises AssertionError as soon as two copies could run, or one runs that must not. hosts.py has the hosts
with their agents, network.py what is between them.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast

from phaul import asking
from phaul.errors import ArbiterError, JournalError, OverruledError
from phaul.journal import Journal
from phaul.migration import Cancel, Message, Outcome, Received, Role, Send, Verdict, Work
from phaul.migration import Row as Says
from phaul.recovery import Recovery
from phaul.transport.direct import Letter
from tests.unit.migration.clock import Clock
from tests.unit.migration.hosts import LINGER, Agent, Host
from tests.unit.migration.network import End

FOREVER = 3600.0  # seconds in which everything must be over


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

"""Runs the state machine of one side for real: events in, actions out, deadlines kept, one work at a time.

What a work is, is the agents' business (`Party`); when it is done is the machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar, assert_never

from phaul_engine.errors import EngineError
from phaul_engine.memory.stream import DeadlineError

from phaul import faults
from phaul.errors import ArbiterError, JournalError, LostRaceError, OverruledError, PhaulError
from phaul.faults import InjectedError, Points
from phaul.journal import Journal
from phaul.migration import (
    Action,
    Broken,
    Done,
    Ended,
    Event,
    Expired,
    Failed,
    Limits,
    LinkLost,
    Message,
    Outcome,
    Received,
    Refused,
    Row,
    Send,
    Start,
    State,
    Step,
    Swap,
    Swapped,
    Work,
    deadline,
    step,
)
from phaul.transport.direct import Direct, Kind, Letter

_LAST_WORK = 60.0  # seconds that a work may go on when everything is decided
_EAR = 0.005  # seconds that the other side's word is waited for outside of the loop, when the program stands
_EARS = 20  # times, between which the loop has a turn
_AT_ONCE = frozenset({Work.LAND, Work.DETACH, Work.WAKE})  # works of the downtime that wait for nothing in the loop

T = TypeVar("T")


class WorkFailedError(Exception):
    """A work's own judgement of its failure; any other error means that the program stays, and that is all."""

    def __init__(self, why: str, *, outcome: Outcome = Outcome.STAYED, again: bool = False) -> None:
        super().__init__(why)
        self.outcome = outcome
        self.again = again


log = logging.getLogger(__name__)


class Party(Protocol):
    """One side's agent, as its driver needs it."""

    @property
    def journal(self) -> Journal | None:
        """The row, once there is one."""
        ...

    @property
    def link(self) -> Direct | None:
        """The connection to the other agent, once there is one."""
        ...

    @property
    def hurried(self) -> bool:
        """Whether what the other side says next is all that matters."""
        ...

    async def do(self, work: Work) -> Done:
        """Do a work to its end. Cancelled, it must have stopped when it raises CancelledError."""
        ...

    async def take(self, letter: Letter) -> None:
        """Something came that is no message of the protocol. The next one waits until this is over."""
        ...

    async def reconnect(self) -> None:
        """A question is about to be asked over a link that may be gone. Takes its time, but not for long; a link that
        is not made shows when the question is sent."""
        ...

    def entered(self, state: State) -> None:
        """The machine is in another state."""
        ...


async def blocking(act: Callable[[], T], stop: Callable[[], object] = lambda: None) -> T:
    """Run something in a thread. When cancelled, `stop` has it end soon, and it is waited for: nothing that comes after
    runs beside it."""
    future = asyncio.get_running_loop().run_in_executor(None, act)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop()
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        future.exception()  # it is no news that it was called off
        raise


class Driver:
    """One side, from its first step to its end. `post` tells it what happened; to be called in its loop. `heard` are
    the messages that have come so far, `sent` those that left; `untold` is why it was called off, if whoever answers
    for the other side could not be told, and waits for it. `points` are for tests: see phaul.faults."""

    def __init__(self, first: Step, party: Party, limits: Limits | None = None, points: Points = faults.none) -> None:
        self.heard: set[Message] = set()
        self.sent: set[Message] = set()
        self.untold = ""
        self._points = points
        self._cut = False
        self._froze = False
        self._limits = limits or Limits()
        self._party = party
        self._state = first.state
        self._first = first.actions
        self._events: deque[Event] = deque()
        self._ready = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._doing: Work | None = None
        self._due: float | None = None
        self._idle = False  # whether `listen` waits for a letter, and does nothing else
        self._ears = _EARS  # what is left of that in this state
        self._unsaid: list[logging.LogRecord] = []

    def arbitrate(self) -> None:
        """An arbiter has been asked to decide about this migration."""
        self._limits = dataclasses.replace(self._limits, arbiter=True)

    @property
    def state(self) -> State:
        """Where it is."""
        return self._state

    def post(self, event: Event) -> None:
        """Something happened."""
        self._events.append(event)
        self._ready.set()

    def progress(self) -> None:
        """The state's deadline begins anew: something moves."""
        seconds = deadline(self._state, self._limits)
        self._due = None if seconds is None else asyncio.get_running_loop().time() + seconds

    async def listen(self, link: Direct) -> None:
        """Hear the other side until the link ends; then say so. To be run as a task."""
        self._cut = False
        self._idle = True
        try:
            while True:
                letter = await self._at_hand(link) or await link.next()
                self._idle = False
                await self._hear(letter)
                self._idle = True
                if self._events:
                    await asyncio.sleep(0)  # what came is seen to first: to wait for more takes its time
        except (EngineError, OSError) as error:
            self._cut = True
            self.post(LinkLost(str(error)))
        except Exception as error:  # as in `_run`
            log.exception("a mistake where something came")
            self._cut = True
            self.post(LinkLost(f"{type(error).__name__}: {error}"))
        finally:
            self._idle = False

    async def _at_hand(self, link: Direct) -> Letter | None:
        """Where the freeze is about to begin, or has begun, at the other side: what it says next, without the loop."""
        for _ in range(_EARS):
            if self._events or not self._party.hurried:
                break
            try:
                return link.receive(_EAR)
            except DeadlineError:
                await asyncio.sleep(0)
            except (EngineError, OSError):  # `next` will find it too
                break
        return None

    async def _hear(self, letter: Letter) -> None:
        self.progress()
        if letter.kind is Kind.PROTOCOL:
            message, why = letter.protocol()
            self.heard.add(message)
            self.post(Received(message, why))
            return
        await self._party.take(letter)
        if letter.kind is Kind.FINAL:
            self.heard.add(Message.FINAL)
            self.post(Received(Message.FINAL))

    async def _listen_closely(self) -> bool:
        """While the program stands for the other side's word: wait for it here, since to be woken by the loop takes it
        some turns. Whether a letter came, or may come yet; what is wrong with the link, `listen` will find."""
        link, ears, self._ears = self._party.link, self._ears, 0
        if not (self._state.listens and self._idle and ears) or link is None:
            return False
        try:
            letter = link.receive(_EAR)
        except DeadlineError:
            self._ears = ears - 1
            await asyncio.sleep(0)
            return self._ears > 0
        except (EngineError, OSError):
            return False
        try:
            await self._hear(letter)
        except (EngineError, OSError) as error:
            log.warning("%s", error)
            link.channel.shutdown()  # so that `listen` ends
            return False
        return True

    async def run(self) -> Ended:
        """To the end. Tidying up is waited for; any other work has nothing to work for any more."""
        self.progress()
        self._tell()
        self._party.entered(self._state)
        await self._carry_out(self._first)
        while not isinstance(self._state, Ended):
            await self._take(await self._next())
        if self._work is not None:
            if self._doing is not Work.TIDY:
                self._work.cancel()
            await asyncio.wait({self._work}, timeout=_LAST_WORK)
        return self._state

    async def _next(self) -> Event:
        """The next event, or the state's deadline."""
        while not self._events:
            if self._ears and await self._listen_closely():
                continue
            self._ready.clear()
            loop, due = asyncio.get_running_loop(), self._due
            if due is not None and due <= loop.time():
                return Expired()
            alarm = None if due is None else loop.call_at(due, self._ready.set)
            try:
                await self._ready.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()
        return self._events.popleft()

    async def _take(self, event: Event) -> None:
        after = step(self._state, event, self._limits)
        if after.state != self._state:
            self._state, self._ears = after.state, _EARS
            self.progress()
            self._tell()
            self._party.entered(self._state)
        elif isinstance(event, Expired):
            self._due = None  # the state does not care
        await self._carry_out(after.actions)

    def _tell(self) -> None:
        """Log the state; while the program stands, that waits."""
        if not log.isEnabledFor(logging.INFO):
            return
        self._unsaid.append(log.makeRecord(log.name, logging.INFO, __file__, 0, "%s", (self._state,), None))
        if not self._state.stands:
            for record in self._unsaid:
                log.handle(record)
            self._unsaid.clear()

    def _pass(self, point: str, *names: enum.Enum) -> None:
        """A point of phaul.faults. Hardly anybody wants anything there: then it is not even put into words."""
        if self._points is not faults.none:
            self._points(f"{point} {'-'.join(name.name for name in names)}")

    async def _carry_out(self, actions: tuple[Action, ...]) -> None:
        """Do what a step asks for. The result of a swap is taken before anything else."""
        for action in actions:
            match action:
                case Send(message, why):
                    await self._send(message, why)
                case Start(work):
                    self._froze |= work is Work.FREEZE
                    self._doing = work
                    if work in _AT_ONCE:
                        await self._run(work, self._work)
                    else:
                        self._work = asyncio.create_task(self._run(work, self._work))
                case Swap():
                    await self._take(await self._swap(action))
                case _ as never:
                    assert_never(never)

    async def _send(self, message: Message, why: str) -> None:
        try:
            self._pass("before send", message)
            if self._worth_a_link(message):
                await self._party.reconnect()
            if self._party.link is not None:
                self._party.link.send_protocol(message, why)
                self.sent.add(message)
            self._pass("after send", message)
        except (EngineError, InjectedError, OSError) as error:
            if message is Message.ABORT and self._worth_a_link(message):
                self.untold = why or "called off"
            self.post(LinkLost(str(error)))

    def _worth_a_link(self, message: Message) -> bool:
        """Whether to make another connection for a message. A destination that has, or may have, a complete copy waits
        for the source's last word when the link is gone; so does who recovers its row."""
        parked = Message.READY in self.heard or self._froze
        last = message is Message.RELEASED or (message is Message.ABORT and parked)
        return message is Message.ASK or (last and self._cut)

    async def _swap(self, swap: Swap) -> Event:
        if self._party.journal is None and self._work is not None:  # which may be about to make it
            self._work.cancel()
            await asyncio.wait({self._work})
        journal = self._party.journal
        if journal is None:  # the work that makes the row failed before there was one: nothing was touched
            return Swapped(swap.to)
        try:
            self._pass("before row", swap.expected, swap.to)
            journal.transition(swap.expected, swap.to, why=swap.why)
            if swap.sync:
                await blocking(journal.sync)
            self._pass("after row", swap.expected, swap.to)
        except LostRaceError as error:
            return Refused(Row(error.state))
        except (JournalError, InjectedError) as error:
            return Broken(str(error))
        return Swapped(swap.to)

    async def _run(self, work: Work, before: asyncio.Task[None] | None) -> None:
        """One work, after the one before has been stopped."""
        if before is not None and not before.done():
            before.cancel()
            await asyncio.wait({before})
        try:
            self._pass("before work", work)
            event: Event = await self._party.do(work)
            self._pass("after work", work)
        except WorkFailedError as error:
            log.info("%s failed: %s", work.name, error)
            event = Failed(work, str(error), error.outcome, error.again)
        except ArbiterError as error:
            log.info("%s failed: %s", work.name, error)
            event = Failed(work, str(error), again=not isinstance(error, OverruledError))
        except (EngineError, PhaulError, OSError, TimeoutError) as error:
            event = Failed(work, str(error) or f"{work.name.lower()}: {type(error).__name__}")
            log.info("%s failed: %s", work.name, event.why)
        except Exception as error:  # a mistake of ours must not leave the machine waiting, least of all frozen
            log.exception("a mistake in %s", work.name)
            event = Failed(work, f"{work.name.lower()}: {type(error).__name__}: {error}")
        self.post(event)

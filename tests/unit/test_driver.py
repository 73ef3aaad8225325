"""The driver with parties that do nothing, too much, or the wrong thing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from phaul_engine.errors import EngineError
from phaul_engine.memory.stream import DeadlineError

from phaul import driver as driver_module
from phaul.driver import Driver, WorkFailedError, blocking
from phaul.errors import LostRaceError
from phaul.journal import Journal
from phaul.migration import (
    Cancel,
    Done,
    Ended,
    Expired,
    Limits,
    LinkLost,
    Message,
    Outcome,
    Received,
    Refused,
    Row,
    Start,
    State,
    Step,
    Swap,
    Work,
    step,
)
from phaul.migration.destination import Syncing
from phaul.migration.source import Connecting, Frozen, begin
from phaul.transport.direct import Direct, Kind, Letter


class Party:
    """Does what its table says; a work that is not in it succeeds at once."""

    journal: Journal | None = None
    link: Direct | None = None
    hurried = False

    def __init__(self, **works: Callable[[], Awaitable[Any]]) -> None:
        self.works = works
        self.did: list[str] = []
        self.passed: list[str] = []

    async def do(self, work: Work) -> Done:
        self.did.append(work.name)
        act = self.works.get(work.name)
        if act is not None:
            await act()
        return Done(work)

    async def take(self, letter: Letter) -> None:
        raise AssertionError(letter)

    async def reconnect(self) -> None:
        raise AssertionError("nothing was asked")

    def entered(self, state: State) -> None:
        self.passed.append(type(state).__name__)


def run(party: Party, *events: Any, limits: Limits | None = None) -> Ended:
    async def main() -> Ended:
        driver = Driver(begin(), party, limits)
        for event in events:
            asyncio.get_running_loop().call_later(0.05, driver.post, event)
        async with asyncio.timeout(10):
            return await driver.run()

    return asyncio.run(main())


def failing(error: Exception) -> Callable[[], Awaitable[Any]]:
    async def act() -> None:
        raise error

    return act


async def forever() -> None:
    await asyncio.sleep(3600)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError(5, "no"), Outcome.STAYED),
        (WorkFailedError("not this one", outcome=Outcome.REFUSED), Outcome.REFUSED),
        (ZeroDivisionError("a mistake"), Outcome.STAYED),
    ],
)
def test_a_work_that_fails_ends_it_whatever_it_raises(error: Exception, outcome: Outcome) -> None:
    party = Party(CONNECT=failing(error))
    ended = run(party)
    assert ended.outcome is outcome
    assert str(error) in ended.why
    assert party.did == ["CONNECT"]


def test_a_state_that_outlives_its_deadline_is_left() -> None:
    ended = run(Party(CONNECT=forever), limits=Limits(deadlines={"Connecting": 0.05}))
    assert (ended.outcome, ended.why) == (Outcome.STAYED, "no answer in time")


def test_cancel_ends_it_at_once() -> None:
    assert run(Party(CONNECT=forever), Cancel()).outcome is Outcome.CANCELLED


def test_a_superseded_work_is_stopped_before_the_next_begins(tmp_path: Path) -> None:
    order: list[str] = []

    async def prepare() -> None:
        await blocking(lambda: _slow(order))

    async def undo() -> None:
        order.append("undo")

    party = Party(PREPARE=prepare, UNDO=undo)
    welcome = Received(Message.WELCOME)

    async def main() -> Ended:
        driver = Driver(begin(), party)
        asyncio.get_running_loop().call_later(0.05, driver.post, welcome)
        async with asyncio.timeout(30):
            running = asyncio.create_task(driver.run())
            while not order:  # noqa: ASYNC110 - what is waited for is no event
                await asyncio.sleep(0.01)
            driver.post(Cancel())
            return await running

    assert asyncio.run(main()).outcome is Outcome.CANCELLED
    assert order == ["begun", "over", "undo"]
    assert party.passed == ["Connecting", "Greeting", "Examining", "Preparing", "Aborting", "Undoing", "Ended"]


def _slow(order: list[str]) -> None:
    import time

    order.append("begun")
    time.sleep(0.4)
    order.append("over")


class Link:
    """The other side, which says certain things and then no more."""

    def __init__(self, *said: Letter | Exception) -> None:
        self._said = list(said)

    async def next(self) -> Letter:
        one = self._said.pop(0)
        if isinstance(one, Exception):
            raise one
        return one


def hear(party: Party, *said: Letter | Exception) -> Driver:
    """A driver that has listened to the other side until the end."""

    async def main() -> Driver:
        driver = Driver(begin(), party)
        await driver.listen(cast("Direct", Link(*said)))
        return driver

    return asyncio.run(main())


def test_state_beside_messages_goes_to_the_party() -> None:
    class Taking(Party):
        async def take(self, letter: Letter) -> None:
            self.did.append(letter.kind.name)

    party = Taking()
    driver = hear(
        party,
        Letter(Kind.ALIVE, b""),
        Letter(Kind.PROTOCOL, b'{"message":"%s"}' % Message.WELCOME.value.encode()),
        OSError(104, "cut"),
    )
    assert party.did == ["ALIVE"]
    assert driver.heard == {Message.WELCOME}
    assert [type(event).__name__ for event in driver._events] == ["Received", "LinkLost"]


def test_the_final_images_are_a_message_too_once_they_have_been_taken() -> None:
    class Taking(Party):
        async def take(self, letter: Letter) -> None:
            self.did.append(f"{letter.kind.name} after {len(driver_of[0]._events)} events")

    driver_of: list[Driver] = []
    party = Taking()

    async def main() -> None:
        driver_of.append(Driver(begin(), party))
        await driver_of[0].listen(cast("Direct", Link(Letter(Kind.FINAL, b""), OSError(104, "cut"))))

    asyncio.run(main())
    (driver,) = driver_of
    assert party.did == ["FINAL after 0 events"]
    assert driver.heard == {Message.FINAL}
    assert driver._events[0] == Received(Message.FINAL)


@pytest.mark.parametrize(
    "said",
    [
        Letter(Kind.PROTOCOL, b"nonsense"),
        Letter(Kind.PROTOCOL, b"[" * 5000),
        Letter(Kind.PROTOCOL, b"[]"),
        Letter(Kind.PROTOCOL, b'{"message":"EXPLODE"}'),
        Letter(Kind.PROTOCOL, b'{"message":["READY"]}'),
        EngineError("a message of unknown kind"),
        ZeroDivisionError("a mistake of ours"),
    ],
)
def test_nonsense_from_the_other_side_is_the_end_of_the_link(said: Letter | Exception) -> None:
    (event,) = hear(Party(), said)._events
    assert isinstance(event, LinkLost)


def test_a_row_that_somebody_else_has_changed_is_refused() -> None:
    class Lost:
        def transition(self, *_: object, **__: object) -> None:
            raise LostRaceError("no longer", state=Row.ABORTED)

    party = Party()
    party.journal = cast("Journal", Lost())
    driver = Driver(begin(), party)
    assert isinstance(driver.state, Connecting)
    assert asyncio.run(driver._swap(Swap(Row.PREPARED, Row.FROZEN))) == Refused(Row.ABORTED)


class Rows:
    """A row that takes every change."""

    def __init__(self) -> None:
        self.changes: list[str] = []

    def transition(self, expected: Row, to: Row, **_: object) -> None:
        self.changes.append(f"{expected.name}-{to.name}")


class Ear:
    """A link on which this is said while the program stands, when it is listened to outside of the loop; `late` times
    it was not yet there."""

    def __init__(self, said: Letter | Exception, late: int = 0) -> None:
        self.said = said
        self.late = late
        self.cut = False
        self.sent: list[Message] = []
        self.channel = self

    async def next(self) -> Letter:
        await asyncio.sleep(3600)
        raise AssertionError

    def receive(self, timeout: float) -> Letter:
        if self.late:
            self.late -= 1
            raise DeadlineError("nothing yet")
        if isinstance(self.said, Exception):
            raise self.said
        return self.said

    def shutdown(self) -> None:
        self.cut = True

    def send_protocol(self, message: Message, why: str = "") -> None:
        self.sent.append(message)


def protocol(message: Message) -> Letter:
    return Letter(Kind.PROTOCOL, b'{"message":"%s"}' % message.value.encode())


@pytest.mark.parametrize(
    ("said", "came", "cut"),
    [
        (protocol(Message.READY), True, False),
        (Letter(Kind.PROTOCOL, b"nonsense"), False, True),
        (EngineError("nothing has come"), False, False),
    ],
)
def test_while_the_program_stands_the_other_side_is_listened_to_without_the_loop(
    said: Letter | Exception, came: bool, cut: bool
) -> None:
    async def main() -> tuple[bool, bool, set[Message]]:
        link, party = Ear(said), Party()
        party.link = cast("Direct", link)
        driver = Driver(Step(Frozen()), party)
        listening = asyncio.create_task(driver.listen(party.link))
        await asyncio.sleep(0)
        heard = await driver._listen_closely()
        assert not await driver._listen_closely(), "once in each state"
        listening.cancel()
        return heard, link.cut, driver.heard

    assert asyncio.run(main()) == (came, cut, {Message.READY} if came else set())


@pytest.mark.parametrize(("late", "came"), [(0, True), (19, True), (20, False)])
def test_it_is_listened_for_a_while_in_which_the_loop_has_its_turns(late: int, came: bool) -> None:
    turns: list[int] = []

    async def main() -> tuple[set[Message], int]:
        link, party, loop = Ear(protocol(Message.READY), late), Party(), asyncio.get_running_loop()
        party.link = cast("Direct", link)
        driver = Driver(Step(Frozen()), party)
        listening = asyncio.create_task(driver.listen(party.link))
        await asyncio.sleep(0)
        loop.call_soon(turns.append, 1)
        while not driver.heard and await driver._listen_closely():
            pass
        listening.cancel()
        return driver.heard, len(turns)

    assert asyncio.run(main()) == ({Message.READY} if came else set(), 1 if late else 0)


def test_before_and_in_the_freeze_the_source_is_listened_to_without_the_loop() -> None:
    """Until something has come that is to be seen to; that it has not come yet, or never will, ends nothing."""

    class Hurried(Party):
        hurried = True

        async def take(self, letter: Letter) -> None:
            self.did.append(letter.kind.name)
            self.hurried = letter.kind is not Kind.FINAL

    class Line(Ear):
        def receive(self, timeout: float) -> Letter:
            super().receive(timeout)
            return Letter(Kind.FINAL if party.did else Kind.ROUND, b"")

    party = Hurried()

    async def main() -> Driver:
        driver = Driver(begin(), party)
        listening = asyncio.create_task(driver.listen(cast("Direct", Line(Letter(Kind.ROUND, b""), late=3))))
        async with asyncio.timeout(10):
            await driver._ready.wait()
        listening.cancel()
        return driver

    assert list(asyncio.run(main())._events) == [Received(Message.FINAL)]
    assert party.did == ["ROUND", "FINAL"]


def test_while_the_program_stands_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """But it is afterwards, and in order."""
    seen: list[tuple[str, int]] = []

    class Watching(Party):
        def entered(self, state: State) -> None:
            seen.append((type(state).__name__, len(caplog.records)))

    party = Watching()
    party.journal = cast("Journal", Rows())
    party.link = cast("Direct", Ear(protocol(Message.READY)))

    async def main() -> Ended:
        driver, loop = Driver(Step(Frozen()), party), asyncio.get_running_loop()
        assert party.link is not None
        listening = loop.create_task(driver.listen(party.link))
        await asyncio.sleep(0)
        for after, message in enumerate((Message.RESUMED, Message.GOODBYE), 1):
            loop.call_later(after * 0.05, driver.post, Received(message))
        async with asyncio.timeout(10):
            ended = await driver.run()
        listening.cancel()
        return ended

    with caplog.at_level(logging.INFO, "phaul.driver"):
        assert asyncio.run(main()).outcome is Outcome.MIGRATED
    told = [name for name, _ in seen]
    assert told == ["Frozen", "Committing", "Committed", "Granting", "Releasing", "Parting", "Ended"]
    assert [count for _, count in seen] == [0, 0, 0, 4, 5, 6, 7]
    assert [record.getMessage().partition("(")[0] for record in caplog.records] == told
    assert cast("Rows", party.journal).changes == ["FROZEN-COMMITTED", "COMMITTED-RELEASED"]


def test_a_deadline_that_a_state_does_not_care_for_passes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expired: list[State] = []

    def counting(state: State, event: Any, limits: Limits) -> Step:
        if isinstance(event, Expired):
            expired.append(state)
        return step(state, event, limits)

    async def slowly() -> None:
        await asyncio.sleep(0.3)

    monkeypatch.setattr(driver_module, "step", counting)
    party = Party(SYNC=slowly, TIDY=failing(OSError(5, "no")))

    async def main() -> Ended:
        driver = Driver(Step(Syncing(), (Start(Work.SYNC),)), party, Limits(deadlines={"Syncing": 0.01, "Resumed": 1}))
        async with asyncio.timeout(10):
            return await driver.run()

    assert asyncio.run(main()).unfinished
    assert [type(state).__name__ for state in expired] == ["Syncing", "Resumed"]

"""What the state machines may do only when: every step that any state takes upon any event."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from phaul.migration import (
    Action,
    Broken,
    Cancel,
    Done,
    Ended,
    Event,
    Expired,
    Failed,
    Keep,
    Limits,
    LinkLost,
    Message,
    Received,
    Refused,
    Role,
    Row,
    Send,
    Start,
    State,
    Swap,
    Swapped,
    Verdict,
    Work,
    states,
    step,
)
from phaul.migration.destination import Claiming, Forgetting, Resumed, Syncing, Waking
from phaul.migration.source import Arbitrating, Copying, Freezing, Releasing, Undoing

EVENTS: list[Event] = [
    *(Received(message) for message in Message),
    *(Done(work) for work in Work),
    *(Done(Work.COPY, verdict) for verdict in Verdict),
    *(Failed(work, again=again) for work in Work for again in (False, True)),
    *(Swapped(row) for row in Row),
    *(Refused(row) for row in Row),
    *(Keep(role) for role in Role),
    Broken(),
    Expired(),
    LinkLost(),
    Cancel(),
]


def every_state() -> Iterator[State]:
    """Each kind, and with either value what it has of flags."""
    for kind in states():
        if "held" in kind.__dataclass_fields__:
            yield from (kind(held=row) for row in Row)  # type: ignore[call-arg]
            continue
        flags = [name for name, field in kind.__dataclass_fields__.items() if field.type == "bool"]
        for values in itertools.product((False, True), repeat=len(flags)):
            yield kind(**dict(zip(flags, values, strict=True)))


def acts() -> Iterator[tuple[State, Event, Action]]:
    limits = (Limits(), Limits(arbiter=True))
    for state, event, limit in itertools.product(every_state(), EVENTS, limits):
        for action in step(state, event, limit).actions:
            yield state, event, action


def test_no_disk_is_waited_for_while_the_program_stands() -> None:
    """From the row FROZEN, which is written before the stop, to the thaw at the destination."""
    for state, event, action in acts():
        if isinstance(action, Swap) and action.sync:
            assert isinstance(state, Copying), (state, event, action)
        if action == Start(Work.SYNC):
            assert (type(state), event) == (Waking, Done(Work.WAKE)), (state, event)


def test_nothing_is_heard_of_the_copy_before_its_row_says_resumed() -> None:
    for state, event, action in acts():
        if action == Start(Work.WAKE):
            decided = event in (Swapped(Row.RESUMED), Refused(Row.RESUMED)) or isinstance(state, Waking)
            assert decided, (state, event)
        if action == Send(Message.RESUMED):  # and that is on the disk
            assert isinstance(state, (Syncing, Resumed)), (state, event)


def test_the_row_says_committed_before_commit_leaves() -> None:
    for state, event, action in acts():
        if action == Send(Message.COMMIT):
            assert event == Swapped(Row.COMMITTED), (state, event)


def test_the_row_says_aborted_before_the_program_is_set_going() -> None:
    for state, event, action in acts():
        if action == Start(Work.UNDO):
            decided = event in (Swapped(Row.ABORTED), Refused(Row.ABORTED)) or isinstance(state, Undoing)
            assert decided, (state, event)


def test_the_row_says_released_before_the_frozen_copy_is_killed() -> None:
    for state, event, action in acts():
        if action == Start(Work.RELEASE):
            decided = event in (Swapped(Row.RELEASED), Refused(Row.RELEASED)) or isinstance(state, Releasing)
            assert decided, (state, event)


def test_the_destination_remembers_until_the_source_is_known_to_know() -> None:
    for state, event, action in acts():
        if isinstance(action, Swap) and (action.expected, action.to) == (Row.RESUMED, Row.RELEASED):
            assert event == Received(Message.RELEASED) or isinstance(state, Forgetting), (state, event)


def test_a_freeze_has_a_deadline_and_lets_go() -> None:
    assert Freezing.seconds is not None
    after = step(Freezing(), Failed(Work.FREEZE, again=True), Limits())
    assert after.actions == (Start(Work.LET_GO),)
    assert not isinstance(step(Freezing(), Expired(), Limits()).state, Ended), "the row is told first"


def test_a_source_that_goes_on_ends_a_claim() -> None:
    """Whatever the arbiter would have said: it may not answer, and nobody else will tell."""
    after = step(Claiming(), Received(Message.ABORT, "it goes on"), Limits(arbiter=True))
    assert after.actions == (Swap(Row.PARKED, Row.DISCARDED, "it goes on"),)


def test_an_arbiter_that_does_not_answer_is_asked_again() -> None:
    limits = Limits(arbiter=True)
    state: State = Arbitrating()
    for _ in range(limits.tries - 1):
        after = step(state, Failed(Work.REVOKE, again=True), limits)
        assert after.actions == (Start(Work.REVOKE),)
        state = after.state
    assert isinstance(step(state, Failed(Work.REVOKE, again=True), limits).state, Ended)

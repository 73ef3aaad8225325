"""The destination's side: states and transitions. Its row decides which copy goes on, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .machine import (
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
    handles,
)


@dataclass(frozen=True)
class Listening(State):
    """Started by SSH; nothing has been said."""

    seconds: ClassVar[float | None] = 15.0


@dataclass(frozen=True)
class Welcomed(State):
    """Answers questions of the preflight."""

    seconds: ClassVar[float | None] = 120.0


@dataclass(frozen=True)
class Building(State):
    """The row is written, PIDs are reserved, the skeleton tree is built."""

    seconds: ClassVar[float | None] = 60.0
    row: ClassVar[Row | None] = Row.PREPARED


@dataclass(frozen=True)
class Filling(State):
    """Rounds of pages come in. The deadline is for silence."""

    seconds: ClassVar[float | None] = 60.0
    row: ClassVar[Row | None] = Row.PREPARED


@dataclass(frozen=True)
class Landing(State):
    """The last pages and objects; every task is parked. A dead agent leaves nothing behind (EXITKILL)."""

    seconds: ClassVar[float | None] = 10.0
    row: ClassVar[Row | None] = Row.PREPARED
    stands: ClassVar[bool] = True


@dataclass(frozen=True)
class Parking(State):
    """The row is told that the copy is complete."""

    row: ClassVar[Row | None] = Row.PREPARED
    stands: ClassVar[bool] = True


@dataclass(frozen=True)
class Parked(State):
    """READY. The copy cannot run, and nothing of it has been heard."""

    seconds: ClassVar[float | None] = 10.0
    row: ClassVar[Row | None] = Row.PARKED
    stands: ClassVar[bool] = True
    listens: ClassVar[bool] = True


@dataclass(frozen=True)
class Detaching(State):
    """COMMIT has come: the tasks are let go of, in their frozen cgroup."""

    seconds: ClassVar[float | None] = 5.0
    row: ClassVar[Row | None] = Row.PARKED
    stands: ClassVar[bool] = True


@dataclass(frozen=True)
class Claiming(State):
    """Only with an arbiter: it is told that the program goes on here, before the row is. It may know before we do, so
    the source's silence is no reason to give up: only the arbiter's answer is, or the source's word that it goes on."""

    seconds: ClassVar[float | None] = 5.0
    row: ClassVar[Row | None] = Row.PARKED
    tries: int = 1


@dataclass(frozen=True)
class Recalling(State):
    """Only with an arbiter: whoever finds a copy that is not decided asks for it never to run. The dead agent may have
    been faster. `asked`: by the source, which acts on our answer and no other."""

    seconds: ClassVar[float | None] = 10.0
    row: ClassVar[Row | None] = Row.PARKED
    asked: bool = False


@dataclass(frozen=True)
class Deciding(State):
    """The row is told that the program goes on here. This is the one decision."""

    row: ClassVar[Row | None] = Row.PARKED
    stands: ClassVar[bool] = True


@dataclass(frozen=True)
class Waking(State):
    """The network is taken over, then the tree is thawed."""

    row: ClassVar[Row | None] = Row.RESUMED
    stands: ClassVar[bool] = True
    tries: int = 1


@dataclass(frozen=True)
class Syncing(State):
    """The program runs; the row goes to the disk before anybody is told."""

    row: ClassVar[Row | None] = Row.RESUMED


@dataclass(frozen=True)
class Resumed(State):
    """The source has been told. The row stays until the source has said RELEASED. `tidy`: the tree has been given back
    to an ordinary cgroup."""

    seconds: ClassVar[float | None] = 60.0
    row: ClassVar[Row | None] = Row.RESUMED
    tidy: bool = False
    tries: int = 1


@dataclass(frozen=True)
class Forgetting(State):
    """Both know; the row is told so."""

    row: ClassVar[Row | None] = Row.RESUMED
    tidy: bool = False
    tries: int = 1


@dataclass(frozen=True)
class Tidying(State):
    """Both know, and something of the migration is still beside the program."""

    seconds: ClassVar[float | None] = 10.0
    row: ClassVar[Row | None] = Row.RELEASED
    tries: int = 1


@dataclass(frozen=True)
class Discarding(State):
    """The row is told that the copy never runs, before anybody is. `held` is what it said before."""

    held: Row
    why: str = ""
    tries: int = 1


@dataclass(frozen=True)
class Withdrawing(State):
    """The row cannot be written: without it the answer is "unknown", which decides nothing."""

    row: ClassVar[Row | None] = Row.PARKED
    why: str = ""


@dataclass(frozen=True)
class Killing(State):
    """Nothing of the copy may live when the source is told. `mute`: the row may say otherwise, so nobody is told."""

    seconds: ClassVar[float | None] = 10.0
    row: ClassVar[Row | None] = Row.DISCARDED
    why: str = ""
    tries: int = 1
    mute: bool = False


def begin() -> Step:
    """A new agent."""
    return Step(Listening())


def answer(row: Row | None, *, same_boot: bool, arbiter: bool = False) -> Step:
    """A source asks. An undecided row is decided by it; no row decides nothing."""
    if row is None:
        return Step(Ended(Outcome.ERROR, "there is no such migration here"), (Send(Message.UNKNOWN),))
    return recover(row, same_boot=same_boot, arbiter=arbiter, asked=True)


def recover(row: Row, *, same_boot: bool, arbiter: bool = False, asked: bool = False) -> Step:
    """A row whose owner is dead. What is sent goes to the source that asks, if one does (`asked`)."""
    match row:
        case Row.PARKED if same_boot and arbiter:
            return Step(Recalling(asked), (Start(Work.REVOKE),))
        case Row.PREPARED | Row.PARKED if same_boot:
            return _discard(row, "the agent at the destination ended")
        case Row.PREPARED | Row.PARKED:
            why = "this host went down before it was decided whether the program goes on here"
            return Step(Ended(Outcome.IN_DOUBT, why, unfinished=True), (Send(Message.DEAD, why),))
        case Row.RESUMED if same_boot:
            return _wake()
        case Row.RESUMED:
            why = "this host went down after the program had gone on here"
            return Step(Ended(Outcome.LOST, why, unfinished=True), (Send(Message.GONE, why),))
        case Row.DISCARDED:
            return _kill("discarded")
        case _ if same_boot:
            return _part()
        case _:
            return Step(Ended(Outcome.MIGRATED), (Send(Message.GOODBYE),))


def _part() -> Step:
    return Step(Tidying(), (Send(Message.GOODBYE), Start(Work.TIDY)))


def _discard(held: Row, why: str, tries: int = 1) -> Step:
    return Step(Discarding(held, why, tries), (Swap(held, Row.DISCARDED, why),))


def _kill(why: str, tries: int = 1, mute: bool = False) -> Step:
    return Step(Killing(why, tries, mute), (Start(Work.KILL),))


def _wake(tries: int = 1) -> Step:
    return Step(Waking(tries), (Start(Work.WAKE),))


def _trouble(event: Event) -> str | None:
    """What ends a copy that is not committed to."""
    match event:
        case Received(Message.ABORT, why):
            return why or "the source gave up"
        case Received(Message.ASK):
            return "the source asked before it was decided"
        case Failed(_, why) | Broken(why):
            return why
        case Expired():
            return "the source fell silent"
        case LinkLost(why):
            return why or "the connection broke"
        case _:
            return None


def _untouched(event: Event) -> Step | None:
    why = _trouble(event)
    return None if why is None else Step(Ended(Outcome.STAYED, why), (Send(Message.DISCARDED, why),))


@handles(Listening)
def _listening(_: Listening, event: Event, limits: Limits) -> Step | None:
    if isinstance(event, Received) and event.message is Message.HELLO:
        return Step(Welcomed(), (Send(Message.WELCOME),))
    return _untouched(event)


@handles(Welcomed)
def _welcomed(_: Welcomed, event: Event, limits: Limits) -> Step | None:
    if isinstance(event, Received) and event.message is Message.PREPARE:
        return Step(Building(), (Start(Work.BUILD),))
    return _untouched(event)


@handles(Building)
def _building(_: Building, event: Event, limits: Limits) -> Step | None:
    if event == Done(Work.BUILD):
        return Step(Filling(), (Send(Message.PREPARED),))
    return _undecided(Row.PREPARED, event)


@handles(Filling)
def _filling(_: Filling, event: Event, limits: Limits) -> Step | None:
    if isinstance(event, Received) and event.message is Message.FINAL:
        return Step(Landing(), (Start(Work.LAND),))
    return _undecided(Row.PREPARED, event)


@handles(Landing)
def _landing(_: Landing, event: Event, limits: Limits) -> Step | None:
    if event == Done(Work.LAND):
        return Step(Parking(), (Swap(Row.PREPARED, Row.PARKED),))
    return _undecided(Row.PREPARED, event)


@handles(Parking)
def _parking(_: Parking, event: Event, limits: Limits) -> Step | None:
    match event:
        case Swapped(Row.PARKED):
            return Step(Parked(), (Send(Message.READY),))
        case Refused(actual):
            return _decided(actual)
        case Broken(why):
            return _discard(Row.PREPARED, why)
    return None


@handles(Parked)
def _parked(_: Parked, event: Event, limits: Limits) -> Step | None:
    if isinstance(event, Received) and event.message is Message.COMMIT:
        return Step(Detaching(), (Start(Work.DETACH),))
    return _undecided(Row.PARKED, event)


def _undecided(held: Row, event: Event) -> Step | None:
    why = _trouble(event)
    return None if why is None else _discard(held, why)


@handles(Detaching)
def _detaching(_: Detaching, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.DETACH) if limits.arbiter:
            return Step(Claiming(), (Start(Work.CLAIM),))
        case Done(Work.DETACH):
            return _resume()
        case Failed(Work.DETACH, why):
            return _discard(Row.PARKED, why)
        case Expired():
            return _discard(Row.PARKED, "the tasks were not let go of in time")
    return None


def _resume() -> Step:
    return Step(Deciding(), (Swap(Row.PARKED, Row.RESUMED),))


@handles(Claiming)
def _claiming(state: Claiming, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.CLAIM):
            return _resume()
        case Failed(Work.CLAIM, why, _, False):
            return _discard(Row.PARKED, why or "the arbiter has decided for the source")
        case Received(Message.ABORT, why):
            return _discard(Row.PARKED, why or "the source goes on")
        case Failed(Work.CLAIM) | Expired() if state.tries < limits.tries:
            return Step(Claiming(state.tries + 1), (Start(Work.CLAIM),))
        case Failed(Work.CLAIM) | Expired():
            why = "the arbiter does not answer, and may have decided; the copy here is frozen"
            return Step(Ended(Outcome.IN_DOUBT, why, unfinished=True))
    return None


@handles(Recalling)
def _recalling(state: Recalling, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.REVOKE):
            return _discard(Row.PARKED, "the agent at the destination ended")
        case Failed(Work.REVOKE, _, _, False):
            return _resume()
        case Failed(Work.REVOKE) | Expired() if state.asked:
            return _discard(Row.PARKED, "the source asked before it was decided")
        case Failed(Work.REVOKE) | Expired():
            why = "the arbiter does not answer, and may have decided; the copy here is frozen"
            return Step(Ended(Outcome.IN_DOUBT, why, unfinished=True))
    return None


@handles(Deciding)
def _deciding(_: Deciding, event: Event, limits: Limits) -> Step | None:
    match event:
        case Swapped(Row.RESUMED):
            return _wake()
        case Refused(actual):
            return _decided(actual)
        case Broken(why):
            return _discard(Row.PARKED, why)
    return None


@handles(Waking)
def _waking(state: Waking, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.WAKE):
            return Step(Syncing(), (Start(Work.SYNC),))
        case Failed(Work.WAKE) if state.tries < limits.tries:
            return _wake(state.tries + 1)
        case Failed(Work.WAKE, why):
            return Step(Ended(Outcome.ERROR, why, unfinished=True))  # unanswered: the source keeps its copy
    return None


@handles(Syncing)
def _syncing(_: Syncing, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.SYNC) | Failed(Work.SYNC):  # it runs here either way; only a host's crash could tell
            return Step(Resumed(), (Send(Message.RESUMED), Start(Work.TIDY)))
    return None


@handles(Resumed)
def _resumed(state: Resumed, event: Event, limits: Limits) -> Step | None:
    match event:
        case Received(Message.ASK | Message.COMMIT):
            return Step(state, (Send(Message.RESUMED),))
        case Received(Message.RELEASED):
            return _forget(state.tidy)
        case Done(Work.TIDY):
            return Step(Resumed(tidy=True))
        case Failed(Work.TIDY) if state.tries < limits.tries:
            return Step(Resumed(tries=state.tries + 1), (Start(Work.TIDY),))
        case Expired() | LinkLost():
            return Step(Ended(Outcome.MIGRATED, "the source has not said that it knows", unfinished=True))
    return None


def _forget(tidy: bool, tries: int = 1) -> Step:
    return Step(Forgetting(tidy, tries), (Swap(Row.RESUMED, Row.RELEASED),))


@handles(Forgetting)
def _forgetting(state: Forgetting, event: Event, limits: Limits) -> Step | None:
    match event:
        case Swapped(Row.RELEASED) | Refused(Row.RELEASED) if state.tidy:
            return Step(Ended(Outcome.MIGRATED), (Send(Message.GOODBYE),))
        case Swapped(Row.RELEASED) | Refused(Row.RELEASED):
            return _part()
        case Broken() if state.tries < limits.tries:
            return _forget(state.tidy, state.tries + 1)
        case Refused() | Broken():
            return Step(Ended(Outcome.MIGRATED, "the journal cannot be written", unfinished=True))
    return None


@handles(Tidying)
def _tidying(state: Tidying, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.TIDY):
            return Step(Ended(Outcome.MIGRATED))
        case Failed(Work.TIDY) | Expired() if state.tries < limits.tries:
            return Step(Tidying(state.tries + 1), (Start(Work.TIDY),))
        case Failed(Work.TIDY, why):
            return Step(Ended(Outcome.MIGRATED, why, unfinished=True))
        case Expired():
            return Step(Ended(Outcome.MIGRATED, "what is left of the migration cannot be removed", unfinished=True))
    return None


@handles(Discarding)
def _discarding(state: Discarding, event: Event, limits: Limits) -> Step | None:
    match event:
        case Swapped(Row.DISCARDED):
            return _kill(state.why)
        case Refused(actual):
            return _decided(actual)
        case Broken() if state.tries < limits.tries:
            return _discard(state.held, state.why, state.tries + 1)
        case Broken(why):
            return Step(Withdrawing(why), (Start(Work.FORGET),))
    return None


@handles(Withdrawing)
def _withdrawing(state: Withdrawing, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.FORGET):
            return _kill(state.why)
        case Failed(Work.FORGET):
            return _kill(state.why, mute=True)
    return None


@handles(Killing)
def _killing(state: Killing, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.KILL) if state.mute:
            return Step(Ended(Outcome.ERROR, state.why, unfinished=True))
        case Done(Work.KILL):
            return Step(Ended(Outcome.STAYED, state.why), (Send(Message.DISCARDED, state.why),))
        case Failed(Work.KILL) | Expired() if state.tries < limits.tries:
            return _kill(state.why, state.tries + 1, state.mute)
        case Failed(Work.KILL) | Expired():
            why = "the discarded copy does not die; it is frozen and never runs"
            return Step(Ended(Outcome.ERROR, why, unfinished=True))
    return None


def _decided(actual: Row) -> Step:
    """Someone else has changed the row: do what it says."""
    match actual:
        case Row.DISCARDED:
            return _kill("discarded by another process")
        case Row.RESUMED:
            return _wake()
        case Row.RELEASED:
            return _part()
        case _:
            return _discard(actual, f"the journal says {actual}")

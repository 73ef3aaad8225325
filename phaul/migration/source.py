"""The source's side: states and transitions. Until its row says COMMITTED, every failure ends in the program going
on here; from then on the destination's answer alone decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .machine import (
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
    Outcome,
    Received,
    Refused,
    Role,
    Row,
    Send,
    Start,
    State,
    Step,
    Swap,
    Swapped,
    Verdict,
    Work,
    handles,
)


@dataclass(frozen=True)
class Connecting(State):
    """Reaching the other host."""

    seconds: ClassVar[float | None] = 60.0


@dataclass(frozen=True)
class Greeting(State):
    """HELLO has been sent."""

    seconds: ClassVar[float | None] = 15.0


@dataclass(frozen=True)
class Examining(State):
    """Both hosts are asked what speaks against it; nothing has been touched."""

    seconds: ClassVar[float | None] = 60.0


@dataclass(frozen=True)
class Preparing(State):
    """The tree gets its cgroup, the journal its row."""

    seconds: ClassVar[float | None] = 60.0
    row: ClassVar[Row | None] = Row.PREPARED


@dataclass(frozen=True)
class Waiting(State):
    """The destination builds the tree."""

    seconds: ClassVar[float | None] = 60.0
    row: ClassVar[Row | None] = Row.PREPARED


@dataclass(frozen=True)
class Copying(State):
    """Rounds of pages. The deadline is for a round without progress. `freezes` counts those that were let go."""

    seconds: ClassVar[float | None] = 30.0
    row: ClassVar[Row | None] = Row.PREPARED
    round: int = 0
    freezes: int = 0


@dataclass(frozen=True)
class Arming(State):
    """The row is told that the program may be frozen from now on."""

    seconds: ClassVar[float | None] = 15.0
    row: ClassVar[Row | None] = Row.PREPARED
    round: int = 0
    freezes: int = 0


@dataclass(frozen=True)
class Freezing(State):
    """The program stops; what is left is sent. `ready`: the destination has already said so."""

    seconds: ClassVar[float | None] = 10.0
    row: ClassVar[Row | None] = Row.FROZEN
    stands: ClassVar[bool] = True
    round: int = 0
    freezes: int = 0
    ready: bool = False


@dataclass(frozen=True)
class Relenting(State):
    """A freeze took too long: all goes on here, and is tried again after another round. First the program, then the
    row: a row that says FROZEN claims less."""

    seconds: ClassVar[float | None] = 10.0
    row: ClassVar[Row | None] = Row.FROZEN
    round: int = 0
    freezes: int = 0


@dataclass(frozen=True)
class Frozen(State):
    """Everything has been sent; the destination is completing its copy."""

    seconds: ClassVar[float | None] = 10.0
    row: ClassVar[Row | None] = Row.FROZEN
    stands: ClassVar[bool] = True
    listens: ClassVar[bool] = True


@dataclass(frozen=True)
class Committing(State):
    """The row is told that the destination decides from now on. `here` is false when this host went down with the
    program: its row says FROZEN, but a COMMITTED that never reached the disk may have stood there."""

    row: ClassVar[Row | None] = Row.FROZEN
    stands: ClassVar[bool] = True
    here: bool = True


@dataclass(frozen=True)
class Committed(State):
    """COMMIT may have been sent: only the destination's answer counts. `asks` counts the questions after silence;
    `here` is false when this host went down meanwhile, and the frozen copy with it."""

    seconds: ClassVar[float | None] = 5.0
    row: ClassVar[Row | None] = Row.COMMITTED
    stands: ClassVar[bool] = True
    asks: int = 0
    here: bool = True


@dataclass(frozen=True)
class Arbitrating(State):
    """Only with an arbiter, and where the destination says nothing, or nothing of use: it is asked to decide for us.
    That it decided for the destination is no reason to kill the copy here: that host may be down."""

    seconds: ClassVar[float | None] = 10.0
    row: ClassVar[Row | None] = Row.COMMITTED
    why: str = ""
    tries: int = 1


@dataclass(frozen=True)
class Granting(State):
    """The program runs there: the row is told so before the copy here is killed."""

    row: ClassVar[Row | None] = Row.COMMITTED
    here: bool = True
    tries: int = 1


@dataclass(frozen=True)
class Releasing(State):
    """The frozen copy goes away."""

    seconds: ClassVar[float | None] = 30.0
    row: ClassVar[Row | None] = Row.RELEASED
    tries: int = 1


@dataclass(frozen=True)
class Parting(State):
    """The destination is told that it need not remember."""

    seconds: ClassVar[float | None] = 5.0
    row: ClassVar[Row | None] = Row.RELEASED
    tries: int = 1


@dataclass(frozen=True)
class Aborting(State):
    """The row is told that the program goes on here, before it does. `held` is what it said before."""

    held: Row
    outcome: Outcome = Outcome.STAYED
    why: str = ""
    tries: int = 1


@dataclass(frozen=True)
class Undoing(State):
    """The program is set going here."""

    seconds: ClassVar[float | None] = 30.0
    row: ClassVar[Row | None] = Row.ABORTED
    outcome: Outcome = Outcome.STAYED
    why: str = ""
    tries: int = 1


_ASKS = 2  # unanswered questions after which an arbiter is asked


def begin() -> Step:
    """A new migration."""
    return Step(Connecting(), (Start(Work.CONNECT),))


def recover(row: Row, *, same_boot: bool) -> Step:
    """A row whose owner is dead."""
    match row:
        case Row.PREPARED | Row.FROZEN if same_boot:
            return _abort(row, Outcome.STAYED, "the agent at the source ended")
        case Row.FROZEN:
            return Step(Committing(here=False), (Swap(Row.FROZEN, Row.COMMITTED),))
        case Row.COMMITTED:
            return Step(Committed(asks=1, here=same_boot), (Send(Message.ASK),))
        case Row.ABORTED if same_boot:
            return Step(Undoing(why="the agent at the source ended"), (Start(Work.UNDO),))
        case Row.RELEASED:
            return Step(Releasing(), (Start(Work.RELEASE),))
        case _:
            return Step(Ended(Outcome.LOST, "the source went down with the program, which had not moved"))


def _abort(held: Row, outcome: Outcome, why: str, tries: int = 1) -> Step:
    return Step(Aborting(held, outcome, why, tries), (Swap(held, Row.ABORTED, why),))


def _trouble(event: Event) -> tuple[Outcome, str] | None:
    """What ends a migration in any state before the commit."""
    match event:
        case Received(Message.DISCARDED | Message.ABORT, why):
            return Outcome.STAYED, why or "the destination gave up"
        case Failed(_, why, outcome):
            return outcome, why
        case Broken(why):
            return Outcome.STAYED, why
        case Expired():
            return Outcome.STAYED, "no answer in time"
        case LinkLost(why):
            return Outcome.STAYED, why or "the connection broke"
        case Cancel():
            return Outcome.CANCELLED, "cancelled"
        case _:
            return None


def _untouched(event: Event) -> Step | None:
    """Trouble before there is a row: nothing has been touched."""
    trouble = _trouble(event)
    return trouble and Step(Ended(*trouble), (Send(Message.ABORT, trouble[1]),))


@handles(Connecting)
def _connecting(_: Connecting, event: Event, limits: Limits) -> Step | None:
    if event == Done(Work.CONNECT):
        return Step(Greeting(), (Send(Message.HELLO),))
    return _untouched(event)


@handles(Greeting)
def _greeting(_: Greeting, event: Event, limits: Limits) -> Step | None:
    if isinstance(event, Received) and event.message is Message.WELCOME:
        return Step(Examining(), (Start(Work.EXAMINE),))
    return _untouched(event)


@handles(Examining)
def _examining(_: Examining, event: Event, limits: Limits) -> Step | None:
    if event == Done(Work.EXAMINE):
        return Step(Preparing(), (Start(Work.PREPARE),))
    return _untouched(event)


@handles(Preparing)
def _preparing(_: Preparing, event: Event, limits: Limits) -> Step | None:
    if event == Done(Work.PREPARE):
        return Step(Waiting(), (Send(Message.PREPARE),))
    return _before_freeze(event)


@handles(Waiting)
def _waiting(_: Waiting, event: Event, limits: Limits) -> Step | None:
    if isinstance(event, Received) and event.message is Message.PREPARED:
        return Step(Copying(), (Start(Work.COPY),))
    return _before_freeze(event)


@handles(Copying)
def _copying(state: Copying, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.COPY, Verdict.ANOTHER):
            return Step(Copying(state.round + 1, state.freezes), (Start(Work.COPY),))
        case Done(Work.COPY, Verdict.SWITCH):
            arm = Swap(Row.PREPARED, Row.FROZEN, sync=True)
            return Step(Arming(state.round, state.freezes), (arm,))
        case Done(Work.COPY, Verdict.GIVE_UP, why):
            return _abort(Row.PREPARED, Outcome.STAYED, why or "it does not converge")
    return _before_freeze(event)


def _before_freeze(event: Event) -> Step | None:
    trouble = _trouble(event)
    return trouble and _abort(Row.PREPARED, *trouble)


@handles(Arming)
def _arming(state: Arming, event: Event, limits: Limits) -> Step | None:
    match event:
        case Swapped(Row.FROZEN):
            return Step(Freezing(state.round, state.freezes), (Start(Work.FREEZE),))
        case Refused(actual):
            return _decided(actual)
    return _before_freeze(event)


@handles(Freezing)
def _freezing(state: Freezing, event: Event, limits: Limits) -> Step | None:
    match event:
        case Received(Message.READY):
            return Step(Freezing(state.round, state.freezes, ready=True))
        case Done(Work.FREEZE):
            return _commit() if state.ready else Step(Frozen())
        case Failed(Work.FREEZE, _, _, True) if state.freezes + 1 < limits.freezes and not state.ready:
            return Step(Relenting(state.round, state.freezes + 1), (Start(Work.LET_GO),))
    return _in_freeze(event)


@handles(Relenting)
def _relenting(state: Relenting, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.LET_GO):
            return Step(state, (Swap(Row.FROZEN, Row.PREPARED),))
        case Swapped(Row.PREPARED):
            return Step(Copying(state.round + 1, state.freezes), (Start(Work.COPY),))
        case Refused(actual):
            return _decided(actual)
    return _in_freeze(event)


@handles(Frozen)
def _frozen(_: Frozen, event: Event, limits: Limits) -> Step | None:
    if isinstance(event, Received) and event.message is Message.READY:
        return _commit()
    return _in_freeze(event)


def _in_freeze(event: Event) -> Step | None:
    trouble = _trouble(event)
    return trouble and _abort(Row.FROZEN, *trouble)


def _commit() -> Step:
    return Step(Committing(), (Swap(Row.FROZEN, Row.COMMITTED),))


@handles(Committing)
def _committing(state: Committing, event: Event, limits: Limits) -> Step | None:
    match event:
        case Swapped(Row.COMMITTED) if not state.here:
            return Step(Committed(asks=1, here=False), (Send(Message.ASK),))
        case Swapped(Row.COMMITTED):
            return Step(Committed(), (Send(Message.COMMIT),))
        case Refused(actual):
            return _decided(actual)
        case Broken(why):
            return _abort(Row.FROZEN, Outcome.STAYED, why)  # COMMIT has not been sent; the row says which it is
    return None


@handles(Committed)
def _committed(state: Committed, event: Event, limits: Limits) -> Step | None:
    match event:
        case Received(Message.RESUMED) | Keep(Role.DESTINATION):
            return _grant(state.here)
        case Received(Message.DISCARDED) | Keep(Role.SOURCE) if state.here:
            why = event.why if isinstance(event, Received) else "by the operator's word"
            return _abort(Row.COMMITTED, Outcome.STAYED, why or "the destination discarded its copy")
        case Received(Message.DISCARDED):
            return Step(Ended(Outcome.LOST, "the source went down; the destination had discarded its copy"))
        case Received(Message.GONE):
            return Step(Ended(Outcome.LOST, "the destination went down with the program", unfinished=True))
        case Received(Message.DEAD):
            return _undecided(
                state, limits, "the destination went down before it wrote down whether the program ran there"
            )
        case Received(Message.UNKNOWN):
            why = "the destination knows nothing of this migration: its journal is not the one it had"
            return _undecided(state, limits, why)
        case Expired() | LinkLost() if state.asks < (min(limits.asks, _ASKS) if limits.arbiter else limits.asks):
            return Step(Committed(state.asks + 1, state.here), (Send(Message.ASK),))
        case Expired() | LinkLost():
            return _undecided(state, limits, "the destination does not answer")
    return None


def _undecided(state: Committed, limits: Limits, why: str) -> Step:
    """Only an arbiter can still decide; not for a copy that is gone."""
    if limits.arbiter and state.here:
        return Step(Arbitrating(why), (Start(Work.REVOKE),))
    return Step(Ended(Outcome.IN_DOUBT, why, unfinished=True))


@handles(Arbitrating)
def _arbitrating(state: Arbitrating, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.REVOKE):
            return _abort(Row.COMMITTED, Outcome.STAYED, f"{state.why}; the arbiter decided for this host")
        case Failed(Work.REVOKE, _, _, False):
            why = (
                f"{state.why}, but by the arbiter's word the program goes on there; the copy here is kept until it does"
            )
            return Step(Ended(Outcome.IN_DOUBT, why, unfinished=True))
        case Failed(Work.REVOKE) if state.tries < limits.tries:
            return Step(Arbitrating(state.why, state.tries + 1), (Start(Work.REVOKE),))
        case Failed(Work.REVOKE) | Expired():
            return Step(Ended(Outcome.IN_DOUBT, f"{state.why}, nor does the arbiter", unfinished=True))
        case Received(Message.RESUMED | Message.DISCARDED) | Keep():
            return _committed(Committed(), event, limits)
    return None


def _grant(here: bool, tries: int = 1) -> Step:
    return Step(Granting(here, tries), (Swap(Row.COMMITTED, Row.RELEASED),))


@handles(Granting)
def _granting(state: Granting, event: Event, limits: Limits) -> Step | None:
    match event:
        case Swapped(Row.RELEASED):
            return _release()
        case Refused(actual):
            return _decided(actual)
        case Broken() if state.tries < limits.tries:
            return _grant(state.here, state.tries + 1)
        case Broken(why):
            return Step(Ended(Outcome.MIGRATED, why, unfinished=True))
    return None


def _release() -> Step:
    return Step(Releasing(), (Start(Work.RELEASE),))


@handles(Releasing)
def _releasing(state: Releasing, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.RELEASE):
            return Step(Parting(), (Send(Message.RELEASED),))
        case Failed(Work.RELEASE) | Expired() if state.tries < limits.tries:
            return Step(Releasing(state.tries + 1), (Start(Work.RELEASE),))
        case Failed(Work.RELEASE, why):
            return Step(Ended(Outcome.MIGRATED, why, unfinished=True), (Send(Message.RELEASED),))
        case Expired():
            why = "the frozen copy at the source does not die"
            return Step(Ended(Outcome.MIGRATED, why, unfinished=True), (Send(Message.RELEASED),))
    return None


@handles(Parting)
def _parting(state: Parting, event: Event, limits: Limits) -> Step | None:
    match event:
        case LinkLost() if state.tries < limits.tries:  # whoever recovers there waits for it
            return Step(Parting(state.tries + 1), (Send(Message.RELEASED),))
        case Received(Message.GOODBYE | Message.UNKNOWN) | Expired() | LinkLost():
            return Step(Ended(Outcome.MIGRATED))
    return None


@handles(Aborting)
def _aborting(state: Aborting, event: Event, limits: Limits) -> Step | None:
    match event:
        case Swapped(Row.ABORTED):
            return _undo(state.outcome, state.why)
        case Refused(actual):
            return _decided(actual)
        case Broken() if state.tries < limits.tries:
            return _abort(state.held, state.outcome, state.why, state.tries + 1)
        case Broken(why):
            return Step(Ended(Outcome.IN_DOUBT, why, unfinished=True), (Send(Message.ABORT, why),))
    return None


def _undo(outcome: Outcome, why: str) -> Step:
    return Step(Undoing(outcome, why), (Start(Work.UNDO), Send(Message.ABORT, why)))


@handles(Undoing)
def _undoing(state: Undoing, event: Event, limits: Limits) -> Step | None:
    match event:
        case Done(Work.UNDO):
            return Step(Ended(state.outcome, state.why))
        case Failed(Work.UNDO) | Expired() if state.tries < limits.tries:
            return Step(Undoing(state.outcome, state.why, state.tries + 1), (Start(Work.UNDO),))
        case Failed(Work.UNDO, why):
            return Step(Ended(Outcome.IN_DOUBT, why, unfinished=True))
        case Expired():
            return Step(Ended(Outcome.IN_DOUBT, "the program could not be set going in time", unfinished=True))
    return None


def _decided(actual: Row) -> Step:
    """Someone else has changed the row: do what it says."""
    match actual:
        case Row.ABORTED:
            return _undo(Outcome.STAYED, "called off by another process")
        case Row.RELEASED:
            return _release()
        case Row.COMMITTED:
            return Step(Committed(asks=1), (Send(Message.ASK),))
        case _:
            return _abort(actual, Outcome.STAYED, f"the journal says {actual}")

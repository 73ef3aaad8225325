"""The vocabulary of the protocol, and the one function that makes every transition."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, TypeVar


class Role(enum.StrEnum):
    """Which side a row belongs to."""

    SOURCE = "source"
    DESTINATION = "destination"


class Row(enum.StrEnum):
    """What a journal row says. Which moves are legal depends on the role."""

    PREPARED = "prepared"  # nothing is decided, the program runs at the source
    FROZEN = "frozen"  # source: the program may be frozen; COMMIT has not been sent
    COMMITTED = "committed"  # source: COMMIT may have been sent
    ABORTED = "aborted"  # source: the program goes on here
    PARKED = "parked"  # destination: the copy is complete, nothing is decided
    RESUMED = "resumed"  # destination: the program goes on here
    DISCARDED = "discarded"  # destination: the copy never runs
    RELEASED = "released"  # both: the program runs at the destination, and both know


MOVES: dict[Role, dict[Row, frozenset[Row]]] = {
    Role.SOURCE: {
        Row.PREPARED: frozenset({Row.FROZEN, Row.ABORTED}),
        Row.FROZEN: frozenset({Row.PREPARED, Row.ABORTED, Row.COMMITTED}),
        Row.COMMITTED: frozenset({Row.ABORTED, Row.RELEASED}),
        Row.ABORTED: frozenset(),
        Row.RELEASED: frozenset(),
    },
    Role.DESTINATION: {
        Row.PREPARED: frozenset({Row.PARKED, Row.DISCARDED}),
        Row.PARKED: frozenset({Row.RESUMED, Row.DISCARDED}),
        Row.RESUMED: frozenset({Row.RELEASED}),
        Row.DISCARDED: frozenset(),
        Row.RELEASED: frozenset(),
    },
}


class Message(enum.StrEnum):
    """What the sides tell each other about the protocol; pages and state travel beside it."""

    HELLO = "HELLO"
    WELCOME = "WELCOME"
    PREPARE = "PREPARE"
    PREPARED = "PREPARED"
    FINAL = "FINAL"
    READY = "READY"
    COMMIT = "COMMIT"
    RESUMED = "RESUMED"
    RELEASED = "RELEASED"
    GOODBYE = "GOODBYE"
    ABORT = "ABORT"  # from the source: its row is ABORTED, or never was
    DISCARDED = "DISCARDED"  # from the destination: its row is, and nothing of the copy lives
    ASK = "ASK"  # from a source whose row is COMMITTED: what does yours say?
    UNKNOWN = "UNKNOWN"  # there is no such row
    DEAD = "DEAD"  # undecided when the host went down: the copy is dead and may have run
    GONE = "GONE"  # the row says RESUMED, but the host went down since


class Work(enum.StrEnum):
    """What takes time. The agent does it and reports `Done` or `Failed`."""

    CONNECT = "connect: reach the other host, start its agent, agree on versions and keys"
    EXAMINE = "examine: ask both hosts what speaks against it"
    PREPARE = "prepare: write and sync the row, give the tree its own cgroup"
    COPY = "copy: one round of pages"
    FREEZE = "freeze: stop, collect, cure, freeze the cgroup, hold the network, send what is left"
    LET_GO = "let go: give the network back and thaw, trackers stay"
    UNDO = "undo: steal off, drain, repair off, thaw, give the cgroup back"
    RELEASE = "release: silence and kill the frozen copy, close its sockets in repair, remove its cgroup"
    BUILD = "build: write and sync the row, reserve PIDs, build the skeleton tree"
    LAND = "land: last pages, objects, park every task, freeze the cgroup"
    CLAIM = "claim: have the arbiter write down that the program goes on at the destination"
    REVOKE = "revoke: have the arbiter write down that it does not"
    DETACH = "detach: clear EXITKILL and let go of every parked task, frozen as they are"
    WAKE = "wake: announce, leave repair, inject, thaw"
    SYNC = "sync: the row to the disk"
    KILL = "kill: cgroup.kill, wait until nothing lives, remove what was built"
    FORGET = "forget: remove a row that cannot be written"
    TIDY = "tidy: give the tree back to an ordinary cgroup; when both sides know, remove what else is left beside it"


class Outcome(enum.StrEnum):
    """How it ended, in the words of the command line's contract."""

    MIGRATED = "migrated"
    REFUSED = "refused"
    STAYED = "stayed"
    CANCELLED = "cancelled"
    IN_DOUBT = "in-doubt"
    LOST = "lost"
    ERROR = "error"


class Verdict(enum.StrEnum):
    """What the convergence policy says after a round."""

    ANOTHER = "another"
    SWITCH = "switch"
    GIVE_UP = "give up"


# -- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Received:
    """A message has come."""

    message: Message
    why: str = ""


@dataclass(frozen=True)
class Done:
    """A work has succeeded."""

    work: Work
    verdict: Verdict | None = None  # of COPY
    why: str = ""  # of a verdict


@dataclass(frozen=True)
class Failed:
    """A work has failed. `outcome` is how the migration ends if nothing is running elsewhere, `again` whether
    another try may help: of CLAIM and REVOKE, whether it is not known what the arbiter says (else: the opposite)."""

    work: Work
    why: str = ""
    outcome: Outcome = Outcome.STAYED
    again: bool = False


@dataclass(frozen=True)
class Swapped:
    """The row has been changed as asked."""

    to: Row


@dataclass(frozen=True)
class Refused:
    """The row was not in the state that the change starts from; it says `actual`."""

    actual: Row


@dataclass(frozen=True)
class Broken:
    """The row could not be read or written; the change may have reached it or not."""

    why: str = ""


@dataclass(frozen=True)
class Expired:
    """The state's deadline has passed."""


@dataclass(frozen=True)
class LinkLost:
    """The connection to the other side broke."""

    why: str = ""


@dataclass(frozen=True)
class Cancel:
    """The operator wants it called off."""


@dataclass(frozen=True)
class Keep:
    """The operator vouches for where the program is to go on: `phaul resolve ID --keep`."""

    role: Role


Event: TypeAlias = Received | Done | Failed | Swapped | Refused | Broken | Expired | LinkLost | Cancel | Keep


# -- actions ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """Send a message; a link that is gone swallows it."""

    message: Message
    why: str = ""


@dataclass(frozen=True)
class Swap:
    """Compare-and-set the row. `sync` brings it to the disk before `Swapped`: never inside the freeze."""

    expected: Row
    to: Row
    why: str = ""
    sync: bool = False


@dataclass(frozen=True)
class Start:
    """Start a work, stopping the one before."""

    work: Work


Action: TypeAlias = Send | Swap | Start


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds, and how often things are tried; `arbiter` when both sides have one for this migration."""

    deadlines: dict[str, float] = field(default_factory=dict)  # by name of state, in place of the state's own
    freezes: int = 5
    asks: int = 6
    tries: int = 3
    arbiter: bool = False


# -- states -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What a party is doing. `seconds` is the deadline, None for a state without one; `row` what its row says.

    `stands`: the program stands still. `listens`: and all that is waited for is the other side's word."""

    seconds: ClassVar[float | None] = None
    row: ClassVar[Row | None] = None
    stands: ClassVar[bool] = False
    listens: ClassVar[bool] = False


@dataclass(frozen=True)
class Ended(State):
    """It is over for this process. With `unfinished`, the row still asks for something: see `recover`."""

    outcome: Outcome
    why: str = ""
    unfinished: bool = False


@dataclass(frozen=True)
class Step:
    """The next state and what to do, in this order."""

    state: State
    actions: tuple[Action, ...] = ()


Handler: TypeAlias = Callable[[Any, Event, Limits], Step | None]
_H = TypeVar("_H", bound=Handler)
_handlers: dict[type[State], Handler] = {}


def handles(kind: type[State]) -> Callable[[_H], _H]:
    """Decorator: the transitions of a state. None stands for an event that changes nothing."""

    def register(handler: _H) -> _H:
        _handlers[kind] = handler
        return handler

    return register


def step(state: State, event: Event, limits: Limits = Limits()) -> Step:
    """Every transition of either side."""
    handler = _handlers.get(type(state))
    return (handler(state, event, limits) if handler else None) or Step(state)


def deadline(state: State, limits: Limits) -> float | None:
    """How long a party may stay in a state before `Expired`, in seconds."""
    return limits.deadlines.get(type(state).__name__, state.seconds)


def states() -> list[type[State]]:
    """All states that handle events, those of the source first, in the order of the protocol."""
    return list(_handlers)

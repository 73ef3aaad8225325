"""Everything that happens in a migration, as typed events in one stream.

The agent at the source emits them; the terminal view, `--json`, logs and reports consume them. Between processes
an event is one line of JSON: {"event": NAME, field: value, ...}. Times are milliseconds, sizes bytes, rates bytes a
second. The last event of a command is its `Result`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from phaul import jsontext
from phaul.errors import Exit, Outcome

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_LINE = 1 << 20  # bytes of one event as a line; a longer one is a mistake, not an event

Side: TypeAlias = Literal["source", "destination"]

_EXITS: dict[Outcome, Exit] = {
    "migrated": Exit.OK,
    "refused": Exit.REFUSED,
    "stayed": Exit.STAYED,
    "cancelled": Exit.CANCELLED,
    "in-doubt": Exit.IN_DOUBT,
    "lost": Exit.LOST,
    "error": Exit.ERROR,
}

_registry: dict[str, type[Event]] = {}


class EventError(ValueError):
    """A line that is no event."""


@dataclass(frozen=True)
class Event:
    """Something that happened. A subclass gives its name on the wire."""

    name: ClassVar[str]

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        _registry[name] = cls


def registry() -> dict[str, type[Event]]:
    """All kinds of events by their names, in the order of their definition."""
    return dict(_registry)


Sink: TypeAlias = Callable[[Event], None]


@dataclass(frozen=True)
class Finding:
    """An answer of the preflight that speaks against the migration.

    A blocker forbids it, a warning is for the operator to weigh. `check` is a stable name for programs, `text` says
    what was found and why it matters, `advice` what to do about it.
    """

    severity: Literal["blocker", "warning"]
    check: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.advice}" if self.advice else self.text


@dataclass(frozen=True)
class Round:
    """What one round of copying memory sent. Fields as in the contract of `--json`."""

    pages: int
    bytes: int
    ms: float


@dataclass(frozen=True)
class Connected(Event, name="connected"):
    """The other host answered, and its phaul speaks our protocol."""

    host: str
    version: str
    kernel: str
    rtt_ms: float


@dataclass(frozen=True)
class Preflight(Event, name="preflight"):
    """Both hosts have been asked everything; all findings at once. Without a blocker the migration goes on."""

    findings: tuple[Finding, ...]

    @property
    def blockers(self) -> tuple[Finding, ...]:
        """The findings that forbid the migration."""
        return tuple(finding for finding in self.findings if finding.severity == "blocker")


@dataclass(frozen=True)
class Prepared(Event, name="prepared"):
    """The destination holds the PIDs and waits for memory. From here on `id` names the migration."""

    id: str
    processes: int
    threads: int
    pages: int


@dataclass(frozen=True)
class Hauled(Event, name="hauled"):
    """The directories that go along are there, as they were a moment ago; what changes in them goes with the rounds."""

    bytes: int
    ms: float


@dataclass(frozen=True)
class RoundStarted(Event, name="round-started"):
    """Round `number` (from 0) sends `pages` pages."""

    number: int
    pages: int


@dataclass(frozen=True)
class RoundProgress(Event, name="round-progress"):
    """Where the round is; several a second at most."""

    number: int
    pages: int
    bytes: int
    ms: float
    link_rate: float


@dataclass(frozen=True)
class RoundEnded(Event, name="round-ended"):
    """A round is over. `dirty_pages` were written meanwhile: the next round, or the last pages of the freeze."""

    number: int
    sent: Round
    dirty_pages: int
    dirty_rate: float
    link_rate: float


@dataclass(frozen=True)
class Predicted(Event, name="predicted"):
    """What a freeze now would cost, the limit that it is held against, and what was decided."""

    downtime_ms: float
    limit_ms: float
    decision: Literal["round", "throttle", "switchover", "give-up"]


@dataclass(frozen=True)
class Throttled(Event, name="throttled"):
    """The program is slowed down so that rounds converge: it runs `percent` of the time."""

    percent: int


@dataclass(frozen=True)
class Surveyed(Event, name="surveyed"):
    """The tree has been looked at: for so long it stood, while the rest of the look went on beside it."""

    stood_ms: float


@dataclass(frozen=True)
class SwitchoverStarted(Event, name="switchover-started"):
    """The program is about to be stopped. `attempt` counts from 1: a freeze beyond its deadline is let go."""

    attempt: int


@dataclass(frozen=True)
class Phase(Event, name="phase"):
    """A phase of the downtime is over: freeze, ask, last scan, collect, send, last pages at the source; areas,
    pages, objects, park, detach, claim (with an arbiter), resume at the destination. The two sides work at the same
    time for a part of it."""

    phase: str
    ms: float
    detail: str = ""
    side: Side = "source"


@dataclass(frozen=True)
class FreezeLetGo(Event, name="freeze-let-go"):
    """A freeze did not end in time; the program runs on at the source. `reason` names the task and its wait."""

    attempt: int
    ms: float
    reason: str


@dataclass(frozen=True)
class Committed(Event, name="committed"):
    """The source has written down that only the destination may run the program now."""


@dataclass(frozen=True)
class Resumed(Event, name="resumed"):
    """The program runs at the destination."""

    downtime_ms: float


@dataclass(frozen=True)
class Released(Event, name="released"):
    """The copy at the source is gone."""


@dataclass(frozen=True)
class Notice(Event, name="notice"):
    """A sentence for the operator that changes nothing: a fallback taken, a retry, a feature that is not there."""

    level: Literal["info", "warning"]
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Result(Event, name="result"):
    """How it ended; the last event. Fields and values are the contract of `--json`.

    `reason` is empty for a migration that succeeded; else what happened, where the program runs and what to do.
    """

    outcome: Outcome
    pid: int | None
    downtime_ms: float | None = None
    total_ms: float | None = None
    rounds: tuple[Round, ...] = ()
    bytes_sent: int = 0
    reason: str = ""

    @property
    def exit_status(self) -> Exit:
        """The exit status that belongs to the outcome."""
        return _EXITS[self.outcome]


def encode(event: Event, **extra: Any) -> str:
    """The event as one line of JSON, without its newline."""
    return json.dumps(
        {"event": event.name, **extra, **dataclasses.asdict(event)}, separators=(",", ":"), ensure_ascii=False
    )


def decode(line: str | bytes) -> Event:
    """The event of a line. EventError for what is none, so that a broken peer is noticed where it happens."""
    if len(line) > MAX_LINE:
        raise EventError(f"an event of {len(line)} bytes")
    try:
        content = jsontext.parse(line)
        name = content.pop("event")
        return _adapter(name).validate_python(content)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise EventError(f"not an event: {line[:100]!r}: {error}") from error


@functools.cache
def _adapter(name: str) -> TypeAdapter[Event]:
    from pydantic import TypeAdapter  # slow to import, and only the receiving process needs it

    return TypeAdapter(_registry[name])

"""What a person, or a program, sees of a migration: consumers of the stream of events.

`--json` gets every event as a line. A terminal gets a live line for the running round and lasting lines for what is
over; anything else gets the lasting lines alone. The last lines tell the downtime phase by phase.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from phaul import events
from phaul.events import Event, Sink

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


_SIDES = {"source": "", "destination": "there"}


@contextmanager
def view(as_json: bool, out: TextIO | None = None) -> Iterator[Sink]:
    """A consumer for the length of a migration, as fits the output."""
    out = out or sys.stdout
    if as_json:
        yield lambda event: print(_json_line(event), file=out, flush=True)
    elif out.isatty():
        with _live(out) as sink:
            yield sink
    else:
        story = Story()
        yield lambda event: _print_lines(story.lines(event), out)


def _json_line(event: Event) -> str:
    """Every event says when it happened, but the result: its keys are a contract."""
    return (
        events.encode(event) if isinstance(event, events.Result) else events.encode(event, time=round(time.time(), 3))
    )


def _print_lines(lines: list[str], out: TextIO) -> None:
    for line in lines:
        print(line, file=out, flush=True)


@dataclass
class Story:
    """Turns events into lines for a person, and remembers what the last lines and the live one need."""

    host: str = "the destination"
    phases: list[events.Phase] = field(default_factory=list)
    round: int = 0
    pages: int = 0
    progress: events.RoundProgress | None = None
    dirty_rate: float = 0.0
    predicted: events.Predicted | None = None
    frozen: bool = False

    def lines(self, event: Event) -> list[str]:
        """What to print for an event, if anything."""
        return _tell(event, self)

    def status(self) -> str:
        """The live line: where the running round is."""
        if self.frozen:
            return "switching over"
        if self.progress is None:
            return ""
        done = min(1.0, self.progress.pages / self.pages) if self.pages else 0.0
        parts = [f"round {self.round}", f"{done:4.0%}", f"link {rate(self.progress.link_rate)}"]
        if self.dirty_rate:
            parts.append(f"dirty {rate(self.dirty_rate)}")
        if self.predicted:
            parts.append(f"predicted downtime {milliseconds(self.predicted.downtime_ms)}")
        return "  ".join(parts)


@functools.singledispatch
def _tell(event: Event, story: Story) -> list[str]:
    """Events that are for programs only have no line."""
    return []


def _teller(function: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return _tell.register(function)


@_teller
def _connected(event: events.Connected, story: Story) -> list[str]:
    story.host = event.host
    return [f"connected to {event.host} (phaul {event.version}, Linux {event.kernel}, {milliseconds(event.rtt_ms)})"]


@_teller
def _preflight(event: events.Preflight, story: Story) -> list[str]:
    return [line for finding in event.findings for line in finding_lines(finding)]


@_teller
def _prepared(event: events.Prepared, story: Story) -> list[str]:
    counts = f"{count(event.processes, 'process', 'processes')}, {count(event.threads, 'thread')}"
    return [f"migration {event.id}: {counts}, {size(event.pages * 4096)}; {story.host} holds their PIDs"]


@_teller
def _hauled(event: events.Hauled, story: Story) -> list[str]:
    return [f"directories: {size(event.bytes)} sent in {milliseconds(event.ms)}"]


@_teller
def _surveyed(event: events.Surveyed, story: Story) -> list[str]:
    return []


@_teller
def _round_started(event: events.RoundStarted, story: Story) -> list[str]:
    story.round, story.pages, story.progress = event.number, event.pages, None
    return []


@_teller
def _round_progress(event: events.RoundProgress, story: Story) -> list[str]:
    story.progress = event
    return []


@_teller
def _round_ended(event: events.RoundEnded, story: Story) -> list[str]:
    story.progress, story.dirty_rate = None, event.dirty_rate
    sent = event.sent
    return [
        f"round {event.number}: {count(sent.pages, 'page')}, {size(sent.bytes)} sent in {milliseconds(sent.ms)} "
        f"({rate(event.link_rate)}); {size(event.dirty_pages * 4096)} written meanwhile ({rate(event.dirty_rate)})"
    ]


@_teller
def _predicted(event: events.Predicted, story: Story) -> list[str]:
    story.predicted = event
    reasons = {
        "round": "another round",
        "throttle": "slowing the program down",
        "switchover": "switching over",
        "give-up": "giving up",
    }
    found = f"predicted downtime {milliseconds(event.downtime_ms)}, limit {milliseconds(event.limit_ms)}"
    return [f"{found}: {reasons[event.decision]}"]


@_teller
def _throttled(event: events.Throttled, story: Story) -> list[str]:
    return [f"the program runs {event.percent} % of the time now"]


@_teller
def _switchover(event: events.SwitchoverStarted, story: Story) -> list[str]:
    story.phases, story.frozen = [], True
    return []


@_teller
def _phase(event: events.Phase, story: Story) -> list[str]:
    story.phases.append(event)
    return []


@_teller
def _let_go(event: events.FreezeLetGo, story: Story) -> list[str]:
    story.phases, story.frozen = [], False
    return [f"freeze {event.attempt} let go after {milliseconds(event.ms)}, the program runs on: {event.reason}"]


@_teller
def _resumed(event: events.Resumed, story: Story) -> list[str]:
    story.frozen = False
    return [f"running on {story.host}"]


@_teller
def _notice(event: events.Notice, story: Story) -> list[str]:
    text = f"{event.text}; {event.advice}" if event.advice else event.text
    return [f"warning: {text}" if event.level == "warning" else text]


@_teller
def _result(event: events.Result, story: Story) -> list[str]:
    story.frozen, story.progress = False, None
    lines = []
    if event.downtime_ms is not None:
        lines = [_phase_line(phase) for phase in story.phases]
        lines.append(f"  {'downtime':<14}{milliseconds(event.downtime_ms):>10}")
    if event.outcome == "migrated":
        total = "" if event.total_ms is None else f" in {milliseconds(event.total_ms)}"
        rounds = count(len(event.rounds), "round")
        lines.append(f"migrated to {story.host}{total}: {rounds}, {size(event.bytes_sent)} sent")
    else:
        lines.append(f"{event.outcome}: {event.reason}" if event.reason else event.outcome)
    return lines


def _phase_line(phase: events.Phase) -> str:
    return f"  {phase.phase:<14}{milliseconds(phase.ms):>10}  {phase.detail or _SIDES[phase.side]}".rstrip()


def finding_lines(finding: events.Finding) -> list[str]:
    """A finding for a person: what, and below it what to do."""
    return [f"{finding.severity}: {finding.text}", *([f"  {finding.advice}"] if finding.advice else [])]


@contextmanager
def _live(out: TextIO) -> Iterator[Sink]:
    """Lasting lines above, one live line below."""
    from rich.console import Console
    from rich.live import Live

    console = Console(file=out, highlight=False)
    story = Story()

    def render() -> RenderableType:
        return _status(console, story)

    with Live(get_renderable=render, console=console, refresh_per_second=8, transient=True) as live:

        def sink(event: Event) -> None:
            for line in story.lines(event):
                console.print(line, markup=False, style=_style(line))
            if isinstance(event, (events.SwitchoverStarted, events.Result)):
                live.stop()  # no thread of ours draws while the program stands still

        yield sink


def _status(console: Console, story: Story) -> RenderableType:
    from rich.text import Text

    return Text(story.status(), style="cyan", overflow="ellipsis", no_wrap=True)


def _style(line: str) -> str:
    styles = {"blocker:": "bold red", "warning:": "yellow", "migrated": "bold green", "  downtime": "bold"}
    return next((style for start, style in styles.items() if line.startswith(start)), "")


def size(number: float) -> str:
    """Bytes for a person."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def rate(number: float) -> str:
    """Bytes a second for a person, in the units of --bandwidth."""
    for unit in ("B/s", "kB/s", "MB/s"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.2f} GB/s"


def milliseconds(number: float) -> str:
    """A duration for a person."""
    if number < 10:
        return f"{number:.2f} ms"
    return f"{number:.0f} ms" if number < 10_000 else f"{number / 1000:.1f} s"


def count(number: int, one: str, many: str = "") -> str:
    """A number of things."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"

"""Events: what they are as JSON, and that nothing else passes for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phaul import event_docs, events
from phaul.errors import Exit, Outcome

EVENTS: list[events.Event] = [
    events.Connected("db2", "0.1.0", "6.12.1", 0.4),
    events.Preflight((events.Finding("blocker", "pid-taken", "PID 812 is taken by sshd", "use --pidns"),)),
    events.Prepared("m1", 2, 5, 100_000),
    events.Hauled(37_394_897, 2255.4),
    events.RoundStarted(0, 100_000),
    events.RoundProgress(0, 50, 204_800, 12.5, 1e9),
    events.RoundEnded(0, events.Round(100_000, 409_600_000, 250.0), 300, 4.9e6, 1.6e9),
    events.Predicted(2.5, 100.0, "switchover"),
    events.Throttled(80),
    events.Surveyed(3.2),
    events.SwitchoverStarted(1),
    events.Phase("freeze", 0.4),
    events.FreezeLetGo(1, 100.2, "task 813 waits in D state in rpc_wait_bit_killable"),
    events.Committed(),
    events.Resumed(2.1),
    events.Released(),
    events.Notice("warning", "no TCX: clsact in its place"),
    events.Result("migrated", 812, 2.1, 1400.0, (events.Round(1, 4096, 0.5),), 4096),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
def test_an_event_survives_its_line(event: events.Event) -> None:
    line = events.encode(event)
    assert "\n" not in line
    assert json.loads(line)["event"] == event.name
    assert events.decode(line.encode()) == event


def test_every_kind_of_event_is_tried() -> None:
    assert {event.name for event in EVENTS} == set(events._registry)


def test_result_is_the_contract() -> None:
    """The keys of the last line, in the order of the documentation."""
    line = json.loads(events.encode(EVENTS[-1]))
    assert list(line) == [
        "event",
        "outcome",
        "pid",
        "downtime_ms",
        "total_ms",
        "rounds",
        "bytes_sent",
        "reason",
    ]
    assert line["rounds"] == [{"pages": 1, "bytes": 4096, "ms": 0.5}]


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("migrated", 0),
        ("refused", 20),
        ("stayed", 30),
        ("in-doubt", 40),
        ("lost", 50),
        ("cancelled", 130),
        ("error", Exit.ERROR),
    ],
)
def test_outcomes_and_exit_statuses(outcome: Outcome, status: int) -> None:
    assert events.Result(outcome, 1).exit_status == status


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        "{}",
        '{"event":"no-such-event"}',
        '{"event":["result"]}',
        '{"event":"throttled"}',
        '{"event":"throttled","percent":"much"}',
        '{"event":"result","outcome":"done","pid":1}',
        '{"event":"notice","level":"info","text":"' + "x" * events.MAX_LINE + '"}',
    ],
)
def test_what_is_no_event(line: str) -> None:
    with pytest.raises(events.EventError):
        events.decode(line)


def test_the_document_describes_the_events_as_they_are() -> None:
    """A field that goes, or means another thing, breaks whoever reads it: a change shows in this diff."""
    document = Path(__file__).parents[3] / "docs" / "events.md"
    assert document.read_text() == event_docs.markdown(), "python -m phaul.event_docs > docs/events.md"

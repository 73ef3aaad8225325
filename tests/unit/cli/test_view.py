"""What is shown of a migration, in the three shapes that an output can have."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty

import pytest

from phaul import events
from phaul.cli.view import Story, milliseconds, rate, size, view
from phaul.errors import Outcome

MIGRATION: list[events.Event] = [
    events.Connected("db2", "0.1.0", "6.12.1", 0.4),
    events.Preflight((events.Finding("warning", "clock", "the clock is 2.0 s ahead", "synchronize"),)),
    events.Prepared("m123", 2, 5, 100_000),
    events.RoundStarted(0, 100_000),
    events.RoundProgress(0, 50_000, 204_800_000, 120, 1.6e9),
    events.RoundEnded(0, events.Round(100_000, 409_600_000, 250.0), 300, 4.9e6, 1.6e9),
    events.Predicted(2.5, 100.0, "switchover"),
    events.SwitchoverStarted(1),
    events.FreezeLetGo(1, 100.2, "task 813 waits in rpc_wait_bit_killable"),
    events.SwitchoverStarted(2),
    events.Phase("freeze", 0.4),
    events.Phase("last pages", 0.9, "300 pages"),
    events.Committed(),
    events.Resumed(2.1),
    events.Released(),
    events.Result("migrated", 812, 2.1, 1400.0, (events.Round(100_000, 409_600_000, 250.0),), 410_000_000),
]


def test_json_is_every_event_and_the_result_last() -> None:
    out = io.StringIO()
    with view(True, out) as sink:
        for event in MIGRATION:
            sink(event)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in lines] == [event.name for event in MIGRATION]
    assert all(("time" in line) == (line["event"] != "result") for line in lines)


def test_a_file_gets_lasting_lines_only() -> None:
    out = io.StringIO()
    with view(False, out) as sink:
        for event in MIGRATION:
            sink(event)
    assert out.getvalue().splitlines() == [
        "connected to db2 (phaul 0.1.0, Linux 6.12.1, 0.40 ms)",
        "warning: the clock is 2.0 s ahead",
        "  synchronize",
        "migration m123: 2 processes, 5 threads, 390.6 MiB; db2 holds their PIDs",
        "round 0: 100,000 pages, 390.6 MiB sent in 250 ms (1.60 GB/s); 1.2 MiB written meanwhile (5 MB/s)",
        "predicted downtime 2.50 ms, limit 100 ms: switching over",
        "freeze 1 let go after 100 ms, the program runs on: task 813 waits in rpc_wait_bit_killable",
        "running on db2",
        "  freeze           0.40 ms",
        "  last pages       0.90 ms  300 pages",
        "  downtime         2.10 ms",
        "migrated to db2 in 1400 ms: 1 round, 391.0 MiB sent",
    ]


@pytest.mark.parametrize("outcome", ["stayed", "refused", "cancelled", "in-doubt", "lost", "error"])
def test_other_ends_give_their_reason(outcome: Outcome) -> None:
    out = io.StringIO()
    with view(False, out) as sink:
        sink(events.Result(outcome, 812, reason="the link broke; it runs on the source"))
    assert out.getvalue() == f"{outcome}: the link broke; it runs on the source\n"


def test_the_live_line_says_where_the_round_is() -> None:
    story = Story()
    for event in MIGRATION[:5]:
        story.lines(event)
    assert story.status() == "round 0   50%  link 1.60 GB/s"
    for event in (*MIGRATION[5:7], events.RoundStarted(1, 300), events.RoundProgress(1, 300, 1_000_000, 1, 1.2e9)):
        story.lines(event)
    assert story.status() == "round 1  100%  link 1.20 GB/s  dirty 5 MB/s  predicted downtime 2.50 ms"
    story.lines(events.SwitchoverStarted(1))
    assert story.status() == "switching over"


def test_a_terminal_keeps_the_lasting_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as out, view(False, out) as sink:
        for event in MIGRATION:
            sink(event)
    shown = _everything(ours)
    assert "\x1b[1;32mmigrated to db2 in 1400 ms" in shown
    assert "\x1b[1m  downtime" in shown
    assert "round 0: 100,000 pages" in shown


def _everything(terminal: int) -> str:
    """All that was written to a terminal whose other end is closed: then reading fails with EIO (pty(7))."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 65536):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 30, 5 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "3.0 GiB",
        "5.0 TiB",
    ]
    assert [rate(n) for n in (0, 999, 1e6, 2.5e9)] == ["0 B/s", "999 B/s", "1 MB/s", "2.50 GB/s"]
    assert [milliseconds(n) for n in (0.05, 12.3, 9999, 61_000)] == ["0.05 ms", "12 ms", "9999 ms", "61.0 s"]

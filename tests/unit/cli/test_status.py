"""`phaul status` over journals as migrations leave them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from phaul.cli.status import _MEANING, app
from phaul.errors import PhaulError
from phaul.journal import Row, Store, Task, boot_id
from phaul.migration import MOVES, Role
from phaul.migration import Row as State


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("PHAUL_AGENT_STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return Store(tmp_path / "state")


def row(name: str, role: Role = Role.SOURCE, **facts: object) -> Row:
    known = {"boot": boot_id(), "owner": Task.of(os.getpid()), "peer": "db2", "program": "pid 812 (redis-server)"}
    return Row(migration=name, role=role, **{**known, **facts})  # type: ignore[arg-type]


def output(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_nothing_going_on(store: Store) -> None:
    assert output() == "no migration is going on\n"
    assert output("--all") == "this host has seen no migration\n"
    assert output("--json") == ""


def test_a_running_migration(store: Store) -> None:
    with store.create(row("m0000001")) as journal:
        journal.transition(State.PREPARED, State.FROZEN)
        journal.transition(State.FROZEN, State.COMMITTED, why="READY came")
        lines = output().splitlines()
    meaning = "pid 812 (redis-server) is frozen here, and does not run here; db2 decides whether it runs there"
    assert lines[0].startswith(f"m0000001  {meaning} (committed for ")
    assert lines[1:] == ["  READY came"]


def test_every_state_says_where_the_program_runs() -> None:
    for role, moves in MOVES.items():
        for state in moves:
            assert _MEANING[role.value, state.value].format(peer="db2"), (role, state)


def test_what_nobody_works_on_says_what_to_do(store: Store) -> None:
    store.create(row("m0000001", owner=Task(pid=1, start=1))).close()
    store.create(row("m0000002", Role.DESTINATION, boot="another")).close()
    text = output()
    assert "its agent is gone: phaul resolve m0000001" in text
    assert "pid 812 (redis-server) was being copied here when this host went down; ask db2 (prepared" in text
    assert "booted since: phaul resolve m0000002" in text


def test_what_is_over_is_shown_when_asked_for(store: Store) -> None:
    with store.create(row("m0000001")) as journal:
        journal.transition(State.PREPARED, State.ABORTED)
        journal.end()
    assert output() == "no migration is going on\n"
    assert "aborted" in output("--all")
    assert "aborted" in output("m0000001")
    shown = json.loads(output("--json", "m0000001"))
    assert (shown["event"], shown["state"], shown["owned"]) == ("migration", "aborted", True)


def test_an_unknown_migration(store: Store) -> None:
    with pytest.raises(PhaulError, match="no migration 'm9'"):
        CliRunner().invoke(app, ["m9"], catch_exceptions=False)

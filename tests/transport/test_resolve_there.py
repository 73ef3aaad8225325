"""`phaul resolve` at the source, with the destination behind a real sshd, or an arbiter: every answer, and none."""

from __future__ import annotations

import asyncio
import http.server
import os
import resource
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phaul import resolve
from phaul.config import AgentSettings, Settings, SshSettings
from phaul.errors import InDoubtError, LostError, PhaulError
from phaul.journal import RECORD, Journal, Row, Store, Task, boot_id
from phaul.migration import Role
from phaul.migration import Row as State
from phaul.resolve import Verdict, Word

from .conftest import Server

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a login that is root")

ID = "0123456789ab"
PHAUL = Path(sys.executable).with_name("phaul")
SURE = lambda text: True  # noqa: E731


class Pair:
    """Two hosts on this one: their journals, and how the source's reaches the destination's."""

    def __init__(self, directory: Path, peer: str, ssh: dict[str, Any]) -> None:
        self.here, self.there = Store(directory / "here"), Store(directory / "there")
        self.peer = peer
        agent = AgentSettings(state_directory=self.here.directory, run_directory=directory / "run")
        self.settings = Settings(ssh=SshSettings(**ssh), agent=agent)

    def row(self, role: Role, *states: State, **facts: Any) -> None:
        """A row whose agent is dead."""
        facts = {"boot": boot_id(), "owner": Task(pid=os.getpid(), start=1), "peer": self.peer, **facts}
        store = self.here if role is Role.SOURCE else self.there
        with store.create(Row(migration=ID, role=role, **facts)) as journal:
            for state in states:
                journal.transition(journal.row.state, state)

    def source(self, *states: State, **facts: Any) -> None:
        self.row(Role.SOURCE, *(states or (State.FROZEN, State.COMMITTED)), **facts)

    def destination(self, *states: State, **facts: Any) -> None:
        self.row(Role.DESTINATION, *states, **facts)

    def resolve(self, keep: str = "") -> Verdict:
        return asyncio.run(resolve.resolve(ID, Word(keep, SURE) if keep else None, self.settings))

    def states(self) -> tuple[State, State]:
        """What both rows say."""
        return self._open(self.here, Role.SOURCE), self._open(self.there, Role.DESTINATION)

    @staticmethod
    def _open(store: Store, role: Role) -> State:
        journal: Journal | None = store.open(ID, role)
        assert journal is not None
        with journal:
            return journal.row.state


@pytest.fixture
def pair(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    monkeypatch.setenv("PHAUL_AGENT_STATE_DIRECTORY", str(tmp_path / "here"))
    monkeypatch.setenv("PHAUL_AGENT_RUN_DIRECTORY", str(tmp_path / "run"))
    command = tmp_path / "phaul"
    variables = (f"PHAUL_AGENT_STATE_DIRECTORY={tmp_path}/there", f"PHAUL_AGENT_RUN_DIRECTORY={tmp_path}/run-there")
    command.write_text(f'#!/bin/sh\nexec env {shlex.join(variables)} {PHAUL} "$@"\n')
    command.chmod(0o755)
    options = server.options()
    ssh = {
        "identity": options.identity,
        "options": options.options,
        "config": "none",
        "remote_command": str(command),
    }
    return Pair(tmp_path, str(server.destination), ssh)


@pytest.mark.parametrize(
    ("there", "outcome", "after"),
    [
        ((State.PARKED, State.RESUMED), "migrated", (State.RELEASED, State.RELEASED)),
        ((State.PARKED,), "stayed", (State.ABORTED, State.DISCARDED)),
    ],
)
def test_the_destinations_row_decides(
    pair: Pair, there: tuple[State, ...], outcome: str, after: tuple[State, State]
) -> None:
    pair.source()
    pair.destination(*there)
    assert pair.resolve().outcome == outcome
    assert pair.states() == after


def test_a_word_that_agrees_changes_nothing(pair: Pair) -> None:
    pair.source()
    pair.destination(State.PARKED, State.RESUMED)
    with pytest.raises(PhaulError, match="has decided otherwise: its copy runs"):
        pair.resolve("source")
    assert pair.states()[0] is State.COMMITTED
    assert pair.resolve("destination").outcome == "migrated"


def test_a_destination_that_went_down_with_the_program_is_told(pair: Pair) -> None:
    pair.source()
    pair.destination(State.PARKED, State.RESUMED, boot="another")
    with pytest.raises(LostError, match="the program with it"):
        pair.resolve()
    assert pair.states()[0] is State.COMMITTED
    assert pair.resolve("source").outcome == "stayed"


def test_a_destination_that_went_down_undecided_takes_a_word(pair: Pair) -> None:
    pair.source()
    pair.destination(State.PARKED, boot="another")
    with pytest.raises(InDoubtError, match="before it was decided"):
        pair.resolve()
    with pytest.raises(InDoubtError, match="before it was decided"):
        asyncio.run(resolve.resolve(ID, Word("source", lambda text: False), pair.settings))
    assert pair.states()[0] is State.COMMITTED
    assert pair.resolve("source").outcome == "stayed"


def test_a_source_that_went_down_asks_before_it_says_anything(pair: Pair) -> None:
    """Its row says FROZEN, but COMMITTED may have stood there."""
    pair.source(State.FROZEN, boot="another")
    pair.destination(State.PARKED, State.DISCARDED)
    assert pair.resolve() == Verdict("lost", "the source went down; the destination had discarded its copy")


# -- nobody there -----------------------------------------------------------------------------------------------------

NOWHERE = "root@127.0.0.1:1"


@pytest.fixture
def alone(pair: Pair) -> Pair:
    """The destination does not answer."""
    pair.peer = NOWHERE
    return pair


class Etcd(http.server.BaseHTTPRequestHandler):
    """An etcd that lets everybody be the first."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"header":{},"succeeded":true}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def etcd() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Etcd) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_arbiter_decides_in_place_of_a_silent_destination(alone: Pair, etcd: str) -> None:
    alone.source(arbiter={"endpoints": [etcd]})
    assert alone.resolve().outcome == "stayed"


def test_where_the_arbiter_is_silent_too_it_takes_a_word(alone: Pair) -> None:
    alone.source(arbiter={"endpoints": ["http://127.0.0.1:1"]})
    with pytest.raises(InDoubtError, match="nor does the arbiter"):
        alone.resolve()
    assert alone.resolve("source").outcome == "stayed"


def test_a_row_that_does_not_say_who_decides_takes_a_word(alone: Pair) -> None:
    alone.source(peer="")
    with pytest.raises(InDoubtError, match="does not say how the destination is reached"):
        alone.resolve()


def test_a_row_that_cannot_be_written_is_in_doubt(alone: Pair) -> None:
    """The agent that this starts can write no file beyond its first record (setrlimit(2))."""
    alone.source(State.FROZEN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RECORD, limits[1]))
    try:
        with pytest.raises(InDoubtError, match="cannot use"):
            alone.resolve()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert alone.resolve().outcome == "stayed"


def test_a_living_agent_is_left_to_its_work(alone: Pair) -> None:
    alone.source(owner=Task.of(os.getpid()))
    with pytest.raises(PhaulError, match="is alive"):
        alone.resolve()
    assert resolve.unfinished(alone.settings) == []


def test_a_row_that_goes_meanwhile_is_not_unfinished(alone: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    alone.source()
    monkeypatch.setattr(Store, "names", lambda self: [("ba9876543210", Role.SOURCE), (ID, Role.SOURCE)])
    assert resolve.unfinished(alone.settings) == [ID]

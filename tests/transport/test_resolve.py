"""`phaul resolve` and `phaul report` over rows as dead agents leave them, with agents of this host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phaul.desk import Desk, Kind
from phaul.journal import Row, Store, Task, boot_id
from phaul.migration import Role
from phaul.migration import Row as State
from phaul.transport.control import Frame

ID = "0123456789ab"
NOWHERE = "root@127.0.0.1:1"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A journal with a row of a source that had committed when its agent died; nobody listens at its destination."""
    store = Store(tmp_path / "state")
    facts = {"boot": boot_id(), "owner": Task(pid=os.getpid(), start=1), "peer": NOWHERE, "program": "pid 812 (redis)"}
    with store.create(Row(migration=ID, role=Role.SOURCE, **facts)) as journal:  # type: ignore[arg-type]
        journal.transition(State.PREPARED, State.FROZEN)
        journal.transition(State.FROZEN, State.COMMITTED)
    return store


def phaul(store: Store, *words: str, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    directories = {
        "PHAUL_AGENT_STATE_DIRECTORY": str(store.directory),
        "PHAUL_AGENT_RUN_DIRECTORY": str(store.directory.parent / "run"),
    }
    command = [sys.executable, "-m", "phaul", *words]
    return subprocess.run(
        command, env=os.environ | directories, stdin=stdin, capture_output=True, text=True, timeout=60
    )


def state(store: Store) -> tuple[str, bool]:
    journal = store.open(ID, Role.SOURCE)
    assert journal is not None
    with journal:
        return str(journal.row.state), bool(journal.row.ended)


def test_without_the_other_host_it_takes_the_operators_word(store: Store) -> None:
    done = phaul(store, "resolve", ID)
    assert done.returncode == 40, done
    assert "the copy on this host is frozen" in done.stderr
    assert f"phaul resolve {ID} --keep destination" in done.stderr
    assert f"phaul resolve {ID} --keep source" in done.stderr
    assert state(store) == (str(State.COMMITTED), False)


WORDS = [
    ("source", "dead", State.ABORTED, "it runs on here"),
    ("destination", "running", State.RELEASED, "it runs on root@127.0.0.1:1"),
]


@pytest.mark.parametrize(("keep", "assertion", "after", "words"), WORDS)
def test_the_operators_word_is_done(store: Store, keep: str, assertion: str, after: State, words: str) -> None:
    done = phaul(store, "resolve", ID, "--keep", keep, "--assert", assertion)
    assert done.returncode == 0, done
    assert words in done.stdout
    assert state(store) == (str(after), True)


@pytest.mark.parametrize(
    ("keep", "assertion", "told"), [("source", "running", "TWICE"), ("destination", "dead", "LOST")]
)
def test_a_word_says_what_it_asserts(store: Store, keep: str, assertion: str, told: str) -> None:
    """Nothing is done before the operator has been told what he must be sure of, and has said that he is."""
    done = phaul(store, "resolve", ID, "--keep", keep)
    assert done.returncode == 2, done
    assert told in done.stderr
    assert f"--keep {keep} --assert" in done.stderr
    assert ("rolled back" in done.stderr) is (keep == "source")
    for words in (["--keep", keep, "--assert", assertion], ["--assert", assertion]):
        assert phaul(store, "resolve", ID, *words).returncode == 2
    assert state(store) == (str(State.COMMITTED), False)


@pytest.mark.parametrize(("typed", "status"), [("dead", 0), ("yes", 40)])
def test_on_a_terminal_it_is_typed(store: Store, typed: str, status: int) -> None:
    keyboard, terminal = os.openpty()
    os.write(keyboard, f"{typed}\n".encode())
    done = phaul(store, "resolve", ID, "--keep", "source", stdin=terminal)
    for fd in (keyboard, terminal):
        os.close(fd)
    assert done.returncode == status, done
    assert "If you are sure, type `dead`" in done.stderr
    assert state(store)[1] is (status == 0)


def test_on_the_other_side_no_word_counts(tmp_path: Path) -> None:
    """But that a copy which never ran is given up."""
    store = Store(tmp_path / "state")
    facts = {"boot": boot_id(), "owner": Task(pid=os.getpid(), start=1), "peer": "db1"}
    with store.create(Row(migration=ID, role=Role.DESTINATION, **facts)) as journal:  # type: ignore[arg-type]
        journal.transition(State.PREPARED, State.PARKED)
    done = phaul(store, "resolve", ID, "--keep", "destination", "--assert", "running")
    assert done.returncode == 2
    assert "is not for this side" in done.stderr
    done = phaul(store, "resolve", ID, "--keep", "source", "--assert", "dead")
    assert done.returncode == 0, done
    assert "the copy here never ran and is gone" in done.stdout


def ask_there(store: Store, role: str = "destination") -> dict[str, str]:
    """What a source's question through SSH is answered by this host's desk."""
    frame = Frame(Kind.RESOLVE, json.dumps({"migration": ID, "role": role, "answer": "ask", "keep": ""}).encode())
    reply = Desk(store.directory, store.directory.parent / "run")._reply(frame)
    assert reply.type == Kind.ANSWER, reply.body
    answer: dict[str, str] = json.loads(reply.body)
    return answer


@pytest.mark.parametrize(
    ("before", "answer", "after"),
    [
        ((), "DISCARDED", State.DISCARDED),
        ((State.PARKED,), "DISCARDED", State.DISCARDED),
        ((State.PARKED, State.RESUMED), "RESUMED", State.RESUMED),
        ((State.PARKED, State.RESUMED, State.RELEASED), "RESUMED", State.RELEASED),
    ],
)
def test_a_question_leaves_a_living_agent_alive(
    tmp_path: Path, before: tuple[State, ...], answer: str, after: State
) -> None:
    """It is answered from the row, and what was not decided is then."""
    store = Store(tmp_path / "state")
    with subprocess.Popen(["sleep", "60"]) as agent:
        try:
            row = Row(migration=ID, role=Role.DESTINATION, boot=boot_id(), owner=Task.of(agent.pid))
            with store.create(row) as journal:
                for state in before:
                    journal.transition(journal.row.state, state)
            assert ask_there(store)["answer"] == answer
            assert agent.poll() is None
        finally:
            agent.kill()
    journal = store.open(ID, Role.DESTINATION)  # type: ignore[assignment]
    with journal:
        assert journal.row.state is after


def test_all_that_nobody_works_on_is_finished_at_once(store: Store) -> None:
    """As at boot: without an ID, and with the status of the worst."""
    other = "ba9876543210"
    with store.create(Row(migration=other, role=Role.SOURCE, boot=boot_id(), owner=Task(pid=os.getpid(), start=1))):
        pass
    done = phaul(store, "resolve")
    assert done.returncode == 40, done
    assert f"{other}: it runs on here" in done.stdout
    assert "the copy on this host is frozen" in done.stderr
    assert phaul(store, "resolve", "--keep", "source").returncode == 2
    assert phaul(store, "resolve", ID, "--keep", "source", "--assert", "dead").returncode == 0
    again = phaul(store, "resolve")
    assert (again.returncode, again.stdout) == (0, "nothing is left to finish\n")


def test_in_json_doubt_and_loss_are_told_too(store: Store, tmp_path: Path) -> None:
    for words in ((ID,), ()):
        done = phaul(store, "resolve", *words, "--json")
        told = json.loads(done.stdout)
        assert (done.returncode, told["event"], told["id"], told["outcome"]) == (40, "resolved", ID, "in-doubt"), done
        assert "the copy on this host is frozen" in told["where"]
        assert f"phaul resolve {ID} --keep source" in told["advice"]
    there = Store(tmp_path / "there" / "state")
    facts = {"boot": "0" * 36, "owner": Task(pid=os.getpid(), start=1), "peer": "db1"}
    with there.create(Row(migration=ID, role=Role.DESTINATION, **facts)) as journal:  # type: ignore[arg-type]
        journal.transition(State.PREPARED, State.PARKED)
        journal.transition(State.PARKED, State.RESUMED)
    done = phaul(there, "resolve", ID, "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["outcome"]) == (50, "lost"), done
    assert "this host went down after the program had gone on here" in told["reason"]
    unknown = phaul(store, "resolve", "ffffffffffff", "--json")
    assert (unknown.returncode, json.loads(unknown.stdout)["outcome"]) == (1, "error"), unknown


def test_a_report_tells_every_state(store: Store) -> None:
    told = json.loads(phaul(store, "report", "--json").stdout)
    assert [change["state"] for change in told["history"]] == ["prepared", "frozen", "committed"]
    shown = phaul(store, "report", ID).stdout
    assert "pid 812 (redis)" in shown
    assert f"phaul resolve {ID}" in shown


def test_what_is_not_known_is_said(store: Store) -> None:
    done = phaul(store, "resolve", "ba9876543210")
    assert done.returncode == 1
    assert "this host knows no migration" in done.stderr

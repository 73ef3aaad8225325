"""Recovery where no cgroup is needed: rows of any kind, agents that do not die, lines to the other side, an arbiter."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phaul import recovery, workloads
from phaul.arbiter import DISCARDED, Arbiter
from phaul.asking import Line
from phaul.errors import ArbiterError, OverruledError, PhaulError
from phaul.journal import RECORD, Journal, Row, Store, Task, Undo, boot_id
from phaul.migration import Message, Outcome, Role, Work
from phaul.migration import Row as State
from phaul.recovery import Deeds, Handler, Recovery
from phaul.workloads import Workload
from tests.page_streams import descriptors
from tests.unit.lines import ID, There, links

WAY = {
    Role.SOURCE: (State.FROZEN, State.COMMITTED, State.RELEASED),
    Role.DESTINATION: (State.PARKED, State.RESUMED, State.RELEASED),
}


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


def row_in(store: Store, role: Role, state: State, **facts: Any) -> Journal:
    """A row as its agent, which is dead, has left it."""
    owner = facts.pop("owner", Task(pid=os.getpid(), start=1))
    journal = store.create(Row(migration=ID, role=role, boot=boot_id(), owner=owner, **facts))
    for after in WAY[role]:
        if journal.row.state is not state:
            journal.transition(journal.row.state, after)
    assert journal.row.state is state
    return journal


# -- deeds ----------------------------------------------------------------------------------------------------------


def test_a_deed_that_there_is_nothing_to_redo_of_is_passed_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recovery.HANDLERS, "deed", Handler(lambda data: pytest.fail("undone")))
    with row_in(store, Role.DESTINATION, State.RESUMED, undo=(Undo(kind="deed"),)) as journal:
        Recovery(journal).run()
        assert journal.row.warning == ""


def test_a_deed_of_another_phaul_is_told(store: Store) -> None:
    with row_in(store, Role.SOURCE, State.FROZEN, undo=(Undo(kind="of the future"),)) as journal:
        assert Recovery(journal).run().outcome is Outcome.STAYED
        assert "unknown kind 'of the future'" in journal.row.warning


def test_what_takes_an_agent_is_refused(store: Store) -> None:
    with row_in(store, Role.SOURCE, State.PREPARED) as journal, pytest.raises(ValueError, match="needs an agent"):
        Deeds(journal).do(Work.COPY)


class Runtime(Workload):
    """Notes what it is told. With `error`, that fails: so many `times`, for ever without."""

    kind = "runtime"

    def __init__(self, error: Exception | None = None, times: int | None = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self._error, self._left = error, times

    def find(self, name: str) -> workloads.Found:
        raise NotImplementedError

    def _note(self, *what: Any) -> None:
        if self._error is not None and self._left != 0:
            self._left = None if self._left is None else self._left - 1
            raise self._error
        self.told.append(what)

    def let_go(self, facts: dict[str, Any]) -> None:
        self._note("let go", facts)

    def give_up(self, facts: dict[str, Any]) -> None:
        self._note("give up", facts)

    def withdraw(self, notes: dict[str, Any]) -> None:
        self._note("withdraw", notes)

    def take_over(self, notes: dict[str, Any], root: int, pids: Any) -> None:
        self._note("take over", notes, root, list(pids))


@pytest.mark.parametrize(
    ("role", "state", "told"),
    [
        (Role.SOURCE, State.FROZEN, ("let go", {"name": "web"})),
        (Role.SOURCE, State.RELEASED, ("give up", {"name": "web"})),
        (Role.DESTINATION, State.PARKED, ("withdraw", {"name": "web"})),
        (Role.DESTINATION, State.RELEASED, ("take over", {"name": "web"}, 7, [7, 9])),
    ],
)
def test_the_runtime_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch, role: Role, state: State, told: tuple[Any, ...]
) -> None:
    runtime = Runtime()
    monkeypatch.setattr(workloads, "of", {"lxc": runtime}.__getitem__)
    key = "facts" if role is Role.SOURCE else "notes"
    workload = {"kind": "lxc", key: {"name": "web"}}
    with row_in(store, role, state, workload=workload, tasks=(Task(pid=7, start=1), Task(pid=9, start=1))) as journal:
        Recovery(journal).run()
        assert runtime.told == [told]
        assert journal.row.ended


def test_a_runtime_that_fails_is_told_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(PhaulError("it is busy"), times=2)
    monkeypatch.setattr(workloads, "of", lambda kind: runtime)
    monkeypatch.setattr("phaul.recovery._PAUSE", 0.0)
    workload = {"kind": "lxc", "facts": {"name": "web"}}
    with row_in(store, Role.SOURCE, State.RELEASED, workload=workload) as journal:
        Recovery(journal).run()
        assert runtime.told == [("give up", {"name": "web"})]
        assert not journal.row.warning


def test_a_runtime_that_fails_keeps_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phaul.recovery.RUNTIME_PATIENCE", 0.0)
    monkeypatch.setattr(workloads, "of", lambda kind: Runtime(PhaulError("it does not answer")))
    workload = {"kind": "lxc", "facts": {"name": "web"}}
    with row_in(store, Role.SOURCE, State.FROZEN, workload=workload) as journal:
        assert Recovery(journal).run().outcome is Outcome.STAYED
        assert journal.row.warning == "lxc: it does not answer"
        assert journal.row.ended


def test_a_runtime_takes_over_nothing_that_has_no_tasks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(workloads, "of", lambda kind: runtime)
    with row_in(store, Role.DESTINATION, State.RELEASED, workload={"kind": "lxc", "notes": {}}) as journal:
        Recovery(journal).run()
    assert runtime.told == []


# -- agents ---------------------------------------------------------------------------------------------------------


def gone() -> Task:
    with subprocess.Popen(["true"]) as process:
        task = Task.of(process.pid)
    return task


def test_an_agent_that_is_gone_is_in_nobodys_way() -> None:
    recovery.fence(gone())


def test_an_agent_that_does_not_die_is_not_acted_beside(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits for a device: it is killed, and stays."""
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda fd, number: None)
    monkeypatch.setattr(recovery, "_KILL_PATIENCE", 0.05)
    with subprocess.Popen(["sleep", "60"]) as agent:
        with row_in(store, Role.SOURCE, State.FROZEN, owner=Task.of(agent.pid)) as journal:
            with pytest.raises(PhaulError, match="does not die"):
                Recovery(journal).run()
            assert journal.refresh().state is State.FROZEN
        agent.kill()


def test_an_agent_that_dies_by_itself_is_dead() -> None:
    """Between the look at it and the signal."""
    agent = subprocess.Popen(["sleep", "60"])

    class Dying(Task):
        @property
        def alive(self) -> bool:
            agent.kill()
            agent.wait()
            return True

    recovery.fence(Dying(pid=agent.pid, start=1))


# -- the row --------------------------------------------------------------------------------------------------------


def test_what_another_process_has_decided_meanwhile_is_done(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with row_in(store, Role.DESTINATION, State.PARKED) as journal:
        decide = journal.transition

        def late(expected: State, to: State, **more: Any) -> None:
            monkeypatch.undo()
            other = store.open(ID, Role.DESTINATION)
            assert other is not None
            with other:
                other.transition(State.PARKED, State.RESUMED)
            decide(expected, to, **more)

        monkeypatch.setattr(journal, "transition", late)
        made = Recovery(journal, asked=True)
        made.run()
        assert [send.message for send in made.sent] == [Message.RESUMED]
        assert journal.row.state is State.RESUMED


@contextlib.contextmanager
def full() -> Iterator[None]:
    """No file can be written to beyond its first record (setrlimit(2))."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RECORD, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_row_that_cannot_be_written_is_removed_before_the_copy_dies(store: Store) -> None:
    """Whoever asks is told "unknown" then, which decides nothing."""
    with row_in(store, Role.DESTINATION, State.PARKED) as journal:
        with full():
            assert Recovery(journal).run().outcome is Outcome.STAYED
        assert not journal.path.exists()


# -- the arbiter ----------------------------------------------------------------------------------------------------


class Register:
    """An arbiter's register, in memory. `error` is what is met first."""

    def __init__(self, error: Exception | None = None) -> None:
        self.says, self.error, self.open = "open", error, 0

    def _meet(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def decide(self, wanted: str) -> None:
        self._meet()
        if self.says not in ("open", wanted):
            raise OverruledError(f"the arbiter says {self.says}")
        self.says = wanted

    def overrule(self, value: str) -> None:
        self._meet()
        self.says = value

    def forget(self) -> None:
        self._meet()
        self.says = "nothing"

    def close(self) -> None:
        self.open -= 1

    def of_row(self, noted: dict[str, Any], migration: str) -> Register:
        assert (noted, migration) == (NOTED, ID)
        self.open += 1
        return self


NOTED = {"endpoints": ["https://etcd.example:2379"]}


def put(register: Register, monkeypatch: pytest.MonkeyPatch) -> Register:
    monkeypatch.setattr(Arbiter, "of_row", register.of_row)
    return register


@pytest.mark.parametrize(
    ("says", "error", "after", "outcome"),
    [
        ("open", None, State.DISCARDED, Outcome.STAYED),
        ("resumed", None, State.RESUMED, Outcome.MIGRATED),
        ("open", ArbiterError("nobody answers"), State.PARKED, Outcome.IN_DOUBT),
    ],
)
def test_a_destination_that_is_not_decided_asks_the_arbiter(
    store: Store, monkeypatch: pytest.MonkeyPatch, says: str, error: Exception, after: State, outcome: Outcome
) -> None:
    register = put(Register(error), monkeypatch)
    register.says = says
    with row_in(store, Role.DESTINATION, State.PARKED, arbiter=NOTED) as journal:
        assert Recovery(journal).run().outcome is outcome
        assert journal.row.state is after
    assert register.open == 0


@pytest.mark.parametrize(("error", "left"), [(None, "nothing"), (ArbiterError("nobody answers"), "discarded")])
def test_a_source_that_has_ended_needs_its_arbiter_no_more(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception | None, left: str
) -> None:
    register = put(Register(), monkeypatch)
    register.says, register.error = DISCARDED, error
    with row_in(store, Role.SOURCE, State.FROZEN, arbiter=NOTED) as journal:
        assert Recovery(journal).run().outcome is Outcome.STAYED
        assert journal.row.ended
    assert (register.says, register.open) == (left, 0)


@pytest.mark.parametrize(("error", "left"), [(None, "discarded"), (ArbiterError("nobody answers"), "resumed")])
def test_the_operators_word_is_told_to_the_arbiter(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception | None, left: str
) -> None:
    register = put(Register(error), monkeypatch)
    register.says = "resumed"
    with row_in(store, Role.SOURCE, State.COMMITTED, arbiter=NOTED) as journal:
        recovery.overrule_register(journal.row)
    assert (register.says, register.open) == (left, 0)


def test_without_an_arbiter_nobody_is_told(store: Store) -> None:
    with row_in(store, Role.SOURCE, State.COMMITTED) as journal:
        recovery.overrule_register(journal.row)


# -- the other side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "outcome", "after"),
    [
        ((State.PARKED, State.RESUMED), Outcome.MIGRATED, State.RELEASED),
        ((State.PARKED,), Outcome.STAYED, State.DISCARDED),
    ],
)
def test_a_committed_source_asks_and_tells(
    store: Store, tmp_path: Path, states: tuple[State, ...], outcome: Outcome, after: State
) -> None:
    with There(tmp_path / "there", *states) as there:
        with row_in(store, Role.SOURCE, State.COMMITTED, link=there.here) as journal:
            assert recovery.recover_source(journal).outcome is outcome
        assert there.ends(), "it has heard all it needs"
        with there.row() as row:
            assert row.row.state is after


def test_a_source_that_was_frozen_tells_of_the_abort(store: Store, tmp_path: Path) -> None:
    with There(tmp_path / "there", State.PARKED) as there:
        with row_in(store, Role.SOURCE, State.FROZEN, link=there.here) as journal:
            assert recovery.recover_source(journal).outcome is Outcome.STAYED
        assert there.ends()


@pytest.mark.parametrize("state", [State.PREPARED, State.RELEASED])
def test_without_a_line_there_is_nobody_to_tell(store: Store, state: State) -> None:
    with row_in(store, Role.SOURCE, state) as journal:
        ended = recovery.recover_source(journal)
        assert ended.outcome is (Outcome.STAYED if state is State.PREPARED else Outcome.MIGRATED)


def recovered(store: Store) -> threading.Thread:
    """A destination's recovery, in a thread."""

    def main() -> None:
        journal = store.open(ID, Role.DESTINATION)
        assert journal is not None
        with journal:
            recovery.recover_destination(journal)

    thread = threading.Thread(target=main)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("state", "answer", "last"),
    [
        (State.PARKED, Message.DISCARDED, Message.ABORT),
        (State.RESUMED, Message.RESUMED, Message.RELEASED),
    ],
)
def test_a_recovered_destination_answers_until_the_source_knows(
    store: Store, state: State, answer: Message, last: Message
) -> None:
    here, there = links()
    row_in(store, Role.DESTINATION, state, link=there).close()
    thread = recovered(store)
    with contextlib.closing(Line(ID, here)) as line:
        for _ in range(2):
            found = line.ask(Message.ASK, 10)
            assert found is not None
            assert found.message is answer
        line.tell(last, "", 10)
        thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("facts", [{}, {"link": None, "boot": "another"}])
def test_a_destination_that_nobody_asks_answers_nobody(store: Store, facts: dict[str, Any]) -> None:
    """Without a line, or in another boot."""
    with row_in(store, Role.DESTINATION, State.PARKED) as journal:
        if facts:
            journal.note(boot=facts["boot"], link=links()[1])
        ended = recovery.recover_destination(journal)
        assert ended.outcome is (Outcome.IN_DOUBT if facts else Outcome.STAYED)


def test_an_address_that_is_not_ours_any_more_is_told(store: Store) -> None:
    link = {**links()[1], "host": "192.0.2.1"}
    with row_in(store, Role.DESTINATION, State.PARKED, link=link) as journal:
        assert recovery.recover_destination(journal).outcome is Outcome.STAYED
        assert "the source cannot be answered from here" in journal.refresh().warning


def test_a_source_without_a_row_has_nothing_to_recover(store: Store) -> None:
    store.prepare()
    assert recovery.main(["source", ID, str(store.directory)]) == 0

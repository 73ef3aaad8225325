"""Recovery and keeper with real processes, cgroups and journals."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phaul_engine import lock_move, silence
from phaul_engine.cgroup import Hierarchy, Hold, HoldGoneError, path_of
from phaul_engine.network.address import Address
from phaul_engine.network.interfaces import holder_of
from phaul_engine.objects import file_locks
from pydantic import JsonValue

from phaul import keeper, recovery
from phaul.journal import Journal, Row, Store, Task, Undo, boot_id
from phaul.migration import Message, Outcome, Received, Role
from phaul.migration import Row as State
from phaul.recovery import Handler, Recovery

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ENDED = {
    (Role.SOURCE, State.PREPARED): (State.ABORTED, True),
    (Role.SOURCE, State.FROZEN): (State.ABORTED, True),
    (Role.SOURCE, State.ABORTED): (State.ABORTED, True),
    (Role.SOURCE, State.RELEASED): (State.RELEASED, False),
    (Role.DESTINATION, State.PREPARED): (State.DISCARDED, False),
    (Role.DESTINATION, State.PARKED): (State.DISCARDED, False),
    (Role.DESTINATION, State.RESUMED): (State.RESUMED, True),
    (Role.DESTINATION, State.DISCARDED): (State.DISCARDED, False),
}
WAY = {
    Role.SOURCE: {
        State.PREPARED: (),
        State.FROZEN: (State.FROZEN,),
        State.COMMITTED: (State.FROZEN, State.COMMITTED),
        State.ABORTED: (State.FROZEN, State.ABORTED),
        State.RELEASED: (State.FROZEN, State.COMMITTED, State.RELEASED),
    },
    Role.DESTINATION: {
        State.PREPARED: (),
        State.PARKED: (State.PARKED,),
        State.RESUMED: (State.PARKED, State.RESUMED),
        State.RELEASED: (State.PARKED, State.RESUMED, State.RELEASED),
        State.DISCARDED: (State.DISCARDED,),
    },
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.fixture
def deeds(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    done: list[tuple[str, Any]] = []
    handler = Handler(lambda data: done.append(("undo", data["n"])), lambda data: done.append(("redo", data["n"])))
    monkeypatch.setitem(recovery.HANDLERS, "deed", handler)
    return done


@pytest.fixture
def program() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(["sleep", "60"])
    yield child
    child.kill()
    child.wait()


@pytest.fixture
def hold(program: subprocess.Popen[bytes]) -> Iterator[Hold]:
    with Hierarchy.find() as hierarchy:
        made = Hold.create(hierarchy, path_of(program.pid), f"phaul-test-{os.getpid()}")
        made.gather(lambda: [program.pid])
        made.freeze(2.0)
        yield made
        with contextlib.suppress(HoldGoneError):
            left = Hold.open(hierarchy, made.path)
            left.kill(5.0)
            left.remove()


def row_in(store: Store, role: Role, state: State, cgroup: str = "", owner: Task | None = None) -> Journal:
    owner = owner or Task(pid=os.getpid(), start=0)
    journal = store.create(Row(migration="m1", role=role, boot=boot_id(), owner=owner, cgroup=cgroup))
    journal.note(undo=(Undo(kind="deed", data={"n": 1}), Undo(kind="deed", data={"n": 2})))
    for after in WAY[role][state]:
        journal.transition(journal.row.state, after)
    return journal


def once(do: Any) -> Any:
    """A deed that fails must not hide behind the next try."""

    def checked(self: recovery.Deeds, work: Any) -> None:
        try:
            do(self, work)
        except Exception as error:
            raise AssertionError(f"{work.name} failed") from error

    return checked


@pytest.mark.parametrize(("role", "state"), list(ENDED))
def test_the_row_decides_and_twice_is_harmless(
    role: Role,
    state: State,
    store: Store,
    program: subprocess.Popen[bytes],
    hold: Hold,
    deeds: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after, lives = ENDED[role, state]
    monkeypatch.setattr(recovery.Deeds, "do", once(recovery.Deeds.do))
    with row_in(store, role, state, hold.path) as journal:
        for _ in range(2):
            Recovery(journal).run()
            assert journal.row.state is after
            assert (program.poll() is None) == lives
            with pytest.raises(HoldGoneError):
                _ = hold.frozen
        assert not lives or path_of(os.getpid()) == path_of(program.pid)
        redone = state is State.RESUMED
        assert deeds[:2] == ([("redo", 1), ("redo", 2)] if redone else [("undo", 2), ("undo", 1)])
        assert bool(journal.row.ended) == (state is not State.RESUMED)


def test_a_committed_source_stays_frozen_without_an_answer(
    store: Store, program: subprocess.Popen[bytes], hold: Hold, deeds: list[Any]
) -> None:
    with row_in(store, Role.SOURCE, State.COMMITTED, hold.path) as journal:
        ended = Recovery(journal).run()
        assert (ended.outcome, journal.row.state) == (Outcome.IN_DOUBT, State.COMMITTED)
        assert hold.frozen
        assert deeds == []


@pytest.mark.parametrize(("answer", "lives"), [(Message.DISCARDED, True), (Message.RESUMED, False)])
def test_a_committed_source_does_what_the_destination_says(
    answer: Message, lives: bool, store: Store, program: subprocess.Popen[bytes], hold: Hold, deeds: list[Any]
) -> None:
    asked: list[Message] = []

    def ask(message: Message, timeout: float) -> Received | None:
        asked.append(message)
        return Received(answer) if message is Message.ASK else Received(Message.GOODBYE)

    with row_in(store, Role.SOURCE, State.COMMITTED, hold.path) as journal:
        ended = Recovery(journal, ask=ask).run()
        assert ended.outcome is (Outcome.STAYED if lives else Outcome.MIGRATED)
        assert (program.poll() is None) == lives
    assert asked == ([Message.ASK] if lives else [Message.ASK, Message.RELEASED])


@pytest.mark.parametrize(("keep", "lives"), [(Role.SOURCE, True), (Role.DESTINATION, False)])
def test_the_operator_s_word_ends_doubt(
    keep: Role, lives: bool, store: Store, program: subprocess.Popen[bytes], hold: Hold, deeds: list[Any]
) -> None:
    with row_in(store, Role.SOURCE, State.COMMITTED, hold.path) as journal:
        Recovery(journal, keep=keep).run()
        assert (program.poll() is None) == lives


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_copy_without_a_row_is_killed_and_no_other(
    store: Store, program: subprocess.Popen[bytes], hold: Hold, frozen: bool
) -> None:
    if not frozen:
        hold.thaw()
    recovery.main(["destination", hold.path.rpartition("phaul-")[2], str(store.directory)])
    assert (program.poll() is None) != frozen


def test_a_released_source_has_the_moved_addresses_no_more(store: Store, deeds: list[Any]) -> None:
    """Whatever the device is called there; one that is not here is no mistake."""
    address = Address.prepare("192.0.2.9/32@lo")
    address.add()
    address.close()
    assert holder_of("192.0.2.9") == "lo"
    with row_in(store, Role.SOURCE, State.RELEASED) as journal:
        journal.note(addresses=("192.0.2.8/24@eth7", "192.0.2.9/32@eth7"))
        Recovery(journal).run()
        assert journal.row.warning == ""
    assert holder_of("192.0.2.9") is None


def test_file_locks_that_are_lost_are_told_and_taken_once(
    store: Store, program: subprocess.Popen[bytes], hold: Hold, deeds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program goes on without: here at a descriptor that it does not have."""
    monkeypatch.setattr(recovery, "LOCK_PATIENCE", 0.1)
    given: dict[str, JsonValue] = {
        "root": program.pid,
        "locks": [list(lock_move.Mark(program.pid, 99, 1, file_locks.FLOCK, 0, 0))],
    }
    with row_in(store, Role.SOURCE, State.FROZEN, hold.path) as journal:
        journal.note(undo=(Undo(kind=lock_move.KIND, data=given),))
        assert Recovery(journal).run().outcome is Outcome.STAYED
        assert "a file lock is lost" in journal.row.warning
        assert journal.row.undo[-1] == Undo(kind=lock_move.KIND, data={"locks": []})
    assert path_of(program.pid) == path_of(os.getpid())


def test_a_copy_that_may_have_spoken_is_dead_and_told(
    store: Store, program: subprocess.Popen[bytes], hold: Hold, deeds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = silence.kill
    monkeypatch.setattr(silence, "kill", lambda hold, timeout: kill(hold, timeout) or "it could not be silenced")
    with row_in(store, Role.DESTINATION, State.PARKED, hold.path) as journal:
        Recovery(journal).run()
        assert journal.row.warning == "it could not be silenced"
    assert program.poll() is not None


def test_a_cgroup_that_goes_meanwhile_has_nothing_left_to_act_on(
    store: Store, program: subprocess.Popen[bytes], hold: Hold, deeds: list[Any]
) -> None:
    done: list[str] = []

    def act(opened: Hold) -> None:
        hold.kill(5.0)
        hold.remove()
        done.append("removed")
        opened.members()
        done.append("read")

    with row_in(store, Role.SOURCE, State.FROZEN, hold.path) as journal:
        recovery.Deeds(journal)._with_hold(act)
    assert done == ["removed"]


def test_without_a_row_and_a_copy_there_is_nothing_to_kill(store: Store) -> None:
    assert recovery.main(["destination", "fedcba987654", str(store.directory)]) == 0


def test_answers_come_from_the_row(store: Store, deeds: list[Any]) -> None:
    for state, answer in ((State.PARKED, Message.DISCARDED), (State.RESUMED, Message.RESUMED)):
        with row_in(store, Role.DESTINATION, state) as journal:
            for _ in range(2):
                run = Recovery(journal)
                run.run()
                assert [send.message for send in run.sent] == [answer]
            journal.remove()


def test_a_living_agent_is_ended_first(store: Store, deeds: list[Any]) -> None:
    agent = subprocess.Popen(["sleep", "60"])
    with row_in(store, Role.SOURCE, State.FROZEN, owner=Task.of(agent.pid)) as journal:
        Recovery(journal).run()
    assert agent.wait(5) == -signal.SIGKILL


def test_a_process_with_the_agent_s_number_is_not_touched(store: Store, deeds: list[Any]) -> None:
    other = subprocess.Popen(["sleep", "60"])
    with row_in(store, Role.SOURCE, State.FROZEN, owner=Task(pid=other.pid, start=1)) as journal:
        Recovery(journal).run()
    assert other.poll() is None
    other.kill()
    other.wait()


def test_what_cannot_be_taken_back_does_not_keep_the_program(
    store: Store, program: subprocess.Popen[bytes], hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(data: dict[str, Any]) -> None:
        raise OSError(1, "no")

    monkeypatch.setitem(recovery.HANDLERS, "deed", Handler(fails))
    with row_in(store, Role.SOURCE, State.FROZEN, hold.path) as journal:
        assert Recovery(journal).run().outcome is Outcome.STAYED
        assert "deed" in journal.row.warning
    assert path_of(program.pid) == path_of(os.getpid())


def test_what_is_left_beside_the_program_is_removed_at_another_try(
    store: Store, program: subprocess.Popen[bytes], hold: Hold, deeds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides know; the program must not stay in a cgroup that nobody will ever remove."""
    hold.thaw()
    monkeypatch.setitem(recovery.HANDLERS, "hold", Handler(lambda data: deeds.append(("undo", "hold"))))
    row_in(store, Role.DESTINATION, State.RELEASED, hold.path).close()
    arguments = ["destination", "m1", str(store.directory)]
    with monkeypatch.context() as patch:
        patch.setattr(Hold, "disband", lambda self: (_ for _ in ()).throw(OSError(16, "busy")))
        assert recovery.main(arguments) == 1, "the keeper is to try again"
    journal = store.open("m1", Role.DESTINATION)
    assert journal is not None
    with journal:
        assert not journal.row.ended
        journal.note(undo=(Undo(kind="hold"),))
        assert recovery.main(arguments) == 0
        assert journal.refresh().ended
    assert deeds == [("undo", "hold")], "what the program goes on with stays"
    assert path_of(program.pid) == path_of(os.getpid())


def test_the_keeper_s_own_command_finds_and_finishes_the_row(store: Store) -> None:
    """The agent cannot even start."""
    with row_in(store, Role.DESTINATION, State.PREPARED) as journal:
        pid = os.fork()
        if pid == 0:
            try:
                keeper.AGENTS["destination"] = "no.such.module"
                status = keeper.main(
                    ["destination", "m1", str(os.open("/dev/null", os.O_RDONLY)), str(store.directory)]
                )
            finally:
                os._exit(status)
        os.waitpid(pid, 0)
        deadline = time.monotonic() + 5
        while not journal.refresh().ended and time.monotonic() < deadline:
            time.sleep(0.05)
        assert journal.row.state is State.DISCARDED

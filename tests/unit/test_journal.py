"""The journal: what a crash at any byte leaves, races between processes, and files that are not what they should be."""

import fcntl
import itertools
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaul import journal as journals
from phaul.errors import JournalBusyError, JournalError, LostRaceError
from phaul.journal import RECORD, Journal, Row, Store, Task, Undo, boot_id
from phaul.migration import MOVES, Role
from phaul.migration import Row as State

OWNER = Task.of(os.getpid())


def new_row(migration: str = "m1", role: Role = Role.SOURCE) -> Row:
    return Row(migration=migration, role=role, boot=boot_id(), owner=OWNER, peer="b", cgroup="/x/phaul-m1")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


def reopened(store: Store, journal: Journal) -> Row:
    again = store.open(journal.row.migration, journal.row.role)
    assert again is not None
    with again:
        return again.row


def test_a_row_is_what_it_was_made_of_and_changed_to(store: Store) -> None:
    tasks = (OWNER, Task(pid=7, start=9))
    with store.create(new_row()) as journal:
        journal.note(tasks=tasks, addresses=("10.0.0.1/24@eth0",))
        journal.transition(State.PREPARED, State.FROZEN, undo=(Undo(kind="steal", data={"link": "/sys/fs/bpf/x"}),))
        journal.note(undo=(Undo(kind="repair"),))
        journal.sync()
        row = journal.row
        assert reopened(store, journal) == row
    assert (row.state, row.tasks, row.addresses, row.peer) == (State.FROZEN, tasks, ("10.0.0.1/24@eth0",), "b")
    assert [entry.kind for entry in row.undo] == ["steal", "repair"]
    assert row.owned
    assert row.same_boot


def test_the_directory_and_the_files_are_root_s_alone(store: Store) -> None:
    with store.create(new_row()) as journal:
        assert store.directory.stat().st_mode & 0o777 == 0o700
        assert journal.path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in store.directory.iterdir()] == ["m1.source"]
    store.directory.chmod(0o755)
    with pytest.raises(JournalError, match="open to others"):
        store.create(new_row("m2"))


def test_changes_that_nobody_looks_at_meanwhile_add_up(store: Store) -> None:
    """A row is made of what was written when it is asked for: not in the freeze."""
    with store.create(new_row()) as journal:
        before = journal.row
        journal.transition(State.PREPARED, State.FROZEN, why="now", undo=(Undo(kind="steal"),), peer="c")
        journal.transition(State.FROZEN, State.COMMITTED, undo=(Undo(kind="repair"),))
        row = journal.row
        assert (before.state, before.undo) == (State.PREPARED, ())
        assert (row.state, row.why, row.peer, row.since > before.since) == (State.COMMITTED, "", "c", True)
        assert [entry.kind for entry in row.undo] == ["steal", "repair"]
        assert row == reopened(store, journal)
        assert journal.row is row


def test_a_transition_is_the_same_json_whoever_writes_it(store: Store) -> None:
    """Those without a reason are not left to the encoder."""
    with store.create(new_row()) as journal:
        for to, why in ((State.FROZEN, ""), (State.PREPARED, "let go"), (State.FROZEN, "")):
            before = journal.row.state
            journal.transition(before, to, why=why)
            change, _ = journal._messages_so_far()[-1]
            assert change.pop("at") == journal.row.since
            assert change == {"from": before, "state": to} | ({"why": why} if why else {})


def test_a_change_from_another_state_is_refused_and_says_which(store: Store) -> None:
    with store.create(new_row()) as journal:
        journal.transition(State.PREPARED, State.ABORTED, why="cancelled")
        with pytest.raises(LostRaceError) as caught:
            journal.transition(State.PREPARED, State.FROZEN)
        assert caught.value.state == State.ABORTED
        assert reopened(store, journal).why == "cancelled"


@pytest.mark.parametrize("role", list(Role))
def test_illegal_moves_cannot_be_asked_for(store: Store, role: Role) -> None:
    with store.create(new_row(role=role)) as journal:
        for state in State:
            if state not in MOVES[role][State.PREPARED]:
                with pytest.raises(ValueError, match="does not go"):
                    journal.transition(State.PREPARED, state)


def test_one_of_two_processes_wins(store: Store) -> None:
    with store.create(new_row()) as first:
        second = store.open("m1", Role.SOURCE)
        assert second is not None
        with second:
            first.transition(State.PREPARED, State.FROZEN)
            second.transition(State.FROZEN, State.ABORTED)
            with pytest.raises(LostRaceError):
                first.transition(State.FROZEN, State.COMMITTED)
            assert first.row.state is second.refresh().state is State.ABORTED


def _race(directory: Path, to: State, go: float, wins: "multiprocessing.Queue[State]") -> None:
    journal = Store(directory).open("m1", Role.SOURCE)
    assert journal is not None
    time.sleep(max(0.0, go - time.monotonic()))
    try:
        journal.transition(State.FROZEN, to)
        wins.put(to)
    except LostRaceError:
        pass


def test_many_processes_decide_once(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        with store.create(new_row()) as journal:
            journal.transition(State.PREPARED, State.FROZEN)
            wins: multiprocessing.Queue[State] = context.Queue()
            go = time.monotonic() + 0.05
            racers = [
                context.Process(target=_race, args=(store.directory, to, go, wins))
                for to in (State.ABORTED, State.COMMITTED) * 2
            ]
            for racer in racers:
                racer.start()
            for racer in racers:
                racer.join()
            assert wins.get(timeout=1) is journal.refresh().state, attempt
            assert wins.empty()
            journal.remove()


def test_a_holder_of_the_lock_that_hangs_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_LOCK_PATIENCE", 0.05)
    with store.create(new_row()) as journal:
        fd = os.open(journal.path, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(JournalBusyError):
            journal.transition(State.PREPARED, State.FROZEN)
        os.close(fd)
        journal.transition(State.PREPARED, State.FROZEN)
        assert journal.row.state is State.FROZEN


def test_transitions_have_room_when_notes_have_none_left(store: Store) -> None:
    with store.create(new_row(), records=24) as journal:
        for _ in range(24 - 16 - 1):
            journal.note(undo=(Undo(kind="x", data={"fill": "y" * 300}),))
        with pytest.raises(JournalError, match="full"):
            journal.note(peer="c")
        kept = len(journal.row.undo)
        journal.transition(State.PREPARED, State.FROZEN)
        journal.transition(State.FROZEN, State.COMMITTED)
        journal.transition(State.COMMITTED, State.RELEASED)
        assert len(reopened(store, journal).undo) == kept


def test_a_transition_waits_for_no_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows survive the death of their agent by write(2) alone: no sync inside the freeze."""

    def syncs(fd: int) -> None:
        raise AssertionError("a sync inside the freeze")

    with store.create(new_row()) as journal:
        for name in ("fsync", "fdatasync", "sync"):
            monkeypatch.setattr(os, name, syncs, raising=False)
        journal.note(undo=(Undo(kind="steal"),))
        journal.transition(State.PREPARED, State.FROZEN)
        journal.transition(State.FROZEN, State.COMMITTED)
        monkeypatch.undo()
        assert reopened(store, journal).state is State.COMMITTED


def test_no_write_allocates(store: Store) -> None:
    with store.create(new_row()) as journal:
        before = journal.path.stat()
        journal.note(tasks=tuple(Task(pid=n, start=n) for n in range(1, 200)))
        journal.transition(State.PREPARED, State.FROZEN)
        after = journal.path.stat()
        assert (before.st_size, before.st_blocks) == (after.st_size, after.st_blocks)
        assert before.st_blocks * 512 >= before.st_size


def test_what_is_no_fact_of_a_row_cannot_be_set(store: Store) -> None:
    with store.create(new_row()) as journal:
        for facts in ({"state": State.FROZEN}, {"colour": "red"}):
            with pytest.raises(ValueError, match="cannot be set"):
                journal.note(**facts)
        assert journal.row == reopened(store, journal)


def test_a_change_that_was_written_in_part_is_none(store: Store) -> None:
    """A file size limit in the middle of it (setrlimit(2)); the row goes on from what it was."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with store.create(new_row()) as journal:
        before = journal.row
        resource.setrlimit(resource.RLIMIT_FSIZE, ((journal._next + 1) * RECORD, limits[1]))
        try:
            with pytest.raises(JournalError, match="short write"):
                journal.note(program="x" * RECORD)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert journal.refresh() == before == reopened(store, journal)
        journal.note(program="redis")
        assert reopened(store, journal).program == "redis"


def test_history_ends_where_the_file_is_damaged(store: Store) -> None:
    with store.create(new_row()) as journal:
        for state in (State.FROZEN, State.COMMITTED):
            journal.transition(journal.row.state, state)
        os.pwrite(journal._fd, bytes(RECORD), (journal._next - 1) * RECORD)
        assert [change.state for change in journal.history()] == ["prepared", "frozen"]


def test_an_ended_row_has_room_for_one_more_note(store: Store) -> None:
    """That the source has been heard of, which an agent that still waits for it sees."""
    with store.create(new_row(role=Role.DESTINATION)) as journal:
        journal.transition(State.PREPARED, State.DISCARDED)
        journal.end()
        other = store.open("m1", Role.DESTINATION)
        assert other is not None
        with other:
            other.note(heard=True)
            with pytest.raises(JournalError, match="full"):
                other.note(warning="and more")
        assert journal.refresh().heard
        assert reopened(store, journal).heard


def test_an_ended_row_is_history(store: Store) -> None:
    with store.create(new_row()) as journal:
        journal.transition(State.PREPARED, State.ABORTED)
        assert journal.end().ended
        assert journal.path.stat().st_size < 20 * RECORD
        assert reopened(store, journal).ended
    assert store.names() == [("m1", Role.SOURCE)]


def test_an_ended_row_has_no_key(store: Store) -> None:
    row = new_row().model_copy(update={"link": {"key": "SECRET" * 200, "port": 7}})
    with store.create(row) as journal:
        journal.note(tasks=tuple(Task(pid=n, start=n) for n in range(1, 80)))
        journal.transition(State.PREPARED, State.ABORTED, why="cancelled")
        assert reopened(store, journal).link["port"] == 7
        before = journal.history()
        ended = journal.end()
        assert ended.link == {}
        assert b"SECRET" not in journal.path.read_bytes()
        assert [path.name for path in store.directory.iterdir()] == ["m1.source"]
        assert journal.history()[:-1] == before
        assert reopened(store, journal).model_dump() == ended.model_dump() == journal.refresh().model_dump()
        assert reopened(store, journal).why == "cancelled"


def test_a_removed_row_does_not_come_back_when_it_ends(store: Store) -> None:
    with store.create(new_row()) as journal:
        journal.remove()
        journal.end()
    assert list(store.directory.iterdir()) == []


def test_a_row_ends_on_a_full_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with store.create(new_row()) as journal:
        journal.transition(State.PREPARED, State.ABORTED)
        monkeypatch.setattr(journals, "_write_all", full)
        assert journal.end().ended
        assert reopened(store, journal).ended
    assert [path.name for path in store.directory.iterdir()] == ["m1.source"]


def test_a_full_disk_is_met_when_the_row_is_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journals, "_write_all", full)
    with pytest.raises(JournalError, match="No space left"):
        store.create(new_row())
    assert list(store.directory.iterdir()) == []


def test_a_second_row_of_the_same_side_is_refused(store: Store) -> None:
    with store.create(new_row()), store.create(new_row(role=Role.DESTINATION)):
        with pytest.raises(JournalError, match="already"):
            store.create(new_row())
    assert sorted(store.names()) == [("m1", Role.DESTINATION), ("m1", Role.SOURCE)]


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "x" * 65, "a\n"])
def test_names_that_are_paths_are_refused(store: Store, name: str) -> None:
    with pytest.raises(JournalError):
        store.open(name, Role.SOURCE)


def test_no_row_is_no_error(store: Store) -> None:
    assert store.open("m9", Role.SOURCE) is None
    assert store.names() == []


# -- crashes ----------------------------------------------------------------------------------------------------------

CHANGES: list[Callable[[Journal], object]] = [
    lambda journal: journal.note(tasks=tuple(Task(pid=n, start=n) for n in range(1, 80))),
    lambda journal: journal.transition(State.PREPARED, State.FROZEN, undo=(Undo(kind="steal"),)),
    lambda journal: journal.note(undo=(Undo(kind="repair", data={"fill": "z" * 1500}),)),
    lambda journal: journal.transition(State.FROZEN, State.COMMITTED),
    lambda journal: journal.transition(State.COMMITTED, State.RELEASED),
]


def written(store: Store) -> tuple[list[bytes], list[Row]]:
    """The file after each change, and the row as it was then."""
    files, rows = [], []
    with store.create(new_row(), records=40) as journal:
        for change in (lambda journal: journal.row, *CHANGES):
            change(journal)
            files.append(journal.path.read_bytes())
            rows.append(journal.row)
    return files, rows


def put(store: Store, content: bytes) -> Journal:
    store.directory.mkdir(mode=0o700, exist_ok=True)
    (store.directory / "m1.source").write_bytes(content)
    journal = store.open("m1", Role.SOURCE)
    assert journal is not None
    return journal


def differences(before: bytes, after: bytes) -> tuple[int, int]:
    changed = [at for at in range(len(before)) if before[at] != after[at]]
    return changed[0], changed[-1] + 1


def test_every_prefix_of_every_write_opens_to_a_legal_row(store: Store, tmp_path: Path) -> None:
    files, rows = written(Store(tmp_path / "first"))
    for index, (before, after) in enumerate(itertools.pairwise(files)):
        first, last = differences(before, after)
        for cut in range(first, last + 1):
            with put(store, after[:cut] + before[cut:]) as journal:
                expected = rows[index + 1] if cut == last else rows[index]
                assert journal.row.model_dump() == expected.model_dump()


@pytest.mark.parametrize("index", range(len(CHANGES)))
def test_after_a_crash_at_any_byte_the_next_process_goes_on(store: Store, index: int, tmp_path: Path) -> None:
    files, _ = written(Store(tmp_path / "first"))
    first, last = differences(files[index], files[index + 1])

    @settings(max_examples=30, deadline=None)
    @given(cut=st.integers(first, last))
    def check(cut: int) -> None:
        with put(store, files[index + 1][:cut] + files[index][cut:]) as journal:
            state = journal.row.state
            if State.ABORTED in MOVES[Role.SOURCE][state]:
                journal.transition(state, State.ABORTED, undo=(Undo(kind="x", data={"fill": "q" * 900}),))
            row = journal.note(peer="c")
            assert reopened(store, journal).model_dump() == row.model_dump()

    check()


def test_a_crash_while_a_torn_message_is_wiped_is_a_crash_like_any(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third change takes several records; its last is torn off, and the next process dies wiping the rest."""
    files, rows = written(Store(tmp_path / "first"))
    _, last = differences(files[2], files[3])
    torn = files[3][: last - RECORD] + files[2][last - RECORD :]

    class Killed(BaseException):
        pass

    really = os.pwrite
    for survived in range(8):
        left = survived

        def dies(fd: int, data: bytes, offset: int) -> int:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            return really(fd, data, offset)

        with put(store, torn) as journal:
            monkeypatch.setattr(os, "pwrite", dies)
            try:
                journal.transition(State.FROZEN, State.ABORTED)
                ended = State.ABORTED
            except Killed:
                ended = State.FROZEN
            monkeypatch.setattr(os, "pwrite", really)
            row = reopened(store, journal)
            assert (row.state, row.undo) == (ended, rows[2].undo)
    assert ended is State.ABORTED


def test_a_crash_while_the_row_is_made_leaves_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(Killed):
        store.create(new_row())
    monkeypatch.undo()
    assert store.open("m1", Role.SOURCE) is None
    assert store.names() == []
    store.create(new_row()).close()


WRITING = ("write", "pwrite", "fsync", "fdatasync", "link", "unlink", "rename")


def a_life(store: Store, told: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """A row from its making to its end; `told` of every call that changes or syncs a file, after it. What the row was
    after each change."""
    rows = []

    def traced(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            result = act(*arguments, **more)
            told(name)
            return result

        return call

    with monkeypatch.context() as patch:
        for name in WRITING:
            patch.setattr(os, name, traced(name, getattr(os, name)))
        with store.create(new_row(), records=40) as journal:
            for change in (lambda journal: journal.row, *CHANGES, Journal.sync, Journal.end):
                change(journal)
                rows.append(journal.row)
    return rows


def test_a_host_that_goes_down_at_any_write_or_sync_has_a_legal_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prefix of what is done to the files, the making and the end with their renaming included."""
    store = Store(tmp_path / "first")
    states: list[tuple[str, dict[str, bytes]]] = []

    def look(name: str) -> None:
        states.append((name, {path.name: path.read_bytes() for path in store.directory.iterdir()}))

    rows = [row.model_dump() for row in a_life(store, look, monkeypatch)]
    at = -1
    for number, (name, files) in enumerate(states):
        other = Store(tmp_path / str(number))
        other.prepare()
        for path, content in files.items():
            (other.directory / path).write_bytes(content)
        journal = other.open("m1", Role.SOURCE)
        if journal is None:
            assert at == -1, "a row that was there is gone"
            continue
        with journal:
            row = journal.row.model_dump() | {"link": {}}
        found = next(index for index, one in enumerate(rows) if one | {"ended": 0.0} == row | {"ended": 0.0})
        assert found >= at, f"after {name} the row is older than it was"
        at = found
    assert {name for name, _ in states} >= {"pwrite", "fsync", "fdatasync", "link", "rename"}
    assert row["ended"]


def unless_damaged(store: Store, content: bytes) -> dict[str, Any] | None:
    """The row; None where it is said that nobody knows it any more."""
    try:
        with put(store, content) as journal:
            return journal.row.model_dump()
    except JournalError as error:
        if "damaged" not in str(error):
            raise
        return None


@settings(max_examples=60, deadline=None)
@given(lost=st.sets(st.integers(0, 10)))
def test_writes_that_a_host_lost_out_of_order_make_no_row_that_never_was(
    tmp_path_factory: pytest.TempPathFactory, lost: set[int]
) -> None:
    """Between two syncs a disk may keep any of the writes."""
    store, writes = Store(tmp_path_factory.mktemp("first")), list[tuple[bytes, int]]()
    store.directory.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch, store.create(new_row(), records=40) as journal:
        first, really = journal.path.read_bytes(), os.pwrite

        def keep(fd: int, data: bytes, offset: int) -> int:
            writes.append((data, offset))
            return really(fd, data, offset)

        patch.setattr(os, "pwrite", keep)
        rows = [journal.row.model_dump()]
        for change in CHANGES:
            change(journal)
            rows.append(journal.row.model_dump())
    content = bytearray(first)
    for number, (data, offset) in enumerate(writes):
        if number not in lost:
            content[offset : offset + len(data)] = data
    row = unless_damaged(store, bytes(content))
    assert row in rows if row is not None else lost


# -- files that are not what they should be ---------------------------------------------------------------------------


def damaged(store: Store, change: Callable[[bytearray], None]) -> None:
    files, _ = written(store)
    content = bytearray(files[-1])
    change(content)
    (store.directory / "m1.source").write_bytes(content)


def test_damage_in_the_middle_is_not_taken_for_the_end(store: Store) -> None:
    def flip(content: bytearray) -> None:
        content[RECORD + 40] ^= 1

    damaged(store, flip)
    with pytest.raises(JournalError, match="damaged"):
        store.open("m1", Role.SOURCE)


def test_a_newer_schema_is_refused_by_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "SCHEMA", 2)
    store.create(new_row()).close()
    monkeypatch.undo()
    with pytest.raises(JournalError, match="newer phaul"):
        store.open("m1", Role.SOURCE)


def test_a_file_under_another_name_is_refused(store: Store) -> None:
    store.create(new_row()).close()
    (store.directory / "m1.source").rename(store.directory / "m2.source")
    with pytest.raises(JournalError, match="another migration"):
        store.open("m2", Role.SOURCE)
    (store.directory / "m2.source").rename(store.directory / "m1.destination")
    with pytest.raises(JournalError):
        store.open("m1", Role.DESTINATION)


def test_a_link_is_not_followed(store: Store, tmp_path: Path) -> None:
    store.create(new_row()).close()
    (store.directory / "m1.source").rename(tmp_path / "elsewhere")
    (store.directory / "m1.source").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match="cannot open"):
        store.open("m1", Role.SOURCE)


def test_rows_of_schema_1_open_for_ever() -> None:
    """Written by the first version; must never be made again. See "Changing the schema" in phaul/journal.py."""
    store = Store(Path(__file__).parent / "data" / "journal")
    journal = store.open("golden", Role.DESTINATION)
    assert journal is not None
    with journal:
        row = journal.row
        assert (row.state, row.peer, row.cgroup) == (State.RESUMED, "root@a.example", "/system.slice/phaul-golden")
        assert row.tasks == (Task(pid=812, start=4711), Task(pid=813, start=4712))
        assert row.undo == (Undo(kind="address", data={"address": "10.0.0.1/24", "device": "eth0"}),)
        assert row.ended
        assert not row.same_boot
        assert not row.owned

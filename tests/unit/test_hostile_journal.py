"""Journals that somebody, or a failing disk, has written: each is refused in words, and none is changed."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phaul import journal as journals
from phaul.errors import JournalError
from phaul.journal import RECORD, Row, Store, Task
from phaul.migration import Role
from phaul.migration import Row as State

_NAME = "m1"
_TAG = journals._tag(_NAME, Role.DESTINATION)
_ROW: dict[str, Any] = {"migration": _NAME, "role": "destination", "boot": "b", "owner": {"pid": 1, "start": 1}}
_FIRST = {"set": {**_ROW, "state": "prepared"}, "at": 1.0}


def changes(*contents: object, tag: bytes = _TAG) -> bytes:
    """A file with these changes, whatever they are."""
    return b"".join(record(json.dumps(one).encode(), number, tag=tag) for number, one in enumerate(contents))


def record(
    payload: bytes,
    number: int = 0,
    *,
    tag: bytes = _TAG,
    magic: bytes = b"PHJ\n",
    schema: int = 1,
    part: int = 0,
    parts: int = 1,
    length: int | None = None,
) -> bytes:
    """One record with a checksum that is right."""
    length = len(payload) if length is None else length
    raw = struct.pack("<4sIHHHHI8s", magic, 0, schema, part, parts, length, number, tag) + payload
    raw = raw.ljust(RECORD, b"\0")
    return raw[:4] + struct.pack("<I", zlib.crc32(raw[8:])) + raw[8:]


def with_set(**values: Any) -> bytes:
    """A row that has something else in it."""
    return changes({"set": {**_FIRST["set"], **values}, "at": 1.0})  # type: ignore[dict-item]


_GOOD = changes(_FIRST)
_HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(4 * RECORD),
    "half a record": _GOOD[: RECORD // 2],
    "text": b"#!/bin/sh\nrm -rf /\n".ljust(RECORD, b"\0"),
    "another magic": record(b"{}", magic=b"PHJ\r"),
    "a wrong checksum": _GOOD[:8] + bytes([_GOOD[8] ^ 1]) + _GOOD[9:],
    "a schema of the future": record(b"{}", schema=2),
    "a record of another migration": changes(_FIRST, tag=b"12345678"),
    "the second record first": record(json.dumps(_FIRST).encode(), 1),
    "a payload longer than a record": record(b"{}", length=RECORD),
    "the second part first": record(b"{}", part=1, parts=2),
    "parts that never come": record(b"{}", parts=65535),
    "no JSON": record(b"\xff\xfe"),
    "JSON without end": record(b"[" * 400),
    "no change": changes([1, 2]),
    "a number": changes(5),
    "facts that are a list": changes({"set": [], "at": 1.0}),
    "undo that is a text": changes({**_FIRST, "undo": "all"}),
    "a time that is a text": changes({**_FIRST, "at": "noon"}),
    "no time at all": changes({**_FIRST, "at": {}}),
    "no owner": changes({"set": {"migration": _NAME, "role": "destination", "boot": "b", "state": "prepared"}}),
    "an owner with number -1": with_set(owner={"pid": -1, "start": 0}),
    "another migration's row": with_set(migration="m2"),
    "the other side's row": with_set(role="source"),
    "a side that there is not": with_set(role="witness"),
    "a state of the other side": with_set(state="frozen"),
    "a state that there is not": with_set(state="running"),
    "tasks that are none": with_set(tasks=["all"]),
    "a name that leads elsewhere": with_set(migration="../m1"),
    "a state that does not follow": changes(_FIRST, {"from": "prepared", "state": "released", "at": 2.0}),
    "a change from another state": changes(_FIRST, {"from": "parked", "state": "parked", "at": 2.0}),
    "a state that comes from nowhere": changes(_FIRST, {"state": "parked", "at": 2.0}),
    "a state that is a list": changes(_FIRST, {"from": "prepared", "state": [], "at": 2.0}),
    "a gap in the middle": _GOOD + bytes(RECORD) + record(b'{"at":1.0}', 2),
    "an earlier change at the end": _GOOD + bytes(RECORD) + record(b'{"at":1.0}', 0),
}


def _store(tmp_path: Path, content: bytes) -> Store:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    (directory / f"{_NAME}.destination").write_bytes(content)
    return Store(directory)


def test_what_is_refused_here_opens_otherwise(tmp_path: Path) -> None:
    journal = _store(tmp_path, _GOOD + bytes(40 * RECORD)).open(_NAME, Role.DESTINATION)
    assert journal is not None
    with journal:
        assert journal.row.state is State.PREPARED
        assert [change.state for change in journal.history()] == ["prepared"]


@pytest.mark.parametrize("name", _HOSTILE)
def test_refused(name: str, tmp_path: Path) -> None:
    store = _store(tmp_path, _HOSTILE[name])
    with pytest.raises(JournalError):
        store.open(_NAME, Role.DESTINATION)
    assert (store.directory / f"{_NAME}.destination").read_bytes() == _HOSTILE[name]
    assert len(list(store.directory.iterdir())) == 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=3 * RECORD))
def test_rubbish_is_refused(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path / "state")
    store.directory.mkdir(mode=0o700, exist_ok=True)
    (store.directory / f"{_NAME}.source").write_bytes(content)
    with pytest.raises(JournalError):
        store.open(_NAME, Role.SOURCE)


def test_a_change_that_the_protocol_does_not_know_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    row = Row(migration=_NAME, role=Role.SOURCE, boot="b", owner=Task.of(os.getpid()))
    with store.create(row) as journal:
        raw = journals._encode(
            {"state": "released", "from": "prepared", "at": 1.0}, 1, journals._tag(_NAME, Role.SOURCE)
        )
        os.pwrite(journal._fd, raw, journal._next * RECORD)
    with pytest.raises(JournalError, match="from prepared to released"):
        store.open(_NAME, Role.SOURCE)


@pytest.mark.parametrize("name", ["../etc", "a/b", "", "x" * 65, "a.b", "m\0", "\u00e9"])
def test_a_name_that_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(JournalError):
        Store(tmp_path).open(name, Role.SOURCE)


def test_a_link_in_place_of_a_journal(tmp_path: Path) -> None:
    store = _store(tmp_path, b"")
    path = store.directory / f"{_NAME}.destination"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError):
        store.open(_NAME, Role.DESTINATION)
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "state").symlink_to(tmp_path / "real")
    row = Row(migration=_NAME, role=Role.SOURCE, boot="b", owner=Task(pid=1, start=1))
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "state", tmp_path / "file" / "below"):
        with pytest.raises(JournalError):
            Store(directory).create(row)
    assert list((tmp_path / "real").iterdir()) == []


def test_what_the_disk_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    row = Row(migration=_NAME, role=Role.SOURCE, boot="b", owner=Task.of(os.getpid()))
    with Store(tmp_path / "state").create(row) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", refuse)
            with pytest.raises(JournalError, match="cannot sync"):
                journal.sync()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(JournalError, match="cannot remove"):
                journal.remove()
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(JournalError, match="cannot make"):
                Store(tmp_path / "state").create(row.model_copy(update={"migration": "m3"}))
            with pytest.raises(JournalError, match="cannot open"):
                Store(tmp_path / "state").open(_NAME, Role.SOURCE)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "iterdir", refuse)
            with pytest.raises(JournalError, match="cannot read"):
                Store(tmp_path / "state").names()


def test_a_row_that_was_removed_stays_away(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    row = Row(migration=_NAME, role=Role.SOURCE, boot="b", owner=Task.of(os.getpid()))
    with store.create(row) as journal:
        journal.remove()
        with store.create(row):  # another of the same name
            journal.end()
            again = store.open(_NAME, Role.SOURCE)
            assert again is not None
            with again:
                assert again.row.ended == 0.0


def test_a_process_that_is_gone_is_not_alive() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert not Task(pid=child, start=1).alive

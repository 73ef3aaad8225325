"""What must survive a crash: one row a migration and side, in one preallocated file.

A file is a log of 512-byte records, each with its checksum; a message (a change of the row) takes one record, or
several when it is long, and counts once all of them are there. A process that dies leaves a prefix of its writes, and
every prefix is a legal log: its torn end is as if it had never been written. Space is written out and synced when the
file is made, so that nothing inside the freeze can meet a full disk, and the last records are kept for transitions.

Every change is made under flock and, where it changes the state, only if the row is still in the state that it starts
from. Writes survive the death of the process, not that of the host: `sync` is called outside the freeze, and a row of
an earlier boot is judged by what can have been lost (`phaul.migration.recover`).

Schema 1. A record: magic, checksum of all that follows, schema, message number, part, parts, length, migration's tag,
payload, zeros. The payload is JSON: {"state", "from", "why", "set", "undo", "at"}.

Changing the schema. A row outlives the phaul that wrote it: whoever upgrades in the middle of a migration, or with one
in doubt, must be able to finish it. So a new fact is a new field of `Row` with a default, a new deed a new kind of undo
entry, and neither changes the schema: an older phaul keeps facts that it does not know, and refuses a deed that it
cannot take back, in words. What old rows say never changes its meaning, and no field becomes one that has to be there.
Only what an older phaul would read wrongly, and not just miss, takes a new schema number: that phaul then refuses the
file, and the new one goes on reading all numbers before its own. Each schema has a file in tests/unit/data/journal that
its first version wrote; none of these is ever made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import BaseModel, ValidationError

from phaul import jsontext
from phaul.errors import JournalBusyError, JournalError, LostRaceError
from phaul.migration import MOVES, Role
from phaul.migration import Row as State
from phaul.rows import NAME, Row, Task, Undo, boot_id

__all__ = ["RECORD", "SCHEMA", "Change", "Journal", "Row", "Store", "Task", "Undo", "boot_id"]

RECORD = 512  # bytes: no page or sector boundary cuts a record in two
SCHEMA = 1
_HEADER = struct.Struct("<4sIHHHHI8s")
_MAGIC = b"PHJ\n"
_ROOM = RECORD - _HEADER.size
_BLANK = bytes(RECORD)
_RESERVED = 16  # records that only transitions may use
_CAPACITY = 512  # records: 256 KiB
_LOCK_PATIENCE = 2.0  # seconds; a healthy holder needs microseconds
_KEPT = frozenset({"migration", "role", "state", "undo", "why", "since"})  # what only a transition or entry changes
_FORM: tuple[tuple[str, Any], ...] = (("set", {}), ("undo", []), ("at", 0.0))  # of a change, as far as it has them
_JSON = json.JSONEncoder(separators=(",", ":"))
_PLAIN = {"from", "state", "at"}  # of a transition without anything else, which the freeze waits for


class Change(NamedTuple):
    """One transition of a row: when (seconds since the epoch), to which state, and why. The end comes as `ended`."""

    at: float
    state: str
    why: str


class _Record(NamedTuple):
    number: int
    part: int
    parts: int
    payload: bytes


class Journal:
    """One row's file, open. Not to be shared between threads."""

    def __init__(self, path: Path, descriptor: int, migration: str, role: Role) -> None:
        self._path = path
        self._fd = descriptor
        self._role = role
        self._tag = _tag(migration, role)
        self._content: dict[str, Any] = {}
        self._messages = 0
        self._next = 0  # record after the last complete message
        self._said: tuple[Row, dict[str, Any]] | None = None  # the row as last read, and what was written since
        self._made: tuple[object, Row] | None = None  # the row that comes of that, once somebody has asked for it
        self._slots = os.fstat(descriptor).st_size // RECORD

    @property
    def row(self) -> Row:
        """The row as last read or written."""
        said, made = self._said, self._made
        assert said is not None
        if made is None or made[0] is not said:  # a change of it in the freeze is not made into a row there
            made = self._made = (said, said[0].model_copy(update=said[1]) if said[1] else said[0])
        return made[1]

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._path

    def refresh(self) -> Row:
        """Read what others have written meanwhile."""
        with self._locked():
            self._replay()
        return self.row

    def history(self) -> list[Change]:
        """All transitions, the first being the row's making."""
        changes: list[Change] = []
        with self._locked():
            for content, _ in self._messages_so_far():
                facts = content.get("set", {})
                state = "ended" if facts.get("ended") else content.get("state") or facts.get("state")
                if state:
                    changes.append(Change(content.get("at", 0.0), str(state), str(content.get("why", ""))))
        return changes

    def transition(
        self, expected: State, to: State, *, why: str = "", undo: tuple[Undo, ...] = (), **facts: Any
    ) -> None:
        """Compare-and-set: from `expected` to `to`, together with facts. LostRaceError where the row says otherwise.

        Does not sync: a few microseconds, and never a lack of space.
        """
        if to not in MOVES[self._role].get(expected, ()):
            raise ValueError(f"a {self._role} does not go from {expected} to {to}")
        with self._locked():
            blank = self._replay()
            if self._content["state"] != expected:
                raise LostRaceError(
                    f"migration {self.row.migration} is {self.row.state} on this side, no longer {expected}",
                    state=self.row.state,
                )
            self._append({"from": expected, "state": to, "why": why}, undo, facts, reserve=0, blank=blank)

    def note(self, *, undo: tuple[Undo, ...] = (), **facts: Any) -> Row:
        """Add facts and undo entries without changing the state. One that has ended has room for one more note."""
        with self._locked():
            blank = self._replay()
            self._append({}, undo, facts, reserve=0 if self._content.get("ended") else _RESERVED, blank=blank)
        return self.row

    def end(self) -> Row:
        """Nothing is left to do. The file stays as history, without its unused space and without `link`, whose key
        opens nothing any more."""
        self.note(ended=time.time())
        with contextlib.suppress(OSError, JournalError):
            self._compact()
        return self.row

    def _compact(self) -> None:
        """Put a shorter file in the place of ours. One that was removed stays away. Nothing is written to a row that
        has ended but, once, that it was `heard` of; who does it just now may write to the longer file."""
        with self._locked():
            if self._path.stat().st_ino != os.fstat(self._fd).st_ino:
                return
            contents = [content for content, _ in self._messages_so_far()]
            for content in contents:
                content.get("set", {}).pop("link", None)
            data = b"".join(_encode(content, number, self._tag) for number, content in enumerate(contents))
            fd = _replace(self._path, data + bytes(RECORD))
        os.close(self._fd)
        self._fd, self._slots, self._next = fd, len(data) // RECORD + 1, len(data) // RECORD
        self._content["link"] = {}
        self._said = self.row.model_copy(update={"link": {}}), {}

    def sync(self) -> None:
        """Bring it to the disk: milliseconds, never inside the freeze."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise JournalError(f"cannot sync {self._path}: {error.strerror}") from error

    def remove(self) -> None:
        """Remove the row: whoever asks gets "unknown" from now on."""
        try:
            self._path.unlink(missing_ok=True)
            _sync_directory(self._path.parent)
        except OSError as error:
            raise JournalError(f"cannot remove {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise JournalBusyError(
                        f"another process holds {self._path} and does not let go",
                        advice=f"see who does: fuser -v {self._path}",
                    ) from None
                time.sleep(0.001)
        try:
            yield
        except OSError as error:
            raise JournalError(f"cannot use {self._path}: {error.strerror}") from error
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _replay(self) -> bool:
        """Apply the complete messages after those known. Whether there is nothing in the record after them."""
        changed = False
        while (raw := self._raw(self._next)) != _BLANK and (message := self._message(self._next, raw)) is not None:
            payload, parts = message
            self._apply(payload)
            self._messages += 1
            self._next += parts
            changed = True
        if changed or self._said is None:
            if self._messages == 0:
                raise JournalError(f"{self._path} holds no row")
            self._check_rest()
            self._said = self._validated(), {}
        return raw == _BLANK

    def _messages_so_far(self) -> list[tuple[dict[str, Any], int]]:
        """Those that have been read or written, as they stand in the file, each with its number of records."""
        found: list[tuple[dict[str, Any], int]] = []
        slot, known = 0, self._messages
        try:
            for number in range(known):
                self._messages = number  # a message is only valid in its place
                message = self._message(slot, self._raw(slot))
                if message is None:
                    break
                found.append(message)
                slot += message[1]
        finally:
            self._messages = known
        return found

    def _raw(self, slot: int) -> bytes:
        return os.pread(self._fd, RECORD, slot * RECORD)

    def _message(self, slot: int, raw: bytes) -> tuple[dict[str, Any], int] | None:
        """The message that begins at a record, with its number of records; None where none is complete."""
        first = self._record(raw)
        if first is None or first.number != self._messages or first.part != 0:
            return None
        payload = first.payload
        for part in range(1, first.parts):
            record = self._record(self._raw(slot + part))
            if record is None or record[:3] != (first.number, part, first.parts):
                return None
            payload += record.payload
        try:
            content = jsontext.parse(payload)
        except ValueError as error:
            raise JournalError(f"{self._path}: record {slot} does not hold JSON") from error
        if not isinstance(content, dict) or not all(isinstance(content.get(key, one), type(one)) for key, one in _FORM):
            raise JournalError(f"{self._path}: record {slot} does not hold a change")
        return content, first.parts

    def _record(self, raw: bytes) -> _Record | None:
        """A valid record of this migration; None for anything else. JournalError for a schema of the future."""
        if len(raw) < RECORD:
            return None
        magic, check, schema, part, parts, length, number, tag = _HEADER.unpack_from(raw)
        if magic != _MAGIC or check != zlib.crc32(raw[8:]) or length > _ROOM:
            return None
        if schema > SCHEMA:
            raise JournalError(
                f"{self._path} was written by a newer phaul (schema {schema})", advice="use that phaul on it"
            )
        if tag != self._tag:
            raise JournalError(f"{self._path} holds a record of another migration or side")
        return _Record(number, part, parts, raw[_HEADER.size : _HEADER.size + length])

    def _check_rest(self) -> None:
        """After the last message stands nothing but the beginning of one that was never finished.

        Anything else means that records in the middle are damaged (a host that lost power wrote them out of order):
        then nobody knows what the row said.
        """
        rest = os.pread(self._fd, (self._slots - self._next) * RECORD, self._next * RECORD)
        for slot in range(self._next, self._slots):
            if not rest.startswith(_MAGIC, (slot - self._next) * RECORD):
                continue
            record = self._record(self._raw(slot))
            if record is not None and (record.number, record.part) != (self._messages, slot - self._next):
                raise JournalError(
                    f"{self._path} is damaged: record {slot} does not follow from those before",
                    advice="the host probably lost power; ask the other side: phaul status there",
                )

    def _apply(self, change: dict[str, Any]) -> None:
        """Take a change that was read."""
        try:
            state = change.get("state")
            if state is not None and self._content:
                role, before = Role(self._content["role"]), State(self._content["state"])
                if State(state) not in MOVES[role].get(before, ()) or change.get("from") != before:
                    raise JournalError(f"{self._path} says that a {role} went from {before} to {state}")
            self._take(change)
        except (KeyError, TypeError, ValueError) as error:
            raise JournalError(f"{self._path} holds a change that makes no sense: {error}") from error

    def _take(self, change: dict[str, Any]) -> None:
        """A legal one."""
        content = self._content
        if content and change.get("state") is not None:
            content["state"], content["why"] = change["state"], change.get("why", "")
        content["since"] = change.get("at", 0.0)
        content.update(change.get("set", ()))
        content["undo"] = [*content.get("undo", ()), *change.get("undo", ())]

    def _validated(self) -> Row:
        try:
            row = Row.model_validate(self._content)
        except ValidationError as error:
            raise JournalError(f"{self._path} holds no sensible row: {error}") from error
        if _tag(row.migration, row.role) != self._tag or row.state not in MOVES[row.role]:
            raise JournalError(f"{self._path} holds the row of another migration or side")
        return row

    def _append(
        self, change: dict[str, Any], undo: tuple[Undo, ...], facts: dict[str, Any], *, reserve: int, blank: bool
    ) -> None:
        """Write a message after the last complete one. The caller holds the lock and has replayed; `blank` is what
        that said."""
        change = _change(change, undo, facts)
        raw = _encode(change, self._messages, self._tag)
        if self._next + len(raw) // RECORD > self._slots - reserve:
            raise JournalError(f"{self._path} is full", advice="this migration has too much to take back")
        if not blank:
            self._clear_torn()
        if os.pwrite(self._fd, raw, self._next * RECORD) != len(raw):
            raise JournalError(f"{self._path}: a short write")
        self._take(change)
        self._messages += 1
        self._next += len(raw) // RECORD
        assert self._said is not None
        row, newer = self._said
        newer = {**newer, **facts, "since": change["at"]}
        if "state" in change:
            newer |= {"state": change["state"], "why": change.get("why", "")}
        if undo:
            newer["undo"] = newer.get("undo", row.undo) + undo
        self._said = row, newer

    def _clear_torn(self) -> None:
        """Wipe a message that was never finished, its last record first: whatever is left of it stays unfinished."""
        slot = self._next
        while slot < self._slots and self._raw(slot) != _BLANK:
            slot += 1
        for torn in range(slot - 1, self._next - 1, -1):
            os.pwrite(self._fd, bytes(RECORD), torn * RECORD)


class Store:
    """The directory of all journals of a host: its own, readable by root alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def create(self, row: Row, *, records: int = _CAPACITY) -> Journal:
        """A new row, on the disk when this returns. JournalError where the migration has one on this side."""
        self.prepare()
        path = self._path(row.migration, row.role)
        first = _encode(
            {"set": row.model_dump(mode="json", exclude={"since"}), "at": time.time()}, 0, _tag(row.migration, row.role)
        )
        size = max(records * RECORD, 2 * len(first) + _RESERVED * RECORD)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        fd = -1
        try:
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            _write_all(fd, first + bytes(size - len(first)))
            os.fsync(fd)
            os.link(draft, path)
            draft.unlink()
            _sync_directory(self.directory)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            draft.unlink(missing_ok=True)
            if isinstance(error, FileExistsError):
                raise JournalError(f"migration {row.migration} has a row on this side already: {path}") from error
            raise JournalError(
                f"cannot make {path}: {error.strerror}", advice="look at space and rights there"
            ) from error
        return self._opened(path, fd, row.migration, row.role)

    def open(self, migration: str, role: Role) -> Journal | None:
        """The row of a migration; None where there is none."""
        path = self._path(migration, role)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JournalError(f"cannot open {path}: {error.strerror}") from error
        return self._opened(path, fd, migration, role)

    def names(self) -> list[tuple[str, Role]]:
        """All migrations with a row here, oldest first."""
        try:
            entries = sorted(self.directory.iterdir(), key=lambda entry: entry.stat().st_ctime_ns)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise JournalError(f"cannot read {self.directory}: {error.strerror}") from error
        found = (re.fullmatch(rf"({NAME.pattern})\.(source|destination)", entry.name) for entry in entries)
        return [(match[1], Role(match[2])) for match in found if match]

    def _path(self, migration: str, role: Role) -> Path:
        if not NAME.fullmatch(migration):
            raise JournalError(f"{migration!r} is no migration's name")
        return self.directory / f"{migration}.{role}"

    @staticmethod
    def _opened(path: Path, fd: int, migration: str, role: Role) -> Journal:
        journal = Journal(path, fd, migration, role)
        try:
            journal.refresh()
        except BaseException:
            journal.close()
            raise
        return journal

    def prepare(self) -> None:
        """Make sure that the directory is there, and ours alone. JournalError if it cannot be."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.directory.lstat()
        except OSError as error:
            raise JournalError(f"cannot make {self.directory}: {error.strerror}") from error
        if not self.directory.is_dir() or self.directory.is_symlink() or status.st_uid != os.geteuid():
            raise JournalError(f"{self.directory} is not a directory of ours", advice="see [agent] state_directory")
        if status.st_mode & 0o077:
            raise JournalError(f"{self.directory} is open to others", advice=f"chmod 700 {self.directory}")


def _tag(migration: str, role: Role) -> bytes:
    """Stands in every record, so that no file is taken for another's."""
    return hashlib.blake2b(f"{migration}.{role}".encode(), digest_size=8).digest()


def _change(change: dict[str, Any], undo: tuple[Undo, ...], facts: dict[str, Any]) -> dict[str, Any]:
    """The content of a message."""
    change = {key: value for key, value in change.items() if value != ""}
    if facts:
        if wrong := (facts.keys() - Row.model_fields.keys()) | (facts.keys() & _KEPT):
            raise ValueError(f"{', '.join(sorted(wrong))} cannot be set")
        change["set"] = {key: _plain(value) for key, value in facts.items()}
    if undo:
        change["undo"] = [entry.model_dump(mode="json") for entry in undo]
    return {**change, "at": time.time()}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _encode(change: dict[str, Any], number: int, tag: bytes) -> bytes:
    """A message as records."""
    if change.keys() == _PLAIN:
        payload = '{{"from":"{from}","state":"{state}","at":{at!r}}}'.format_map(change).encode()
    else:
        payload = _JSON.encode(change).encode()
    parts = [payload[at : at + _ROOM] for at in range(0, len(payload), _ROOM)]
    records = bytearray()
    for index, part in enumerate(parts):
        head = _HEADER.pack(_MAGIC, 0, SCHEMA, index, len(parts), len(part), number, tag)
        record = bytearray((head + part).ljust(RECORD, b"\0"))
        struct.pack_into("<I", record, 4, zlib.crc32(record[8:]))
        records += record
    return bytes(records)


def _replace(path: Path, data: bytes) -> int:
    """Put a file with this content in the place of another; an open descriptor of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _write_all(fd, data)
        os.fsync(fd)
        draft.rename(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

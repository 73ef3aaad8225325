"""The letters of a haul (direct.Kind.HAUL): one byte that says what it is, and a body.

Records tell what to make of a directory: each is a JSON object with bytes behind it. `op` is

    put    make or change `path`: `make` is "new" (whatever is there goes), "hard" (another name of `other`), "keep", or
           absent for what is only changed; `kind` its type; `meta` owner, mode, time and attributes; `runs` of data
           behind it, where a regular file of `size` bytes holds something; `flags` are file attributes of chattr(1)
    data   bytes of `path` at `offset`
    hole   `length` bytes of `path` at `offset` are none
    gone   `path` is no more
    fix    attributes that were held back are set: nothing more comes, unless it does
    end    of the pass `number`; it is answered with DONE
"""

from __future__ import annotations

import base64
import enum
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from phaul_engine.errors import EngineError

from phaul import jsontext

CHUNK = 1 << 20  # bytes of a letter, about
_LENGTHS = struct.Struct("<II")


@enum.unique
class Tag(enum.IntEnum):
    """What a letter is."""

    RECORDS = 1  # source: what to make of a tree
    DONE = 2  # destination: JSON: a pass has been applied
    COMPLETE = 3  # source: all trees are there, as they were a moment ago: what lives on them can be made
    RSYNC = 4  # source: JSON: run rsync for a tree, with these words
    STREAM = 5  # both: what rsync says to rsync, or what btrfs sends; empty: it has ended
    BTRFS = 6  # source: JSON: take a snapshot of this name in for a tree; without a name: the last one is the tree


class Record(NamedTuple):
    """One record."""

    fields: dict[str, Any]
    data: bytes | memoryview = b""


def pack(record: Record) -> bytes:
    """As bytes."""
    head = json.dumps(record.fields, separators=(",", ":")).encode()
    return b"".join((_LENGTHS.pack(len(head), len(record.data)), head, record.data))


def unpack(body: bytes | memoryview) -> Iterator[Record]:
    """The records of a letter; EngineError for anything else."""
    view = memoryview(body)
    while view:
        if len(view) < _LENGTHS.size:
            raise EngineError("records of files end within one")
        head, data = _LENGTHS.unpack_from(view)
        end = _LENGTHS.size + head + data
        if len(view) < end:
            raise EngineError("records of files end within one")
        yield Record(fields(view[_LENGTHS.size : _LENGTHS.size + head]), view[_LENGTHS.size + head : end])
        view = view[end:]


def fields(text: bytes | memoryview) -> dict[str, Any]:
    """A JSON object; EngineError for anything else."""
    try:
        said = jsontext.parse(bytes(text))
    except ValueError as error:
        raise EngineError(f"a record of a file makes no sense: {error}") from error
    if not isinstance(said, dict):
        raise EngineError("a record of a file makes no sense")
    return said


def letter(tag: Tag, body: bytes | dict[str, Any] = b"") -> bytes:
    """A letter's body."""
    return bytes([tag]) + (json.dumps(body).encode() if isinstance(body, dict) else body)


def open_letter(body: bytes) -> tuple[Tag, memoryview]:
    """The opposite; EngineError for what is none."""
    try:
        return Tag(body[0]), memoryview(body)[1:]
    except (IndexError, ValueError) as error:
        raise EngineError("the other side sent files in a way that this phaul cannot read") from error


def encode_attributes(attributes: dict[str, bytes]) -> dict[str, str]:
    """Extended attributes as JSON has them."""
    return {name: base64.b64encode(value).decode() for name, value in attributes.items()}


def decode_attributes(said: Any) -> dict[str, bytes]:
    """The opposite; EngineError for what is none."""
    try:
        return {str(name): base64.b64decode(value, validate=True) for name, value in dict(said).items()}
    except (ValueError, TypeError) as error:
        raise EngineError(f"attributes of a file make no sense: {error}") from error


class Outbox:
    """Gathers records into letters. `send` takes a letter, and may block. `bytes` counts what was sent."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._waiting: list[bytes] = []
        self._size = 0
        self.bytes = 0

    def put(self, data: bytes | memoryview = b"", **fields: Any) -> None:
        """Add a record."""
        packed = pack(Record(fields, data))
        self._waiting.append(packed)
        self._size += len(packed)
        if self._size >= CHUNK:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered."""
        if self._waiting:
            self.bytes += self._size
            waiting, self._waiting, self._size = self._waiting, [], 0
            self._send(letter(Tag.RECORDS, b"".join(waiting)))

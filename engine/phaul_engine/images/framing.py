"""Records of one image file to bytes and back.

A file is a head, then records to its end. The head is two words, a common magic and the kind's own; the inventory has
only its own. A record is the length of a message, the message, and for some kinds a payload. All words are 32 bits,
little endian.

The reader trusts nothing: every length is held against what is left of the file before anything is made of it, and a
message that lacks a required field, or says something this version has no word for, is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from phaul_engine.errors import ImageError
from phaul_engine.images.kinds import COMMON_MAGIC, SERVICE_MAGIC, Kind, Rest
from phaul_engine.images.pb import ipc_msg_pb2

Buffer: TypeAlias = "bytes | memoryview"

_WORD = struct.Struct("<I")
_HEAD = struct.Struct("<2I")


@dataclass
class Record:
    """A message and the bytes that belong to it (queue contents, file data).

    The message is None in raw files, which are all payload.
    """

    message: Any
    payload: bytes = b""


def head_of(kind: Kind) -> bytes:
    """The bytes that a file of this kind begins with."""
    if kind.message is None:
        return b""
    if kind.stem == "inventory":
        return _WORD.pack(kind.magic)
    return _HEAD.pack(SERVICE_MAGIC if kind.service else COMMON_MAGIC, kind.magic)


def encode(kind: Kind, records: Iterable[Record], name: str) -> bytes:
    """The contents of a file. `name` is for messages to people.

    `ImageError` if a record is not of the kind's message, is incomplete, or its payload is not as long as it says.
    """
    return b"".join([head_of(kind), *encode_records(kind, records, name)])


def encode_records(kind: Kind, records: Iterable[Record], name: str) -> list[bytes]:
    """As `encode`, each record by itself and without the head."""
    records = list(records)
    if kind.head is None and kind.payload is None and (plain := _plain(kind, records)) is not None:
        check_unique(kind, [record.message for record in records], name)
        return plain
    parts: list[bytes] = []
    messages: list[Any] = []
    for index, record in enumerate(records):
        try:
            if kind.message is None:
                if index or record.message is not None:
                    raise ImageError("has no place in a raw image")
                parts.append(record.payload)
                continue
            expected = kind.message_at(index, messages)
            if expected is None or not isinstance(record.message, expected):
                raise ImageError(f"is a {type(record.message).__name__}, which has no place there")
            messages.append(record.message)
            parts.append(b"".join(_encode_record(kind, record)))
        except ImageError as error:
            raise _placed(error, index, name) from error.__cause__
    check_unique(kind, messages, name)
    return parts


def _plain(kind: Kind, records: list[Record]) -> list[bytes] | None:
    """Records that are nothing but messages, of a kind that has no others; None where something is wrong with one."""
    if len(records) > 1 and kind.single:
        return None
    for record in records:
        if type(record.message) is not kind.message or record.payload:
            return None
    try:
        bodies = [record.message.SerializeToString() for record in records]
    except EncodeError:
        return None
    return [_WORD.pack(len(body)) + body for body in bodies]


def _encode_record(kind: Kind, record: Record) -> tuple[bytes, ...]:
    try:
        body: bytes = record.message.SerializeToString()
    except EncodeError as error:
        raise ImageError(f"is incomplete: {error}") from error
    size = kind.payload(record.message) if kind.payload else 0
    if size is Rest.MESSAGES:
        unpack_ipc_messages(record.message, record.payload)
    elif isinstance(size, int) and size != len(record.payload):
        raise ImageError(f"says {size} bytes follow, and has {len(record.payload)}")
    return _WORD.pack(len(body)), body, record.payload, bytes(-len(record.payload) % kind.align)


def decode(kind: Kind, data: Buffer, name: str) -> list[Record]:
    """The records of a file, the opposite of `encode`. `ImageError` for anything malformed."""
    if kind.message is None:
        return [Record(None, bytes(data))]
    view = memoryview(data)
    position = _check_head(kind, view, name)
    records: list[Record] = []
    messages: list[Any] = []
    while position < len(view):
        expected = kind.message_at(len(records), messages)
        if expected is None:
            raise ImageError(f"{name} goes on after its last record")
        try:
            message, position = _decode_message(expected, view, position)
            payload, position = _decode_payload(kind, message, view, position) if kind.payload else (b"", position)
        except ImageError as error:
            raise _placed(error, len(records), name) from error.__cause__
        messages.append(message)
        records.append(Record(message, payload))
    if (kind.single or kind.head) and not records:
        raise ImageError(f"{name} has no record")
    check_unique(kind, messages, name)
    return records


def decode_record(kind: Kind, index: int, before: list[Any], data: Buffer, name: str) -> Record:
    """One record, as `encode_records` makes it; `before` are the messages before it in the file."""
    if kind.message is None:
        if index:
            raise ImageError(f"{name} goes on after its last record")
        return Record(None, bytes(data))
    view = memoryview(data)
    expected = kind.message_at(index, before)
    if expected is None:
        raise ImageError(f"{name} goes on after its last record")
    try:
        message, position = _decode_message(expected, view, 0)
        payload, position = _decode_payload(kind, message, view, position) if kind.payload else (b"", position)
        if position != len(view):
            raise ImageError(f"has {len(view) - position} bytes too many")
    except ImageError as error:
        raise _placed(error, index, name) from error.__cause__
    return Record(message, payload)


def _placed(error: ImageError, index: int, name: str) -> ImageError:
    """The same error, with the record that it is about."""
    return ImageError(f"record {index} of {name} {error}", advice=error.advice)


def _check_head(kind: Kind, view: memoryview, name: str) -> int:
    head = head_of(kind)
    found = bytes(view[: len(head)])
    if found == head:
        return len(head)
    if len(found) < len(head):
        raise ImageError(f"{name} ends within its head")
    raise ImageError(f"{name} begins with {found.hex(' ', 4)}, a {kind.stem} image with {head.hex(' ', 4)}")


def _decode_message(expected: type[Message], view: memoryview, position: int) -> tuple[Any, int]:
    body, position = _take(view, position, _WORD.size)
    (size,) = _WORD.unpack(body)
    body, position = _take(view, position, size)
    return parse_message(expected, body), position


def _decode_payload(kind: Kind, message: Any, view: memoryview, position: int) -> tuple[bytes, int]:
    size = kind.payload(message) if kind.payload else 0
    if size is Rest.TO_END:
        size = len(view) - position
    elif size is Rest.MESSAGES:
        size = max((end for _, _, end in _ipc_messages(message.qnum, view[position:])), default=0)
    assert isinstance(size, int)
    payload, position = _take(view, position, size)
    _, position = _take(view, position, -size % kind.align)
    return bytes(payload), position


def _take(view: memoryview, position: int, size: int) -> tuple[memoryview, int]:
    end = position + size
    if end > len(view):
        raise ImageError(f"is truncated: {size} bytes must follow, {len(view) - position} do")
    return view[position:end], end


def check_unique(kind: Kind, messages: list[Any], name: str) -> None:
    """`ImageError` if two records share what no two may."""
    if not kind.unique or len(set(map(attrgetter(*kind.unique), messages))) == len(messages):
        return
    seen: set[tuple[int, ...]] = set()
    for message in messages:
        key = tuple(getattr(message, field) for field in kind.unique)
        if key in seen:
            raise ImageError(f"{name} has two records with {' and '.join(kind.unique)} {', '.join(map(str, key))}")
        seen.add(key)


def parse_message(expected: type[Message], body: Buffer) -> Any:
    """Parse one message. `ImageError` unless it is whole and everything in it is known.

    The text of the error is a predicate ("lacks ..."), for who knows which message it was to put before.
    """
    message, body = expected(), bytes(body)
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise ImageError(f"is no {expected.__name__}: {error}") from error
    message.DiscardUnknownFields()
    try:
        if message.SerializeToString() == body:  # what was discarded, or is missing, would be missing here
            return message
    except EncodeError:
        pass
    message.ParseFromString(body)
    _judge(message, expected)
    return message


def _judge(message: Message, expected: type[Message]) -> None:
    """Whether a message lacks something or says too much, or is only not written as we would."""
    if not message.IsInitialized():
        missing = ", ".join(message.FindInitializationErrors())  # type: ignore[attr-defined]
        strange = _strange(message)  # a required enum with an unknown value is missing and strange
        raise ImageError(f"lacks {missing}" + (f" ({strange})" if strange else ""))
    size = message.ByteSize()
    known = expected()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    if known.ByteSize() != size:
        raise ImageError(
            f"says something that this version does not know: {_strange(message)}",
            advice="it may come from a newer version, or from another architecture",
        )


def _strange(message: Message) -> str:
    """The first unknown thing in a message, in words; empty if there is none."""
    name = message.DESCRIPTOR.name
    for field in UnknownFieldSet(message):  # type: ignore[attr-defined]
        known = message.DESCRIPTOR.fields_by_number.get(field.field_number)
        if known is None:
            return f"field {field.field_number} of {name}"
        return f"{known.name} of {name} is {field.data!r}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for inner in [value] if isinstance(value, Message) else value:
            if strange := _strange(inner):
                return strange
    return ""


def pack_ipc_messages(messages: Iterable[tuple[ipc_msg_pb2.ipc_msg, bytes]]) -> bytes:
    """The payload of an ipc_msg_entry."""
    parts = []
    for message, data in messages:
        if len(data) != message.msize:
            raise ImageError(f"a System V message says it has {message.msize} bytes, and has {len(data)}")
        body = message.SerializeToString()
        parts += [_WORD.pack(len(body)), body, data, bytes(-len(data) % 8)]
    return b"".join(parts)


def unpack_ipc_messages(entry: Any, payload: Buffer) -> list[tuple[ipc_msg_pb2.ipc_msg, bytes]]:
    """The messages in the payload of an ipc_msg_entry."""
    messages = list(_ipc_messages(entry.qnum, memoryview(payload)))
    if (messages[-1][2] if messages else 0) != len(payload):
        raise ImageError(f"has bytes after its {entry.qnum} messages")
    return [(message, bytes(data)) for message, data, _ in messages]


def _ipc_messages(count: int, view: memoryview) -> Iterator[tuple[Any, memoryview, int]]:
    """Messages, their data, and where each ends."""
    position = 0
    for _ in range(count):
        message, position = _decode_message(ipc_msg_pb2.ipc_msg, view, position)
        data, position = _take(view, position, message.msize)
        _, position = _take(view, position, -message.msize % 8)
        yield message, data, position

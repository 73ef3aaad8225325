"""Hypothesis strategies for image messages, made from their descriptors."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st
from phaul_engine.images.framing import Record, pack_ipc_messages
from phaul_engine.images.kinds import KINDS, Kind, Rest
from phaul_engine.images.pb import ghost_file_pb2, ipc_msg_pb2

_BITS = {
    FieldDescriptor.TYPE_UINT32: (0, 32),
    FieldDescriptor.TYPE_FIXED32: (0, 32),
    FieldDescriptor.TYPE_UINT64: (0, 64),
    FieldDescriptor.TYPE_FIXED64: (0, 64),
    FieldDescriptor.TYPE_INT32: (1, 31),
    FieldDescriptor.TYPE_SINT32: (1, 31),
    FieldDescriptor.TYPE_INT64: (1, 63),
    FieldDescriptor.TYPE_SINT64: (1, 63),
}
_LENGTHS = {"bytes", "length", "inq_len", "outq_len", "keys_bytes", "values_bytes", "nsems", "size", "len", "msize"}
_LENGTHS |= {"qnum"}


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return _fields(field.message_type, depth + 1)
    if field.enum_type is not None:
        return st.sampled_from([value.number for value in field.enum_type.values])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=12)
    if field.type == FieldDescriptor.TYPE_STRING:
        return st.text(st.characters(codec="utf-8"), max_size=6)
    if field.name in _LENGTHS and field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64):
        return st.integers(0, 24)
    signed, bits = _BITS[field.type]
    return st.integers(-(1 << bits) if signed else 0, (1 << bits) - 1)


@st.composite
def _fields(draw: st.DrawFn, descriptor: Any, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in descriptor.fields:
        if field.is_required:
            values[field.name] = draw(_value(field, depth))
        elif field.is_repeated:
            if depth < 3:
                values[field.name] = draw(st.lists(_value(field, depth), max_size=2))
        elif depth < 3 and draw(st.booleans()):
            values[field.name] = draw(_value(field, depth))
    return values


def messages(cls: type[Message]) -> st.SearchStrategy[Any]:
    """Complete messages of a class."""
    return _fields(cls.DESCRIPTOR, 0).map(lambda values: cls(**values))


@st.composite
def _record(draw: st.DrawFn, kind: Kind, cls: type[Message]) -> Record:
    message: Any = draw(messages(cls))
    size = kind.payload(message) if kind.payload else 0
    if size is Rest.TO_END:
        return Record(message, draw(st.binary(max_size=40)))
    if size is Rest.MESSAGES:
        bodies = draw(st.lists(st.binary(max_size=20), max_size=3))
        message.qnum = len(bodies)
        return Record(message, pack_ipc_messages((ipc_msg_pb2.ipc_msg(mtype=1, msize=len(b)), b) for b in bodies))
    assert isinstance(size, int)
    return Record(message, draw(st.binary(min_size=size, max_size=size)))


@st.composite
def record_lists(draw: st.DrawFn, kind: Kind) -> list[Record]:
    """Lists of records that a file of a kind may hold."""
    if kind.message is None:
        return [Record(None, draw(st.binary(max_size=64)))]
    if kind.single:
        return [draw(_record(kind, kind.message))]
    if kind.head is None:
        records = draw(st.lists(_record(kind, kind.message), max_size=3))
    else:
        first = draw(_record(kind, kind.head))
        more = kind.head is not ghost_file_pb2.ghost_file_entry or first.message.chunks
        records = [first, *(draw(st.lists(_record(kind, kind.message), max_size=3)) if more else [])]
    if not kind.unique:
        return records
    seen: dict[Any, Record] = {}
    for record in records:
        seen.setdefault(tuple(getattr(record.message, name) for name in kind.unique), record)
    return list(seen.values())


@st.composite
def files(draw: st.DrawFn) -> tuple[Kind, list[Record]]:
    """A kind and what a file of it may hold."""
    kind = draw(st.sampled_from(list(KINDS.values())))
    return kind, draw(record_lists(kind))

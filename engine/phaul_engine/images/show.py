"""Images as text, for people and for jq.

A message becomes a plain dict: fields by their names, enumerators by theirs, numbers as they are. Bytes that are
printable text become text, others hexadecimal digits after `0x`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from phaul_engine.errors import ImageError
from phaul_engine.images import framing
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.directory import ImageDirectory, Location, chain, opened
from phaul_engine.images.framing import Record
from phaul_engine.images.kinds import parse_name
from phaul_engine.images.pages import parse_runs
from phaul_engine.images.pb import core_x86_pb2

# Fields that people read in hexadecimal: addresses, registers, bit maps.
_HEXADECIMAL = {"vaddr", "start", "end", "madv", "status", "prot", "flags", "dev", "rdev", "s_dev", "root_dev", "i_ino"}
_HEXADECIMAL |= {"sigaction", "restorer", "mask", "blk_sigset", "sigmask", "sival_ptr", "clear_tid_addr", "futex_rla"}
_HEXADECIMAL |= {"ss_sp", "rseq_abi_pointer"} | set(core_x86_pb2.user_x86_regs_entry.DESCRIPTOR.fields_by_name)
_HEXADECIMAL_PREFIXES = ("mm_", "cap_")
_INDENT = "  "
_EXTRA = 1024  # bytes of what follows a record that are shown


@dataclass(frozen=True)
class Listed:
    """One file of a directory: its name, its length in bytes, and how many records it has (None: it has none)."""

    name: str
    size: int
    records: int | None


def list_images(location: Location) -> list[Listed]:
    """The images in a directory. `ImageError` for one that is malformed."""
    listed = []
    with opened(location) as directory:
        for name in directory.names():
            parsed = parse_name(name)
            if parsed is None:
                continue
            kind, _ = parsed
            raw = kind.message is None
            records = None if raw else len(framing.decode(kind, directory.read(name), name))
            listed.append(Listed(name, directory.size(name), records))
    return listed


def show_file(location: Location, name: str) -> dict[str, Any]:
    """One image: its name, kind and entries; what follows a record stands under `extra`, and how many more bytes there
    are of it under `extra_left_out`."""
    parsed = parse_name(name)
    if parsed is None or parsed[0].message is None:
        raise ImageError(f"{name} holds no records that could be shown")
    kind, _ = parsed
    with opened(location) as directory:
        records = framing.decode(kind, directory.read(name), name)
    return {"file": name, "kind": kind.stem, "entries": [record_to_dict(record) for record in records]}


def statistics(location: Location) -> dict[str, Any]:
    """What the writer measured (stats-dump, stats-restore), how large the files of each kind are, and in which round
    the pages of each pagemap stand."""
    result: dict[str, Any] = {"measured": {}, "bytes": {}, "pages": {}}
    with opened(location) as directory:
        checkpoint = Checkpoint.load(directory, pagemaps=False)
        for ident in checkpoint.idents("stats"):
            result["measured"][ident] = to_dict(checkpoint.one("stats", ident)).get(str(ident), {})
        for listed in list_images(directory):
            parsed = parse_name(listed.name)
            assert parsed is not None
            stem = parsed[0].stem
            result["bytes"][stem] = result["bytes"].get(stem, 0) + listed.size
        result["pages"] = _pages_by_round(directory)
    return result


def _pages_by_round(directory: ImageDirectory) -> dict[str, dict[str, int]]:
    """By pagemap and directory, newest first, how many pages stand there."""
    found: dict[str, dict[str, int]] = {}
    for level in chain(directory):
        try:
            for name in level.names():
                parsed = parse_name(name)
                if parsed is not None and parsed[0].stem.startswith("pagemap"):
                    runs = parse_runs(framing.decode(parsed[0], level.read(name), name), name)
                    found.setdefault(name, {})[level.label] = runs.present()
        finally:
            if level is not directory:
                level.close()
    return found


def record_to_dict(record: Record) -> dict[str, Any]:
    """A record as a dict; of what follows it, such as the content of a deleted file, the beginning."""
    shown = to_dict(record.message)
    if record.payload:
        shown["extra"] = _text(record.payload[:_EXTRA])
        if len(record.payload) > _EXTRA:
            shown["extra_left_out"] = len(record.payload) - _EXTRA
    return shown


def to_dict(message: Message) -> dict[str, Any]:
    """A message as a dict of its set fields."""
    return {descriptor.name: _value(descriptor, value) for descriptor, value in message.ListFields()}


def _value(descriptor: FieldDescriptor, value: Any) -> Any:
    return [_single(descriptor, one) for one in value] if descriptor.is_repeated else _single(descriptor, value)


def _single(descriptor: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Message):
        return to_dict(value)
    if descriptor.enum_type is not None:
        return descriptor.enum_type.values_by_number[value].name
    return _text(value) if isinstance(value, bytes) else value


def _text(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return "0x" + value.hex()
    return text if text.isprintable() and not text.startswith("0x") else "0x" + value.hex()


def lines(shown: dict[str, Any], depth: int = 0) -> Iterator[str]:
    """A dict of `show_file` or `statistics` as indented lines for people."""
    for key, value in shown.items():
        start = f"{_INDENT * depth}{key}:"
        if isinstance(value, dict):
            yield start
            yield from lines(value, depth + 1)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, one in enumerate(value):
                yield f"{_INDENT * depth}{key} {index}:"
                yield from lines(one, depth + 1)
        elif isinstance(value, list):
            yield f"{start} {' '.join(_plain(key, one) for one in value)}"
        else:
            yield f"{start} {_plain(key, value)}"


def _plain(key: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and _hexadecimal(key):
        return f"{value:#x}"
    return str(value)


def _hexadecimal(key: str) -> bool:
    return key in _HEXADECIMAL or key.startswith(_HEXADECIMAL_PREFIXES)

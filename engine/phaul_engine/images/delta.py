"""The images of a tree as what differs from images that the other side has already.

In a freeze little is other than in the survey before it: registers, offsets, a counter. So only those records travel
and are parsed. A delta names every file of the later checkpoint in its order, with the number of its records and those
that are new; a file all of whose records are in it needs no earlier one. Records are as in image files.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence

from phaul_engine.errors import ImageError
from phaul_engine.images import framing
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.framing import Record
from phaul_engine.images.kinds import Ident, Kind, kind_of, parse_name

__all__ = ["Known", "apply"]

_SIGNATURE = b"phauldl1"
_FILE = struct.Struct("<3I")  # length of the name, records in all, records that follow
_RECORD = struct.Struct("<2I")  # index, size
_MAX_NAME = 64
_MAX_RECORDS = 1 << 24


class Known:
    """What the other side has: the records of a checkpoint that was sent to it, as they were."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = dict(_encoded(checkpoint))

    def delta(self, checkpoint: Checkpoint) -> bytes:
        """What makes that checkpoint this one."""
        parts = [_SIGNATURE]
        for name, records in _encoded(checkpoint):
            before = self._files.get(name, [])
            new = [
                (index, record)
                for index, record in enumerate(records)
                if len(before) != len(records) or before[index] != record
            ]
            parts += [_FILE.pack(len(name), len(records), len(new)), name]
            for index, record in new:
                parts += [_RECORD.pack(index, len(record)), record]
        return b"".join(parts)


def apply(before: Checkpoint, data: bytes) -> Checkpoint:
    """The opposite of `Known.delta`. Files and records that are the same are the very same objects in both.

    `ImageError` for anything that is malformed, or does not fit to `before`.
    """
    if not data.startswith(_SIGNATURE):
        raise ImageError("this is no delta of a checkpoint")
    checkpoint, view, at = Checkpoint(), memoryview(data), len(_SIGNATURE)
    try:
        while at < len(data):
            size, total, count = _FILE.unpack_from(data, at)
            at += _FILE.size + size
            if not 0 < size <= _MAX_NAME or count > total or total > _MAX_RECORDS or at > len(data):
                raise ImageError(f"a delta has a file with {count} of {total} records and a name of {size} bytes")
            kind, ident = _named(data[at - size : at])
            if checkpoint.has(kind.stem, ident):
                raise ImageError(f"there are two files called {kind.name(ident)}")
            known: Sequence[Record | None] | None = before.share(kind.stem, ident)
            if count < total and (known is None or len(known) != total):
                raise ImageError(
                    f"a delta has {count} of {total} records of {kind.name(ident)}: the others are not known"
                )
            if count or known is None or len(known) != total:
                known, at = _merge(kind, kind.name(ident), view, at, count, known if count < total else [None] * total)
            checkpoint.adopt(kind.stem, ident, known)  # type: ignore[arg-type]  # what was None has been replaced
    except struct.error as error:
        raise ImageError(f"a delta ends too early: {error}") from error
    return checkpoint


def _merge(
    kind: Kind, name: str, view: memoryview, at: int, count: int, known: Sequence[Record | None] | None
) -> tuple[list[Record | None], int]:
    """The records of a file, of which `count` follow at `at`; and where they end."""
    merged = list(known or ())
    last = -1
    for _ in range(count):
        index, size = _RECORD.unpack_from(view, at)
        at += _RECORD.size + size
        if not last < index < len(merged) or at > len(view):
            raise ImageError(f"record {index} of {name} is out of order, or too long, in a delta")
        before = [record.message for record in merged[:index] if record is not None] if kind.head else []
        merged[index] = framing.decode_record(kind, index, before, view[at - size : at], name)
        last = index
    framing.check_unique(kind, [record.message for record in merged if record is not None], name)
    return merged, at


@functools.lru_cache(maxsize=1 << 14)
def _named(name: bytes) -> tuple[Kind, Ident]:
    """What a file's name means. Remembered: it comes with the survey, and again in the freeze."""
    parsed = parse_name(name.decode("ascii", "replace"))
    if parsed is None:
        raise ImageError(f"{name!r} is not the name of an image")
    return parsed


@functools.lru_cache(maxsize=1 << 14)
def _name_of(stem: str, ident: Ident) -> tuple[Kind, bytes]:
    kind = kind_of(stem)
    return kind, kind.name(ident).encode()


def _encoded(checkpoint: Checkpoint) -> Iterator[tuple[bytes, list[bytes]]]:
    """Name and records of each file."""
    for stem, ident in checkpoint.files():
        kind, name = _name_of(stem, ident)
        yield name, framing.encode_records(kind, checkpoint.share(stem, ident) or (), stem)

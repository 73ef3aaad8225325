"""The images of a tree as what differs from images that the other side has already.

In a freeze little is other than in the survey before it: registers, offsets, a counter. So only those records travel
and are parsed. A delta says how many files the later checkpoint has and how many follow, each with the number of its
records and those that are new; a file all of whose records are in it needs no earlier one. Where not all follow, the
later checkpoint has the files of the earlier one, those of each kind in their order, and those that do not follow are
the same. Records are as in image files.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from operator import itemgetter

from phaul_engine.errors import ImageError
from phaul_engine.images import framing
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.framing import Record
from phaul_engine.images.kinds import Ident, Kind, kind_of, parse_name

__all__ = ["Known", "apply"]

_SIGNATURE = b"phauldl2"
_HEAD = struct.Struct("<2I")  # files in all, files that follow
_FILE = struct.Struct("<3I")  # length of the name, records in all, records that follow
_RECORD = struct.Struct("<2I")  # index, size
_MAX_NAME = 64
_MAX_RECORDS = 1 << 24


class Known:
    """What the other side has: the records of a checkpoint that was sent to it, as they were."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = dict(_encoded(checkpoint))
        self._names = _by_kind(checkpoint)

    def delta(self, checkpoint: Checkpoint) -> bytes:
        """What makes that checkpoint this one."""
        parts: list[bytes] = []
        files, follow, whole = 0, 0, _by_kind(checkpoint) != self._names
        for name, records in _encoded(checkpoint):
            files += 1
            before = self._files.get(name, [])
            if before == records and not whole:
                continue
            known = len(before) == len(records)
            new = [(index, one) for index, one in enumerate(records) if not known or before[index] != one]
            parts += [_FILE.pack(len(name), len(records), len(new)), name]
            for index, record in new:
                parts += [_RECORD.pack(index, len(record)), record]
            follow += 1
        return b"".join([_SIGNATURE, _HEAD.pack(files, follow), *parts])


def apply(before: Checkpoint, data: bytes) -> Checkpoint:
    """The opposite of `Known.delta`. Files and records that are the same are the very same objects in both.

    `ImageError` for anything that is malformed, or does not fit to `before`.
    """
    if not data.startswith(_SIGNATURE):
        raise ImageError("this is no delta of a checkpoint")
    view, at, seen = memoryview(data), len(_SIGNATURE) + _HEAD.size, set()
    try:
        files, follow = _HEAD.unpack_from(data, len(_SIGNATURE))
        if follow < files != len(before.files()):
            raise ImageError(f"a delta has {follow} of {files} files: the others are not known")
        checkpoint = before.again() if follow < files else Checkpoint()
        for _ in range(follow):
            size, total, count = _FILE.unpack_from(data, at)
            at += _FILE.size + size
            if not 0 < size <= _MAX_NAME or count > total or total > _MAX_RECORDS or at > len(data):
                raise ImageError(f"a delta has a file with {count} of {total} records and a name of {size} bytes")
            kind, ident, name = _named(data[at - size : at])
            if name in seen:
                raise ImageError(f"there are two files called {name}")
            seen.add(name)
            known: Sequence[Record | None] | None = before.share(kind.stem, ident)
            if follow < files and known is None:
                raise ImageError(f"a delta has {name}, which is not among the files that it says are known")
            if count < total and (known is None or len(known) != total):
                raise ImageError(f"a delta has {count} of {total} records of {name}: the others are not known")
            if count or known is None or len(known) != total:
                known, at = _merge(kind, name, view, at, count, known if count < total else [None] * total)
            checkpoint.adopt(kind.stem, ident, known)  # type: ignore[arg-type]  # what was None has been replaced
    except struct.error as error:
        raise ImageError(f"a delta ends too early: {error}") from error
    if at != len(data):
        raise ImageError(f"a delta goes on after its last file, for {len(data) - at} bytes")
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
    if kind.unique:
        framing.check_unique(kind, [record.message for record in merged if record is not None], name)
    return merged, at


@functools.lru_cache(maxsize=1 << 14)
def _named(raw: bytes) -> tuple[Kind, Ident, str]:
    """What a file's name means. Remembered: it comes with the survey, and again in the freeze."""
    name = raw.decode("ascii", "replace")
    parsed = parse_name(name)
    if parsed is None:
        raise ImageError(f"{name!r} is not the name of an image")
    return *parsed, name


@functools.lru_cache(maxsize=1 << 14)
def _name_of(stem: str, ident: Ident) -> tuple[Kind, bytes]:
    kind = kind_of(stem)
    return kind, kind.name(ident).encode()


def _by_kind(checkpoint: Checkpoint) -> list[tuple[str, Ident]]:
    """All files, those of a kind in their order."""
    return sorted(checkpoint.files(), key=itemgetter(0))


def _encoded(checkpoint: Checkpoint) -> Iterator[tuple[bytes, list[bytes]]]:
    """Name and records of each file."""
    for stem, ident in checkpoint.files():
        kind, name = _name_of(stem, ident)
        yield name, framing.encode_records(kind, checkpoint.share(stem, ident) or (), stem)

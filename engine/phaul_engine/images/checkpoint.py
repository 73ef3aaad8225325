"""One checkpoint: the records of its image files, in memory.

A kind is the stem of a file's name ("core", "files", "tcp-stream"); what stands behind the stem in the name is the
ident: a pid, the id of a table or namespace, an inode number (hexadecimal in the name, a number here). Kinds that
exist once have no ident.

These records are also the engine's only intermediate form: `to_bytes` is how they travel.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from phaul_engine.errors import ImageError
from phaul_engine.images import framing
from phaul_engine.images.directory import ImageDirectory, Location, opened
from phaul_engine.images.framing import Record
from phaul_engine.images.kinds import Ident, kind_of, parse_name

__all__ = ["Checkpoint", "Record"]

_SIGNATURE = b"phaulck1"
_ENTRY = struct.Struct("<IQ")  # length of the name, length of the contents
_MAX_NAME = 64


class Checkpoint:
    """The records of one checkpoint, by kind and ident, each in its order."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, Ident], list[Record]] = {}

    def put(self, kind: str, ident: Ident, message: Any, payload: bytes = b"") -> Record:
        """Append a record."""
        if (kind, ident) not in self._files:
            kind_of(kind).name(ident)
        record = Record(message, payload)
        self._files.setdefault((kind, ident), []).append(record)
        return record

    def records(self, kind: str, ident: Ident = None) -> list[Record]:
        """The records of a file, none if there is no such file. The list is a copy, the records are not."""
        return list(self._files.get((kind, ident), ()))

    def share(self, kind: str, ident: Ident = None) -> list[Record] | None:
        """The list of a file's records itself, not to be changed; None if there is no such file."""
        return self._files.get((kind, ident))

    def adopt(self, kind: str, ident: Ident, records: list[Record]) -> None:
        """Have a file with these records; the list may be another checkpoint's, and the name is known to be good."""
        self._files[kind, ident] = records

    def again(self) -> Checkpoint:
        """Another one with the same files, which are the very same objects."""
        other = Checkpoint()
        other._files.update(self._files)
        return other

    def shares(self, other: Checkpoint, *kinds: str) -> bool:
        """Whether all files of these kinds are the very same objects in both: then nothing in them differs."""
        ours = {key: records for key, records in self._files.items() if key[0] in kinds}
        theirs = {key for key in other._files if key[0] in kinds}
        return ours.keys() == theirs and all(other._files[key] is records for key, records in ours.items())

    def one(self, kind: str, ident: Ident = None) -> Any:
        """The message of a file that holds exactly one record; `ImageError` if it does not."""
        records = self._files.get((kind, ident), [])
        if len(records) != 1:
            name = kind_of(kind).name(ident)
            raise ImageError(f"{name} holds {len(records)} records where there must be one")
        return records[0].message

    def has(self, kind: str, ident: Ident = None) -> bool:
        """Whether there is such a file."""
        return (kind, ident) in self._files

    def idents(self, kind: str) -> list[Ident]:
        """The idents of all files of a kind, in the order they came."""
        return [ident for known, ident in self._files if known == kind]

    def files(self) -> list[tuple[str, Ident]]:
        """Kind and ident of every file, in the order they came."""
        return list(self._files)

    def remove(self, kind: str, ident: Ident = None) -> list[Record]:
        """Forget a file; what it held is returned."""
        return self._files.pop((kind, ident), [])

    def save(self, location: Location) -> None:
        """Write every file into a directory, a path or a descriptor. Other files there stay as they are.

        Nothing is written if a record is not what its kind says (`ImageError`).
        """
        contents = list(self._encoded())
        with opened(location) as directory:
            for name, content in contents:
                directory.write(name, content)

    @classmethod
    def load(cls, location: Location, *, pagemaps: bool = True) -> Checkpoint:
        """Read every image file of a directory. `ImageError` for anything that is malformed.

        Contents of pages are never read. Without `pagemaps`, the maps of them are left out too: `pages.PageMap`
        reads them when they are needed.
        """
        checkpoint = cls()
        with opened(location) as directory:
            for name in directory.names():
                checkpoint.load_file(directory, name, pagemaps=pagemaps)
        return checkpoint

    def load_file(self, directory: ImageDirectory, name: str, *, pagemaps: bool = True) -> None:
        """Read one file, as `load` does; a name that is no image's is passed over."""
        parsed = parse_name(name)
        if parsed is None:
            return
        kind, ident = parsed
        if kind.stem != "pages" and (pagemaps or not kind.stem.startswith("pagemap")):
            self._files[kind.stem, ident] = framing.decode(kind, directory.read(name), name)

    def to_bytes(self) -> bytes:
        """All files in one piece: a signature, then for each its two lengths, its name and its contents."""
        parts = [_SIGNATURE]
        for name, content in self._encoded():
            encoded = name.encode()
            parts += [_ENTRY.pack(len(encoded), len(content)), encoded, content]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Checkpoint:
        """The opposite of `to_bytes`. `ImageError` for anything that is malformed."""
        checkpoint = cls()
        for name, content in _unframe(memoryview(data)):
            parsed = parse_name(name)
            if parsed is None:
                raise ImageError(f"{name!r} is not the name of an image")
            kind, ident = parsed
            if (kind.stem, ident) in checkpoint._files:
                raise ImageError(f"there are two files called {name}")
            checkpoint._files[kind.stem, ident] = framing.decode(kind, content, name)
        return checkpoint

    def _encoded(self) -> Iterator[tuple[str, bytes]]:
        for (stem, ident), records in self._files.items():
            kind = kind_of(stem)
            name = kind.name(ident)
            yield name, framing.encode(kind, records, name)


def _unframe(view: memoryview) -> Iterable[tuple[str, memoryview]]:
    if view[: len(_SIGNATURE)] != _SIGNATURE:
        raise ImageError("this is not a checkpoint in one piece")
    position = len(_SIGNATURE)
    while position < len(view):
        if len(view) - position < _ENTRY.size:
            raise ImageError("a checkpoint in one piece ends within a head")
        name_size, size = _ENTRY.unpack_from(view, position)
        position += _ENTRY.size
        left = len(view) - position
        if not 0 < name_size <= _MAX_NAME or name_size + size > left:
            raise ImageError(f"a checkpoint in one piece has a file of {name_size} + {size} bytes, and {left} are left")
        try:
            name = bytes(view[position : position + name_size]).decode("ascii")
        except UnicodeDecodeError as error:
            raise ImageError("a checkpoint in one piece has a file with a strange name") from error
        position += name_size
        yield name, view[position : position + size]
        position += size

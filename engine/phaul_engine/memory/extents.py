"""Runs of pages, in native memory (ph_memory.h)."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

from phaul_engine.errors import EngineError
from phaul_engine.native import check, ffi, lib, new_error

PAGE_SIZE: int = lib.PH_PAGE_SIZE


class Kind(enum.IntEnum):
    """What an extent says about its pages; see ph_memory.h."""

    DATA = lib.PH_EXTENT_DATA
    DROP = lib.PH_EXTENT_DROP
    PRIVATE = lib.PH_EXTENT_PRIVATE
    REVERT = lib.PH_EXTENT_REVERT
    SAME = lib.PH_EXTENT_SAME


class Extent(NamedTuple):
    """A run of pages: an address or offset in bytes, and a count."""

    start: int
    pages: int
    kind: Kind = Kind.DATA


class Extents:
    """A list of extents. Iterating copies them one by one: for tests and small lists."""

    def __init__(self, extents: Iterable[Extent] = ()) -> None:
        handle = lib.ph_extents_new()
        if not handle:
            raise EngineError("there is no memory for a list of pages")
        self.handle: Any = ffi.gc(handle, lib.ph_extents_free)
        for extent in extents:
            self.add(*extent)

    def add(self, start: int, pages: int, kind: Kind = Kind.DATA) -> None:
        """Append a run; it grows the last one if it continues that."""
        err = new_error()
        check(lib.ph_extents_add(self.handle, start, pages, kind, err), err)

    def append(self, other: Extents, kind: Kind) -> None:
        """Append the extents of `other` that are of one kind."""
        err = new_error()
        check(lib.ph_extents_append(self.handle, other.handle, kind, err), err)

    def unite(self) -> None:
        """Sort; a page named twice stays once, by the lowest kind that names it (DATA wins)."""
        err = new_error()
        check(lib.ph_extents_unite(self.handle, err), err)

    def exclude(self, holes: Extents) -> None:
        """Take the pages of `holes` out; both lists ascend."""
        err = new_error()
        check(lib.ph_extents_exclude(self.handle, holes.handle, err), err)

    def pages(self, *kinds: Kind) -> int:
        """How many pages are of these kinds, of any without."""
        return sum(lib.ph_extents_pages(self.handle, kind) for kind in kinds or Kind)

    def clear(self) -> None:
        """Empty the list."""
        lib.ph_extents_clear(self.handle)

    def __len__(self) -> int:
        return int(self.handle.count)

    def __iter__(self) -> Iterator[Extent]:
        for index in range(self.handle.count):
            item = self.handle.items[index]
            yield Extent(item.start, item.nr_pages, Kind(item.kind))

    @classmethod
    def whole(cls, start: int, end: int) -> Self:
        """All pages of [start, end) as DATA."""
        extents = cls()
        extents.add(start, (end - start + PAGE_SIZE - 1) // PAGE_SIZE)
        return extents


class Place(NamedTuple):
    """Where pages are read from or written to: the memory of process `pid` with `fd` a descriptor of its
    /proc/PID/mem or -1 (then areas that forbid reading or writing cannot be reached), or, with pid 0, the contents of
    descriptor `fd`."""

    pid: int
    fd: int

    def native(self) -> Any:
        """As `struct ph_place`."""
        return ffi.new("struct ph_place *", {"pid": self.pid, "fd": self.fd})[0]

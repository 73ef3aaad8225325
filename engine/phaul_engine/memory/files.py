"""Pages between memory and image files, and their hashes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from phaul_engine.native import check, ffi, lib, new_error
from phaul_engine.proc.access import open_at
from phaul_engine.proc.maps import Area

from .areas import private_ranges
from .extents import Extents, Place
from .guards import find as find_guards


class Piece(NamedTuple):
    """A run of pages in a file, and where in memory it belongs."""

    start: int
    offset: int
    pages: int
    fd: int


def present(proc: int, areas: Iterable[Area]) -> Extents:
    """All private memory of a stopped process that nobody tracks, in address order; guard pages have none."""
    ranges = private_ranges(areas)
    native = ffi.new("struct ph_range[]", [(one.start, one.end, one.flags, 0) for one in ranges])
    extents = Extents()
    err = new_error()
    pagemap = open_at(proc, "pagemap")
    with open(pagemap, "rb", buffering=0):
        limit = (1 << 64) - 1
        scan = ffi.new("struct ph_scan *", {"pagemap": pagemap, "flags": lib.PH_SCAN_ALL, "limit": limit})
        check(lib.ph_scan_private(scan, native, len(native), extents.handle, err), err)
        guards = Extents()
        find_guards(pagemap, extents, guards)
    if len(guards):
        extents.exclude(guards)
    return extents


def dump_pages(place: Place, extents: Extents, fd: int, offset: int = 0, *, keep_zero: bool = False) -> Extents:
    """Write the pages of `extents` to the file `fd` from `offset` on. Returns what stands there now, in its order.

    Zero pages of anonymous memory are left out unless `keep_zero` (there is a parent image); so are pages that are
    not there any more.
    """
    written = Extents()
    err = new_error()
    position = ffi.new("uint64_t *", offset)
    flags = lib.PH_DUMP_KEEP_ZERO if keep_zero else 0
    check(lib.ph_dump_pages(place.native(), extents.handle, fd, position, flags, written.handle, err), err)
    return written


def dump_changed(place: Place, extents: Extents, known: Iterable[Piece], fd: int, offset: int = 0) -> Extents:
    """As `dump_pages`, but pages that are as the round before has them are only noted, as SAME.

    `known` is where that has its pages, in address order.
    """
    written = Extents()
    err = new_error()
    position = ffi.new("uint64_t *", offset)
    native = ffi.new("struct ph_piece[]", [tuple(piece) for piece in known])
    count = len(native)
    check(lib.ph_dump_changed(place.native(), extents.handle, native, count, fd, position, written.handle, err), err)
    return written


def fill_pages(place: Place, pieces: Iterable[Piece], *, compare: bool = False) -> None:
    """Read runs of pages from files into memory. With `compare`, pages that hold the same already are left alone: they
    stay shared with whoever has them too."""
    native = ffi.new("struct ph_piece[]", [tuple(piece) for piece in pieces])
    err = new_error()
    check(lib.ph_fill_pages(place.native(), native, len(native), lib.PH_FILL_COMPARE if compare else 0, err), err)


def hash_pages(place: Place, extents: Extents) -> bytes:
    """XXH64 of every page, 8 bytes each; 0 for one that cannot be read. Equal texts mean equal memory."""
    count = extents.pages()
    hashes = ffi.new("uint64_t[]", count)
    err = new_error()
    check(lib.ph_hash_pages(place.native(), extents.handle, hashes, count, err), err)
    return bytes(ffi.buffer(hashes))

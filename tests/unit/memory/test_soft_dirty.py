"""The reading of pagemap entries, from a file that we write ourselves (the format: admin-guide/mm/pagemap.rst)."""

from __future__ import annotations

import struct
import tempfile

import pytest
from phaul_engine.memory.extents import PAGE_SIZE, Extents, Kind
from phaul_engine.native import check, ffi, lib, new_error

_DIRTY, _FILE, _SWAP, _PRESENT = 1 << 55, 1 << 61, 1 << 62, 1 << 63
_ENTRIES = [
    _PRESENT | 12,  # clean
    _PRESENT | _DIRTY | 13,
    _SWAP | _DIRTY,
    0,  # absent
    _DIRTY,  # absent, of a new area
    _PRESENT | _FILE | _DIRTY,  # of anonymous memory the large zero page
    _PRESENT | _FILE,
    _SWAP,
]
_FIRST = 70_000  # beyond one window


def _scan(flags: int, range_flags: int) -> list[tuple[int, int, Kind]]:
    with tempfile.TemporaryFile() as pagemap:
        pagemap.seek(_FIRST * 8)
        pagemap.write(struct.pack(f"<{len(_ENTRIES)}Q", *_ENTRIES))
        pagemap.flush()
        end = (_FIRST + len(_ENTRIES)) * PAGE_SIZE
        ranges = ffi.new("struct ph_range[]", [(_FIRST * PAGE_SIZE, end, range_flags, 0)])
        scan = ffi.new(
            "struct ph_scan *",
            {"pagemap": pagemap.fileno(), "backend": lib.PH_TRACK_SOFT_DIRTY, "flags": flags, "limit": 1000},
        )
        found, err = Extents(), new_error()
        assert check(lib.ph_scan_private(scan, ranges, 1, found.handle, err), err) == 0
        return [(one.start // PAGE_SIZE - _FIRST, one.pages, one.kind) for one in found]


@pytest.mark.parametrize(
    ("flags", "range_flags", "wanted"),
    [
        (0, 0, [(1, 2, Kind.DATA), (3, 4, Kind.DROP)]),
        (lib.PH_SCAN_ALL, 0, [(0, 3, Kind.DATA), (7, 1, Kind.DATA)]),
        (0, lib.PH_RANGE_FILE, [(1, 2, Kind.PRIVATE), (3, 4, Kind.REVERT)]),
        (lib.PH_SCAN_ALL, lib.PH_RANGE_FILE, [(0, 3, Kind.PRIVATE), (7, 1, Kind.PRIVATE)]),
    ],
)
def test_entries(flags: int, range_flags: int, wanted: list[tuple[int, int, Kind]]) -> None:
    assert _scan(flags, range_flags) == wanted

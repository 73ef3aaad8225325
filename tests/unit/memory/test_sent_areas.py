"""What of an address space is sent: pages are written at the destination where they came from."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from phaul_engine.memory.areas import Care, care_of, private_ranges
from phaul_engine.proc.access import open_process
from phaul_engine.proc.maps import read_maps

_SIZE = 4 * mmap.PAGESIZE


def _judged(mapped: mmap.mmap) -> tuple[Care, bool]:
    """What the pages of a mapping of ours are, and whether they are sent."""
    mapped[:] = b"x" * _SIZE
    view = ctypes.c_char.from_buffer(mapped)
    start = ctypes.addressof(view)
    del view  # else it cannot be closed
    proc = open_process(os.getpid())
    try:
        areas = list(read_maps(proc))
    finally:
        os.close(proc)
    area = next(one for one in areas if one.start <= start < one.end)
    sent = any(one.start < start + _SIZE and start < one.end for one in private_ranges(areas))
    return care_of(area), sent


def test_pages_of_a_file_that_is_mapped_shared_are_never_sent(tmp_path: Path) -> None:
    """Written there, they would be in the very file that the program still works on here, where both hosts see it."""
    path = tmp_path / "file"
    path.write_bytes(bytes(_SIZE))
    with path.open("r+b") as file:
        for flags, care, sends in (
            (mmap.MAP_SHARED, Care.SHARED_FILE, False),
            (mmap.MAP_PRIVATE, Care.PRIVATE_FILE, True),
        ):
            with mmap.mmap(file.fileno(), _SIZE, flags=flags) as mapped:
                assert _judged(mapped) == (care, sends)


def test_shared_memory_is_sent_by_its_inode_and_private_memory_by_its_place() -> None:
    for flags, care, sends in (
        (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, Care.SHARED_MEMORY, False),
        (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, Care.ANONYMOUS, True),
    ):
        with mmap.mmap(-1, _SIZE, flags=flags) as mapped:
            assert _judged(mapped) == (care, sends)

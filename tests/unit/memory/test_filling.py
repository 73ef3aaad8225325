"""Pages come in by a userfaultfd where nothing is yet, and by writes elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import pytest
from phaul_engine import filling
from phaul_engine.images.pb import vma_pb2
from phaul_engine.memory.extents import PAGE_SIZE, Extents, Place
from phaul_engine.memory.tracker import Backend, available
from phaul_engine.native import check, lib, new_error

from tests.page_streams import page_pair, run_round, userfaultfd

_PAGES = 64
needs_wp_async = pytest.mark.skipif(
    Backend.WP_ASYNC not in available(), reason="needs userfaultfd WP_ASYNC (Linux 6.7)"
)


@needs_wp_async
def test_pages_are_where_they_belong_whatever_was_there() -> None:
    """Some pages of the area are there already, some are not registered, and in a second round all are there."""
    with contextlib.ExitStack() as stack:
        uffd = userfaultfd()
        stack.callback(os.close, uffd)
        area = mmap.mmap(-1, _PAGES * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        there = (0, 3, 4, 17, _PAGES - 1)
        for page in there:
            area[page * PAGE_SIZE] = 0xEE
        err = new_error()
        for first, last in ((0, 20), (40, _PAGES)):
            check(lib.ph_uffd_track(uffd, start + first * PAGE_SIZE, start + last * PAGE_SIZE, err), err)
        file = os.memfd_create("source")
        stack.callback(os.close, file)
        source, sink = page_pair(1)
        stack.callback(source.close)
        stack.callback(sink.close)
        source.add(1, Place(0, file))
        sink.add(1, Place(os.getpid(), -1))
        sink.fill(1, uffd)
        for number in (0, 1):
            content = os.urandom(_PAGES * PAGE_SIZE)
            os.pwrite(file, content, start)
            source.send(1, Extents.whole(start, start + len(content)))
            run_round(source, sink, number)
            assert area[:] == content
        sink.fill(1, -1)
        os.pwrite(file, b"last", start)
        source.send(1, Extents.whole(start, start + PAGE_SIZE))
        run_round(source, sink, 2)
        assert area[:4] == b"last"


@pytest.mark.parametrize(
    ("setting", "size", "advice", "registered"),
    [
        ("always [madvise] never", 4 << 20, 0, True),
        ("always [madvise] never", 4 << 20, 1 << 14, False),
        ("[always] madvise never", 4 << 20, 0, False),
        ("[always] madvise never", 1 << 20, 0, True),
        ("[always] madvise never", 4 << 20, 1 << 15, True),
        ("always madvise [never]", 4 << 20, 1 << 14, True),
    ],
)
def test_huge_pages_come_by_writes(
    setting: str, size: int, advice: int, registered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_HUGE_PAGES", tmp_path / "enabled")
    (tmp_path / "enabled").write_text(f"{setting}\n")
    area = vma_pb2.vma_entry(
        start=0x10000, end=0x10000 + size, pgoff=0, shmid=0, prot=3, flags=0, status=0, fd=-1, madv=advice
    )
    assert filling.takes_huge(area, filling.huge_pages()) is not registered

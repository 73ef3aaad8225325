"""Pages on disk, over several rounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phaul_engine.errors import ImageError
from phaul_engine.images.directory import ImageDirectory
from phaul_engine.images.pages import PAGE_SIZE, Flag, PageImages, PageWriter, Runs, parse_runs, read_runs

PID = 5


def page(number: int) -> bytes:
    """A page that can be told from others."""
    return number.to_bytes(8, "little") * (PAGE_SIZE // 8)


def write_round(path: Path, pages: dict[int, tuple[Flag, bytes]], parent: str | None = None) -> None:
    """One round: what is at each page number."""
    path.mkdir()
    with ImageDirectory(path) as directory:
        if parent is not None:
            directory.set_parent(parent)
        with PageWriter(directory, "pagemap", PID, 1) as writer:
            for number, (flag, content) in sorted(pages.items()):
                offset = writer.add([number * PAGE_SIZE], [1], flag)
                if flag & Flag.PRESENT:
                    os.pwrite(writer.fd, content, offset)


def read_all(path: Path) -> dict[int, bytes]:
    """Every page, by number."""
    found = {}
    with PageImages(path) as images:
        for vaddr, pages, fd, offset in images.extents("pagemap", PID):
            data = os.pread(fd, pages * PAGE_SIZE, offset)
            for index in range(pages):
                found[vaddr // PAGE_SIZE + index] = data[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
    return found


HISTORY = st.lists(st.dictionaries(st.integers(0, 12), st.booleans(), max_size=10), min_size=1, max_size=4)


@given(history=HISTORY)
@settings(max_examples=40, deadline=None)
def test_every_page_is_the_newest(history: list[dict[int, bool]], tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("rounds")
    known: dict[int, bytes] = {}
    for index, changes in enumerate(history):
        pages = {}
        for number, written in changes.items():
            if written or number not in known:
                pages[number] = (Flag.PRESENT, page(index * 100 + number))
            else:
                pages[number] = (Flag.PARENT, known[number])
        write_round(base / str(index), pages, f"../{index - 1}" if index else None)
        known = {number: content for number, (_, content) in pages.items()}
    assert read_all(base / str(len(history) - 1)) == known


def test_extents_are_as_long_as_they_can_be(tmp_path: Path) -> None:
    write_round(tmp_path / "0", {n: (Flag.PRESENT, page(n)) for n in range(10)})
    write_round(tmp_path / "1", {n: (Flag.PARENT if n != 4 else Flag.PRESENT, page(99)) for n in range(10)}, "../0")
    with PageImages(tmp_path / "1") as images:
        shape = [(e.vaddr // PAGE_SIZE, e.pages, e.offset) for e in images.extents("pagemap", PID)]
    assert shape == [(0, 4, 0), (4, 1, 0), (5, 5, 5 * PAGE_SIZE)]


def test_hole_in_a_parent(tmp_path: Path) -> None:
    write_round(tmp_path / "0", {n: (Flag.PRESENT, page(n)) for n in (1, 3)})
    write_round(tmp_path / "1", dict.fromkeys((1, 2, 3), (Flag.PARENT, b"")), "../0")
    with PageImages(tmp_path / "1") as images, pytest.raises(ImageError, match="0x2000"):
        images.extents("pagemap", PID)


def test_both_page_counts_are_written(tmp_path: Path) -> None:
    write_round(tmp_path / "0", {n: (Flag.PRESENT, page(n)) for n in (1, 2, 3)})
    with ImageDirectory(tmp_path / "0") as directory:
        runs = read_runs(directory, "pagemap", PID)
    entries = [record.message for record in runs.records()][1:]
    assert [(e.vaddr, e.compat_nr_pages, e.nr_pages, e.flags) for e in entries] == [(0x1000, 3, 3, 4)]


@pytest.mark.parametrize(("compat", "full"), [(7, None), (0, 7), (7, 7)])
def test_either_page_count_is_read(compat: int, full: int | None) -> None:
    runs = Runs(1)
    runs.append(0, 7, Flag.PRESENT)
    records = list(runs.records())
    entry = records[1].message
    entry.compat_nr_pages = compat
    entry.ClearField("nr_pages") if full is None else setattr(entry, "nr_pages", full)
    assert list(parse_runs(records, "x").pages) == [7]


@pytest.mark.parametrize(("in_parent", "flag"), [(True, Flag.PARENT), (False, Flag.PRESENT)])
def test_entries_from_before_there_were_flags(in_parent: bool, flag: Flag) -> None:
    runs = Runs(1)
    runs.append(0, 1, Flag.PRESENT)
    records = list(runs.records())
    records[1].message.ClearField("flags")
    records[1].message.in_parent = in_parent
    assert list(parse_runs(records, "x").flags) == [flag]


def test_pages_file_shorter_than_announced(tmp_path: Path) -> None:
    with ImageDirectory(tmp_path) as directory:
        writer = PageWriter(directory, "pagemap", PID, 1)
        writer.add([0], [2])
        os.write(writer.fd, page(1))
        with pytest.raises(ImageError):
            writer.finish()
    assert not (tmp_path / f"pagemap-{PID}.img").exists()


def test_descriptors_are_closed(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    write_round(tmp_path / "0", {1: (Flag.PRESENT, page(1))})
    write_round(tmp_path / "1", {1: (Flag.PARENT, b"")}, "../0")
    assert read_all(tmp_path / "1") == {1: page(1)}
    assert set(os.listdir("/proc/self/fd")) == before

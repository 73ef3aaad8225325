"""Page source to page sink, between memory of this very process and files."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest
from phaul_engine.memory.extents import PAGE_SIZE, Extent, Extents, Kind, Place
from phaul_engine.memory.files import Piece, dump_pages, fill_pages, hash_pages
from phaul_engine.memory.source import Codec
from phaul_engine.memory.stream import ClosedError, ProtocolError, StreamError
from phaul_engine.native import ffi

from tests.page_streams import TIMEOUT, descriptors, page_pair, run_round, threads

XXH64_OF_COUNTING = 0xF6E64BE186AF6A4  # by the xxhash package
XXH64_OF_ZEROS = 0xAC869B6F32D8BBDB
SIZE = 6 << 20
PAGES = SIZE // PAGE_SIZE


class Memory:
    """Anonymous memory of this process."""

    def __init__(self, size: int = SIZE) -> None:
        self.map = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = ffi.from_buffer(self.map, require_writable=True)
        self.start = int(ffi.cast("uintptr_t", self._view))
        self.place = Place(os.getpid(), -1)

    def fill(self, pages: range, seed: int = 1) -> None:
        rng = random.Random(seed)
        for page in pages:
            line = rng.randbytes(64)
            self.map[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = line * (PAGE_SIZE // 64)

    def extent(self, page: int, pages: int, kind: Kind = Kind.DATA) -> Extent:
        return Extent(self.start + page * PAGE_SIZE, pages, kind)

    def page(self, number: int) -> bytes:
        return self.map[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]


def memfd(size: int = SIZE) -> int:
    fd = os.memfd_create("object")
    os.ftruncate(fd, size)
    return fd


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    before = descriptors(), threads()
    yield
    deadline = time.monotonic() + 5  # a thread that has been joined is listed for a moment more
    while (descriptors() != before[0] or threads() > before[1]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert descriptors() == before[0]
    assert threads() <= before[1]  # less, if one of the test before was listed still


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("streams", [1, 3])
def test_contents_arrive(codec: Codec, streams: int) -> None:
    memory = Memory()
    memory.fill(range(100, 1400, 3))
    memory.fill(range(600, 900))
    here, there = memfd(), memfd()
    os.pwrite(here, memory.map[:], 0)
    source, sink = page_pair(streams, codec)
    with source, sink:
        source.add(7, Place(0, here))
        sink.add(7, Place(0, there))
        source.send(7, Extents.whole(0, SIZE))
        run_round(source, sink, 0)
        statistics = source.statistics()
        assert _contents(there) == memory.map[:]
        assert os.fstat(there).st_blocks * 512 <= statistics.pages_data * PAGE_SIZE
        assert statistics.pages_data + statistics.pages_zero == PAGES
        assert statistics.pages_data == sink.statistics().pages_data
        if codec is Codec.ZSTD:
            assert statistics.bytes_wire < statistics.bytes_raw / 4
    os.close(here)
    os.close(there)


def _contents(fd: int) -> bytes:
    return os.pread(fd, SIZE, 0)


@pytest.fixture
def object_fd() -> Iterator[int]:
    fd = memfd()
    yield fd
    os.close(fd)


def test_dropped_pages_become_zero_only_where_they_were_sent(object_fd: int) -> None:
    memory = Memory()
    memory.fill(range(0, 512))
    source, sink = page_pair(2)
    with source, sink:
        source.add(1, memory.place)
        sink.add(1, Place(0, object_fd))
        offset = memory.start  # the object's positions are addresses; the sink's file is sparse and as long
        sink_size = offset + SIZE
        os.ftruncate(object_fd, sink_size)
        source.send(1, Extents([memory.extent(0, 512)]))
        run_round(source, sink, 0)
        assert source.statistics().pages_data == 512
        memory.map.madvise(mmap.MADV_DONTNEED, 0, 64 * PAGE_SIZE)
        memory.map[64 * PAGE_SIZE : 65 * PAGE_SIZE] = bytes(PAGE_SIZE)
        source.send(
            1, Extents([memory.extent(0, 64, Kind.DROP), memory.extent(64, 1), memory.extent(600, 900, Kind.DROP)])
        )
        source.send(1, Extents([Extent(1 << 45, 1 << 28, Kind.DROP)]))
        run_round(source, sink, 1)
        assert source.statistics().pages_dropped == 65
        assert os.pread(object_fd, SIZE, offset) == memory.map[:]
        source.forget(1, memory.start, memory.start + SIZE)
        source.send(1, Extents([memory.extent(0, PAGES, Kind.DROP)]))
        run_round(source, sink, 2)
        assert source.statistics().pages_dropped == 65


def test_pages_over_a_file_are_told_though_zero_and_when_they_revert(object_fd: int) -> None:
    memory = Memory()
    memory.fill(range(10, 12))
    os.ftruncate(object_fd, memory.start + SIZE)
    source, sink = page_pair(1)
    with source, sink:
        source.add(1, memory.place)
        sink.add(1, Place(0, object_fd))
        os.pwrite(object_fd, b"f" * (20 * PAGE_SIZE), memory.start)  # what the file holds
        source.send(1, Extents([memory.extent(0, 5, Kind.REVERT), memory.extent(9, 3, Kind.PRIVATE)]))
        run_round(source, sink, 0)
        got = os.pread(object_fd, 20 * PAGE_SIZE, memory.start)
        assert got[: 9 * PAGE_SIZE] == b"f" * (9 * PAGE_SIZE)
        assert got[9 * PAGE_SIZE : 12 * PAGE_SIZE] == memory.map[9 * PAGE_SIZE : 12 * PAGE_SIZE]
        memory.fill(range(9, 11), seed=2)  # page 9 and 10 are the file's again, and this is what it holds
        source.send(1, Extents([memory.extent(0, 20, Kind.REVERT)]))
        run_round(source, sink, 1)
        got = os.pread(object_fd, 20 * PAGE_SIZE, memory.start)
        assert got[9 * PAGE_SIZE : 12 * PAGE_SIZE] == memory.map[9 * PAGE_SIZE : 12 * PAGE_SIZE]
        assert got[12 * PAGE_SIZE :] == b"f" * (8 * PAGE_SIZE)


def test_comparison_sends_only_what_differs(object_fd: int) -> None:
    there = memfd()
    memory = Memory()
    memory.fill(range(0, 1000))
    os.pwrite(object_fd, memory.map[:], 0)
    source, sink = page_pair(3)
    with source, sink:
        source.add(1, Place(0, object_fd), hashed=True)
        sink.add(1, Place(0, there))
        source.send(1, Extents.whole(0, SIZE))
        run_round(source, sink, 0)
        before = source.statistics()
        os.pwrite(object_fd, b"changed", 17 * PAGE_SIZE + 5)
        os.pwrite(object_fd, b"new", 1200 * PAGE_SIZE)
        os.pwrite(object_fd, bytes(PAGE_SIZE), 18 * PAGE_SIZE)
        source.send(1, Extents.whole(0, SIZE), compare=True)
        run_round(source, sink, 1)
        now = source.statistics() - before
        assert (now.pages_data, now.pages_dropped, now.pages_unchanged) == (2, 1, 998)
        assert _contents(there) == _contents(object_fd)
    os.close(there)


def test_a_page_cannot_overtake_its_round(object_fd: int) -> None:
    memory = Memory()
    memory.fill(range(0, 10))
    os.ftruncate(object_fd, memory.start + SIZE)
    source, sink = page_pair(2)
    with source, sink:
        source.add(1, memory.place)
        sink.add(1, Place(0, object_fd))
        sink.allow(0)
        source.end(0)
        source.wait(0, TIMEOUT)
        sink.wait(0, TIMEOUT)
        source.send(1, Extents([memory.extent(0, 10)]))
        source.end(1)
        source.wait(1, TIMEOUT)
        time.sleep(0.05)
        assert os.pread(object_fd, 10 * PAGE_SIZE, memory.start) == bytes(10 * PAGE_SIZE)
        sink.allow(1)
        sink.wait(1, TIMEOUT)
        assert os.pread(object_fd, SIZE, memory.start) == memory.map[:]


def test_pages_that_are_gone_are_passed_over(object_fd: int) -> None:
    memory = Memory()
    memory.fill(range(0, 1024))
    os.ftruncate(object_fd, memory.start + SIZE)
    hole = 300
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(memory.start + hole * PAGE_SIZE)
    assert libc.mprotect(address, ctypes.c_size_t(50 * PAGE_SIZE), 0) == 0
    source, sink = page_pair(2)
    with source, sink:
        source.add(1, memory.place)
        sink.add(1, Place(0, object_fd))
        source.send(1, Extents([memory.extent(0, PAGES)]))
        run_round(source, sink, 0)
        assert source.statistics().pages_gone == 50
        with open("/proc/self/mem", "rb") as mem:  # reads what may not be read
            source.remove(1)
            source.add(1, Place(os.getpid(), mem.fileno()))
            source.send(1, Extents([memory.extent(0, PAGES)]))
            run_round(source, sink, 1)
        assert source.statistics().pages_gone == 50
        assert libc.mprotect(address, ctypes.c_size_t(50 * PAGE_SIZE), 3) == 0
        assert os.pread(object_fd, SIZE, memory.start) == memory.map[:]


def test_rounds_under_a_loop(object_fd: int) -> None:
    async def rounds() -> None:
        source, sink = page_pair(2, Codec.AUTO)
        with source, sink:
            source.add(1, Place(0, object_fd))
            there = memfd()
            sink.add(1, Place(0, there))
            for number in range(5):
                os.pwrite(object_fd, os.urandom(300 * PAGE_SIZE), number * 200 * PAGE_SIZE)
                source.send(1, Extents.whole(0, SIZE))
                sink.allow(number)
                source.end(number)
                await asyncio.wait_for(source.over(number), TIMEOUT)
                await asyncio.wait_for(sink.over(number), TIMEOUT)
                assert _contents(there) == _contents(object_fd)
            os.close(there)

    asyncio.run(rounds())


def test_the_bandwidth_is_limited(object_fd: int) -> None:
    there = memfd()
    os.pwrite(object_fd, os.urandom(2 << 20), 0)
    source, sink = page_pair(2)
    with source, sink:
        source.add(1, Place(0, object_fd))
        sink.add(1, Place(0, there))
        source.set_bandwidth(5 << 20)
        started = time.monotonic()
        source.send(1, Extents.whole(0, SIZE))
        run_round(source, sink, 0)
        assert 0.15 < time.monotonic() - started < 3
        source.set_bandwidth(0)
    os.close(there)


def test_an_image_of_what_was_sent(object_fd: int) -> None:
    memory = Memory()
    memory.fill(range(5, 700))
    os.pwrite(object_fd, memory.map[:], 0)
    source, sink = page_pair(3)
    with source, sink, tempfile.TemporaryFile() as image:
        source.add(1, Place(0, object_fd))
        sink.add_image(1, image.fileno())
        source.send(1, Extents.whole(0, SIZE))
        run_round(source, sink, 0)
        os.ftruncate(object_fd, 0)
        os.ftruncate(object_fd, SIZE)
        source.send(1, Extents([Extent(6 * PAGE_SIZE, 2, Kind.DROP)]))
        run_round(source, sink, 1)
        records = list(sink.records(1))
        assert sum(one.pages for one in records if one.kind is Kind.DATA) == 695
        assert [one[0] // PAGE_SIZE for one in records if one.kind is Kind.DROP] == [6]
        assert os.fstat(image.fileno()).st_size == 695 * PAGE_SIZE
        there = Memory()
        pieces = [
            Piece(there.start + start, offset, pages, image.fileno())
            for start, offset, pages, kind in records
            if kind is Kind.DATA
        ]
        fill_pages(there.place, pieces)
        assert there.map[:] == memory.map[:]


def test_dump_and_hash() -> None:
    memory = Memory()
    memory.fill(range(100, 300))
    memory.map[200 * PAGE_SIZE : 201 * PAGE_SIZE] = bytes(PAGE_SIZE)
    extents = Extents([memory.extent(100, 200)])
    with tempfile.TemporaryFile() as image:
        written = dump_pages(memory.place, extents, image.fileno())
        assert written.pages() == 199
        assert os.fstat(image.fileno()).st_size == 199 * PAGE_SIZE
        there = Memory()
        pieces = []
        offset = 0
        for start, pages, _ in written:
            pieces.append(Piece(there.start + start - memory.start, offset, pages, image.fileno()))
            offset += pages * PAGE_SIZE
        fill_pages(there.place, pieces)
        assert there.map[:] == memory.map[:]
        moved = Extents([there.extent(100, 200)])
        assert hash_pages(there.place, moved) == hash_pages(memory.place, extents)
        there.map[299 * PAGE_SIZE] ^= 1
        assert hash_pages(there.place, moved) != hash_pages(memory.place, extents)
        assert dump_pages(memory.place, extents, image.fileno(), keep_zero=True).pages() == 200


def test_hashes_are_xxh64() -> None:
    memory = Memory()
    memory.map[:PAGE_SIZE] = bytes(range(256)) * 16
    hashes = hash_pages(memory.place, Extents([memory.extent(0, 2)]))
    assert hashes == XXH64_OF_COUNTING.to_bytes(8, "little") + XXH64_OF_ZEROS.to_bytes(8, "little")


def test_a_source_whose_peer_left_says_so(object_fd: int) -> None:
    os.pwrite(object_fd, os.urandom(SIZE), 0)
    source, sink = page_pair(2)
    source.add(1, Place(0, object_fd))
    sink.close()

    def send_rounds() -> None:
        for number in range(50):
            source.send(1, Extents.whole(0, SIZE))
            source.end(number)
            source.wait(number, TIMEOUT)

    with source, pytest.raises(ClosedError):
        send_rounds()


def test_a_sink_whose_peer_left_says_so() -> None:
    source, sink = page_pair(2)
    with sink:
        source.close()
        with pytest.raises(ClosedError):
            sink.wait(0, TIMEOUT)


def test_pages_of_an_unknown_object(object_fd: int) -> None:
    os.pwrite(object_fd, b"x", 0)
    source, sink = page_pair(1)
    with source, sink:
        source.add(1, Place(0, object_fd))
        source.send(1, Extents.whole(0, SIZE))
        sink.allow(0)
        with pytest.raises(ProtocolError, match="object 1"):
            sink.wait(0, TIMEOUT)


def test_what_is_refused_between_and_inside_rounds(object_fd: int) -> None:
    source, sink = page_pair(1)
    with source, sink:
        source.add(1, Place(0, object_fd))
        wrongs: tuple[Callable[[], object], ...] = (
            lambda: source.add(1, Place(0, object_fd)),
            lambda: source.remove(2),
            lambda: source.forget(2, 0, 4096),
            lambda: source.send(2, Extents.whole(0, 4096)),
            lambda: source.end(3),
            lambda: sink.remove(5),
        )
        for wrong in wrongs:
            with pytest.raises(Exception, match=r"object|round"):
                wrong()
        with pytest.raises(StreamError):
            source.wait(0, 0.01)

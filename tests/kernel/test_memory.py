"""Memory of a program that never rests, carried in rounds to another that has the same areas."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from phaul_engine.memory.areas import Care, Mapping, care_of, open_shared
from phaul_engine.memory.extents import PAGE_SIZE, Extents, Kind, Place
from phaul_engine.memory.files import Piece, dump_pages, fill_pages, hash_pages, present
from phaul_engine.memory.shared import SharedMemory
from phaul_engine.memory.sink import PageSink
from phaul_engine.memory.source import Codec, PageSource
from phaul_engine.memory.tracker import Backend, Tracker, available
from phaul_engine.proc.access import open_process
from phaul_engine.proc.maps import Area, read_maps

from tests.kernel import memory_subject as subject
from tests.page_streams import page_pair, run_round

_SYS_PIDFD_GETFD = 438
_SHARED_OBJECT = 1 << 32
# Soft-dirty bits have to be read page by page, there or not.
_SPARSE = 64 << 30 if Backend.WP_ASYNC in available() else 2 << 30
_libc = ctypes.CDLL(None, use_errno=True)

_NEEDS = {
    Backend.WP_ASYNC: "needs root and userfaultfd WP_ASYNC (Linux 6.7)",
    Backend.SOFT_DIRTY: "needs root and soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)",
}


def _needs(backend: Backend) -> pytest.MarkDecorator:
    return pytest.mark.skipif(os.geteuid() != 0 or backend not in available(), reason=_NEEDS[backend])


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
needs_wp_async = _needs(Backend.WP_ASYNC)
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(backend, marks=_needs(backend), id=str(backend.name)) for backend in _NEEDS]
)


@dataclass
class Program:
    """A running subject, with what the engine holds of it."""

    process: subprocess.Popen[str]
    proc: int
    mem: int
    shared: int
    uffd: int | None = None
    frozen: bool = False

    @property
    def place(self) -> Place:
        return Place(self.process.pid, self.mem)

    def areas(self) -> list[Area]:
        return [area for area in read_maps(self.proc) if subject.BASE <= area.start < subject.END]

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)
        self.frozen = True

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)
        self.frozen = False

    def give_uffd(self) -> int:
        assert self.uffd is not None
        uffd, self.uffd = self.uffd, None
        return uffd

    def read(self, start: int, size: int) -> bytes:
        return os.pread(self.mem, size, start)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        for fd in (self.proc, self.mem, self.shared, self.uffd):
            if fd is not None:
                os.close(fd)


def start(role: str, file: Path) -> Program:
    shared = os.memfd_create("shared")
    os.ftruncate(shared, subject.SHARED_SIZE)
    command = [sys.executable, str(Path(subject.__file__)), role, str(file), str(shared), str(_SPARSE)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[shared])
    assert process.stdin
    assert process.stdout
    ready = process.stdout.readline().split()
    assert ready[0] == "ready"
    proc = open_process(process.pid)
    mem = os.open("mem", os.O_RDWR | os.O_CLOEXEC, dir_fd=proc)
    program = Program(process, proc, mem, shared)
    if role == "work":
        if int(ready[1]) >= 0:
            program.uffd = _take(process.pid, int(ready[1]))
        process.stdin.write("\n")
        process.stdin.flush()
    return program


def _take(pid: int, fd: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        taken: int = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    assert taken >= 0
    return taken


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[tuple[Program, Program]]:
    file = tmp_path / "mapped"
    file.write_bytes(os.urandom(subject.FILE_SIZE))
    source = start("work", file)
    try:
        there = start("hold", file)
        try:
            yield source, there
        finally:
            there.close()
    finally:
        source.close()


def assert_same(source: Program, there: Program) -> None:
    """Byte by byte, read without the code under test."""
    areas = ((subject.ANON, subject.ANON_SIZE), (subject.FILE, subject.FILE_SIZE))
    for start_at, size in (*areas, (subject.SHARED, subject.SHARED_SIZE), (subject.HIDDEN, subject.HIDDEN_SIZE)):
        mine, other = source.read(start_at, size), there.read(start_at, size)
        pages = [slice(at, at + PAGE_SIZE) for at in range(0, size, PAGE_SIZE)]
        wrong = [page.start for page in pages if mine[page] != other[page]]
        assert not wrong, f"{len(wrong)} pages of {start_at:x} differ, first at {wrong[0]:x}"
    for start_at in range(subject.SPARSE, subject.SPARSE + subject.USED, 16 << 20):
        assert source.read(start_at, 16 << 20) == there.read(start_at, 16 << 20), f"near {start_at:x}"


class Carrier:
    """The rounds of one program, as an agent drives them."""

    def __init__(
        self, program: Program, there: Program, source: PageSource, sink: PageSink, backend: Backend = Backend.WP_ASYNC
    ) -> None:
        self.program, self.source, self.sink = program, source, sink
        self.tracker = Tracker(program.proc, program.give_uffd() if backend is Backend.WP_ASYNC else None)
        self.shared = SharedMemory(program.shared)
        source.add(1, program.place)
        sink.add(1, there.place)
        source.add(_SHARED_OBJECT, Place(0, program.shared), hashed=True)
        sink.add(_SHARED_OBJECT, Place(0, there.shared))

    def round(self, number: int, *, last: bool = False) -> int:
        """One round; the pages it carried."""
        areas = self.program.areas()
        before = self.source.statistics()
        self.tracker.track(areas)
        shared = [area for area in areas if care_of(area) is Care.SHARED_MEMORY]
        self.shared.follow((self.tracker, Mapping(one.start, one.size, one.offset)) for one in shared)
        with self._standing(needed=number > 0):
            for extents in self.tracker.scan(clear=not last, first=number == 0, limit=500):
                self.source.send(1, extents)
        if last:
            self.source.send(_SHARED_OBJECT, self.shared.everything(), compare=True)
        else:
            self.source.send(_SHARED_OBJECT, self.shared.scan(clear=True, first=number == 0))
        run_round(self.source, self.sink, number)
        return (self.source.statistics() - before).pages_data

    @contextlib.contextmanager
    def _standing(self, *, needed: bool) -> Iterator[None]:
        if self.program.frozen or not (needed and self.tracker.needs_stop):
            yield
            return
        self.program.freeze()
        yield
        self.program.thaw()


@each_backend
@pytest.mark.parametrize(("streams", "codec"), [(1, Codec.RAW), (3, Codec.ZSTD), (2, Codec.AUTO)])
def test_a_restless_program_arrives_byte_for_byte(
    programs: tuple[Program, Program], streams: int, codec: Codec, backend: Backend
) -> None:
    program, there = programs
    source, sink = page_pair(streams, codec)
    with source, sink:
        carrier = Carrier(program, there, source, sink, backend)
        with carrier.tracker:
            for number in range(5):
                carrier.round(number)
                time.sleep(0.05)
            program.freeze()
            carrier.round(5, last=True)
            assert_same(program, there)
            assert source.statistics().pages_dropped > 0
            private = Extents()
            for area in program.areas():
                if care_of(area) in (Care.ANONYMOUS, Care.PRIVATE_FILE) and area.start < subject.SPARSE:
                    private.add(area.start, area.size // PAGE_SIZE)
            assert hash_pages(program.place, private) == hash_pages(there.place, private)


@each_backend
def test_what_did_not_change_is_not_sent_again(programs: tuple[Program, Program], backend: Backend) -> None:
    program, there = programs
    program.freeze()
    source, sink = page_pair(1)
    with source, sink:
        carrier = Carrier(program, there, source, sink, backend)
        with carrier.tracker:
            first = carrier.round(0)
            assert first > 500
            assert carrier.round(1) == 0
            poke = bytes([7]) * 10
            for page in (3, 1000, 1001):
                os.pwrite(program.mem, poke, subject.ANON + page * PAGE_SIZE)
            assert carrier.round(2) == 3
            assert carrier.round(3, last=True) == 0
            assert_same(program, there)


@_needs(Backend.SOFT_DIRTY)
@pytest.mark.parametrize("advice", [14, 15], ids=["large pages", "small pages"])  # MADV_HUGEPAGE, MADV_NOHUGEPAGE
def test_a_page_that_was_dropped_and_then_read_is_a_drop(advice: int) -> None:
    """The kernel maps the zero page for the reader, and marks nothing."""
    size, huge = 4 << 20, 2 << 20
    proc = open_process(os.getpid())
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory, Tracker(proc) as tracker:
        memory.madvise(advice)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        start = (address + huge - 1) // huge * huge
        area = next(area for area in read_maps(proc) if area.start <= start < area.end)
        tracker.track([area._replace(start=start, end=start + huge)])
        memory[:] = b"x" * size
        assert sum(extents.pages(Kind.DATA) for extents in tracker.scan(clear=True, first=True)) == huge // PAGE_SIZE
        memory.madvise(mmap.MADV_DONTNEED)
        assert memory[start - address + 7 * PAGE_SIZE] == 0
        found = list(tracker.scan(clear=False))
        assert [(extents.pages(Kind.DROP), extents.pages()) for extents in found] == [(huge // PAGE_SIZE,) * 2]
    os.close(proc)


@needs_wp_async
def test_the_sparse_area_costs_no_page_tables(programs: tuple[Program, Program]) -> None:
    program, there = programs
    program.freeze()

    def page_tables() -> int:
        with open(f"/proc/{program.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmPTE"))

    before = page_tables()
    source, sink = page_pair(1)
    with source, sink:
        carrier = Carrier(program, there, source, sink)
        with carrier.tracker:
            for number in range(3):
                carrier.round(number)
            assert page_tables() < before + 1024  # kB; 64 GiB of markers would take 131,072


@needs_wp_async
def test_a_tracker_that_is_gone_leaves_the_program_alone(programs: tuple[Program, Program]) -> None:
    program, there = programs
    source, sink = page_pair(1)
    with source, sink:
        carrier = Carrier(program, there, source, sink)
        carrier.round(0)
        carrier.tracker.close()
    with open(f"/proc/{program.process.pid}/smaps") as smaps:
        assert not any(" uw" in line for line in smaps if line.startswith("VmFlags"))
    time.sleep(0.1)
    assert program.process.poll() is None


@needs_root
def test_areas_that_went_away_while_they_were_read(programs: tuple[Program, Program]) -> None:
    program, there = programs
    program.freeze()
    source, sink = page_pair(2)
    with source, sink:
        source.add(1, program.place)
        sink.add(1, there.place)
        source.send(1, Extents.whole(subject.HIDDEN + subject.HIDDEN_SIZE - PAGE_SIZE * 4, subject.HIDDEN + (2 << 20)))
        source.send(1, Extents.whole(subject.ANON, subject.ANON + subject.ANON_SIZE))
        run_round(source, sink, 0)
        assert source.statistics().pages_gone == 256
        assert program.read(subject.ANON, subject.ANON_SIZE) == there.read(subject.ANON, subject.ANON_SIZE)
        program.process.kill()
        program.process.wait()
        source.send(1, Extents.whole(subject.ANON, subject.ANON + subject.ANON_SIZE))
        run_round(source, sink, 1)
        assert source.statistics().pages_gone == 256 + subject.ANON_SIZE // PAGE_SIZE


@needs_root
def test_a_stopped_program_to_files_and_back(programs: tuple[Program, Program]) -> None:
    program, there = programs
    program.freeze()
    extents = present(program.proc, program.areas())
    assert extents.pages(Kind.DATA) > 500
    assert extents.pages(Kind.PRIVATE) > 0
    with tempfile.TemporaryFile() as image:
        pieces = []
        offset = 0
        for start_at, pages, _ in dump_pages(program.place, extents, image.fileno()):
            pieces.append(Piece(start_at, offset, pages, image.fileno()))
            offset += pages * PAGE_SIZE
        assert offset == os.fstat(image.fileno()).st_size
        fill_pages(there.place, pieces)
        shared = SharedMemory(program.shared).everything()
        for start_at, pages, kind in shared:
            if kind is Kind.DATA:
                os.pwrite(there.shared, os.pread(program.shared, pages * PAGE_SIZE, start_at), start_at)
    assert_same(program, there)


@needs_root
def test_a_shared_area_is_opened_by_its_mapping(programs: tuple[Program, Program]) -> None:
    program, _ = programs
    area = next(area for area in program.areas() if area.start == subject.SHARED)
    fd = open_shared(program.proc, area)
    try:
        assert os.fstat(fd).st_ino == os.fstat(program.shared).st_ino
    finally:
        os.close(fd)

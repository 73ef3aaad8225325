"""Areas that a program changes while it moves: whatever it maps, unmaps, moves, protects or writes, and whenever, the
copy has the same areas with the same contents."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phaul_engine.departure import Departure
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.delta import Known, apply
from phaul_engine.landing import Landing
from phaul_engine.proc.access import open_process
from phaul_engine.proc.maps import Area, read_smaps
from phaul_engine.target import Tracer

from tests.page_streams import TIMEOUT, page_pair
from tests.subjects.programs import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BASE, PAGES, PAGE = 0x10000000, 48, 4096
_END = BASE + 2 * PAGES * PAGE  # edits begin below BASE + PAGES * PAGE
_ROUNDS = 3
_SURVEYS = ("first", *range(_ROUNDS))
_PATIENT = 5000

# Does what it is told in the files order.0, order.1, ...: lists of system calls, which may fail, and of writes.
_PROGRAM = f"""
import ctypes, json, os, struct, sys, time
libc = ctypes.CDLL(None)
libc.syscall.restype = ctypes.c_long
file = os.open(sys.argv[1] + "/mapped", os.O_RDWR)
content = ctypes.create_string_buffer({PAGE})
def call(number, *args):
    return libc.syscall(number, *[ctypes.c_long(file if arg == "file" else arg) for arg in args])
def write(address, letter):
    ctypes.memset(content, letter, {PAGE})
    here = struct.pack("QQ", ctypes.addressof(content), {PAGE})
    libc.process_vm_writev(os.getpid(), here, 1, struct.pack("QQ", address, {PAGE}), 1, 0)
for number in range(10**9):
    order = f"{{sys.argv[1]}}/order.{{number}}"
    while not os.path.exists(order):
        time.sleep(0.0005)
    for name, *args in json.load(open(order)):
        {{"call": call, "write": write}}[name](*args)
    os.unlink(order)
"""

_MMAP, _MPROTECT, _MUNMAP, _MREMAP, _MADVISE, _MLOCK, _MUNLOCK = 9, 10, 11, 25, 28, 149, 150
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE = 0x1, 0x2, 0x10, 0x20, 0x4000
_TO_FIXED = 3  # MREMAP_MAYMOVE | MREMAP_FIXED
_RWX = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
_ADVICE = {"dontneed": 4, "random": 1, "dontfork": 10, "nohugepage": 15, "dontdump": 16, "wipeonfork": 18}
_SEEN_FLAGS = frozenset({"gd", "lo", "nr", "rr", "sr", "dc", "dd", "nh", "hg", "mg", "wf"})

Edit: TypeAlias = "list[str | int]"


def at(page: int) -> int:
    """The address of a page."""
    return BASE + page * PAGE


def map_(first: int, count: int, prot: int, kind: int, fd: int | str = -1, offset: int = 0) -> Edit:
    """mmap(2) over whatever is there."""
    return ["call", _MMAP, at(first), count * PAGE, prot, kind | _FIXED, fd, offset * PAGE]


def reserve(first: int, count: int) -> Edit:
    """Address space without memory, as a JVM takes for its code."""
    return map_(first, count, 0, _PRIVATE | _ANONYMOUS | _NORESERVE)


def commit(first: int, count: int) -> Edit:
    """A part of that as memory."""
    return map_(first, count, _RWX, _PRIVATE | _ANONYMOUS)


def write(page: int, letter: str) -> Edit:
    """Fill a page, if it can be written."""
    return ["write", at(page), ord(letter)]


_numbers, _counts, _letters = (
    st.integers(0, PAGES - 1),
    st.integers(1, 16),
    st.sampled_from("abcdefghijklmnopqrstuvwxyz"),
)
_prots = st.integers(0, _RWX)
_kinds = st.sampled_from(
    [
        (_PRIVATE | _ANONYMOUS, -1),
        (_PRIVATE | _ANONYMOUS | _NORESERVE, -1),
        (_SHARED | _ANONYMOUS, -1),
        (_PRIVATE, "file"),
        (_SHARED, "file"),
    ]
)


def _calls(number: int | st.SearchStrategy[int], *further: st.SearchStrategy[int]) -> st.SearchStrategy[Edit]:
    """A system call that takes a stretch of addresses, and then these."""
    return st.builds(
        lambda number, first, count, *others: ["call", number, at(first), count * PAGE, *others],
        number if isinstance(number, st.SearchStrategy) else st.just(number),
        _numbers,
        _counts,
        *further,
    )


_edits = st.one_of(
    st.builds(
        lambda first, count, prot, kind, offset: map_(first, count, prot, kind[0], kind[1], offset),
        *(_numbers, _counts, _prots, _kinds, st.integers(0, 8)),
    ),
    _calls(_MPROTECT, _prots),
    _calls(_MUNMAP),
    _calls(_MREMAP, _counts.map(lambda count: count * PAGE), st.just(0)),
    _calls(_MREMAP, _counts.map(lambda count: count * PAGE), st.just(_TO_FIXED), _numbers.map(at)),
    _calls(_MADVISE, st.sampled_from(list(_ADVICE.values()))),
    _calls(st.sampled_from([_MLOCK, _MUNLOCK])),
    st.builds(write, _numbers, _letters),
)


@dataclass
class Program:
    """One that does what it is told."""

    process: subprocess.Popen[bytes]
    directory: Path
    orders: int = 0

    def do(self, edits: list[Edit]) -> None:
        """Have it done."""
        order = self.directory / f"order.{self.orders}"
        self.orders += 1
        (self.directory / "new").write_text(json.dumps(edits))
        (self.directory / "new").rename(order)
        wait_until(lambda: not order.exists(), "the program does what it is told")


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    (tmp_path / "mapped").write_bytes(b"".join(bytes([64 + page]) * PAGE for page in range(24)))
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True) as process:
        yield Program(process, tmp_path)
        process.kill()


class Page(NamedTuple):
    """What can be seen of a page."""

    prot: int
    shared: bool
    file: tuple[int, int] | None
    flags: frozenset[str]
    content: bytes

    def __repr__(self) -> str:
        seen = "".join(letter if self.prot >> bit & 1 else "-" for bit, letter in enumerate("rwx"))
        return f"{seen}{'s' if self.shared else 'p'} {self.file} {' '.join(sorted(self.flags))} {self.content[:1]!r}"


def look(pid: int) -> dict[int, Page]:
    """The pages of a stopped process that the edits are about."""
    proc = open_process(pid)
    try:
        areas = [area for area in read_smaps(proc) if area.end > BASE and area.start < _END]
    finally:
        os.close(proc)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        return {
            (address - BASE) // PAGE: _look_at(area, address, mem.fileno())
            for area in areas
            for address in range(area.start, area.end, PAGE)
        }


def _look_at(area: Area, address: int, mem: int) -> Page:
    try:
        content = os.pread(mem, PAGE, address)
    except OSError:  # beyond the end of the file
        content = b"!"
    named = area.is_file and area.path.endswith("/mapped")
    offset = area.offset + address - area.start
    file = (area.ino if named else 0, offset) if area.is_file else None
    return Page(area.prot, area.shared, file, area.flags & _SEEN_FLAGS, content)


POINTS = [
    "begin",
    *(f"{when} {survey}" for survey in _SURVEYS for when in ("stop", "run")),
    *(f"{when} {number}" for number in range(_ROUNDS) for when in ("look", "find", "scan", "read")),
]
"""When the program may do something: before all, right before it is stopped for a survey and right after, and in each
round before anybody looks whether areas have changed, after that, before pages are scanned, and while they are read."""
Script: TypeAlias = "dict[str, list[Edit]]"


def travel(program: Program, script: Script) -> tuple[dict[int, Page], dict[int, Page]]:
    """Move the program, which does what the script says; what it and its copy have when both stand still. It runs on,
    and the copy ends."""
    program.do([["call", _MUNMAP, BASE, _END - BASE]])
    left = dict(script)
    pid = program.process.pid

    def step(point: str) -> None:
        if edits := left.pop(point, []):
            program.do(edits)

    def survey(name: str | int) -> Checkpoint:
        collection = departure.survey(
            timeout_ms=_PATIENT, stopping=lambda: step(f"stop {name}"), released=lambda _: step(f"run {name}")
        )
        assert [str(blocker) for blocker in collection.blockers] == []
        return Checkpoint.from_bytes(collection.checkpoint.to_bytes())

    def over(number: int) -> None:
        source.wait(number, TIMEOUT)
        sink.wait(number, TIMEOUT)

    with contextlib.ExitStack() as stack:
        source, sink = page_pair(1)
        stack.callback(source.close)
        stack.callback(sink.close)
        here, there = stack.enter_context(Tracer()), stack.enter_context(Tracer())
        departure = stack.enter_context(Departure(here, pid))
        step("begin")
        images = survey("first")
        departure.connect(source)
        landing = stack.enter_context(Landing(there, images, sink, options={"pidns": True}))
        landing.build()
        for number in range(_ROUNDS):
            step(f"look {number}")
            changed = departure.changed()
            step(f"find {number}")
            if number == 1 or (number and changed):
                images = survey(number)
                landing.update(images)
            step(f"scan {number}")
            landing.allow(number)
            departure.send_round(number)
            step(f"read {number}")
            over(number)
            if number == 0:
                landing.protect()
        departure.freeze(timeout_ms=_PATIENT)
        landing.allow(_ROUNDS)
        if same := not departure.changed():
            departure.send_last(_ROUNDS)
        checkpoint = departure.collect(hold=lambda: None, seal=lambda _: None, note=lambda _: None)
        if not same:
            images = Checkpoint.from_bytes(checkpoint.to_bytes())
            landing.update(images)
            departure.send_last(_ROUNDS)
        final = apply(images, Known(images).delta(checkpoint))
        landing.prepare_finish(final)
        over(_ROUNDS)
        landing.finish(final)
        return look(pid), look(landing.skeleton.pids()[pid])


_CODE = [reserve(0, 32), commit(0, 8), *(write(page, "a") for page in range(8))]
_MORE_CODE = [commit(8, 4), *(write(page, "b") for page in range(8, 12))]


@pytest.mark.parametrize("point", [point for point in POINTS if point not in ("stop 0", "run 0", "stop 2", "run 2")])
def test_code_that_a_compiler_adds(program: Program, point: str) -> None:
    """Address space that was reserved becomes memory, is written, and hardly ever again."""
    theirs, ours = travel(
        program, {"begin": _CODE} | {point: [*_CODE, *_MORE_CODE] if point == "begin" else _MORE_CODE}
    )
    assert [page for page in range(12) if theirs[page].content != b"ab"[page > 7 :][:1] * PAGE] == []
    assert ours == theirs


def _without_advice(pages: dict[int, Page]) -> dict[int, Page]:
    """Advice for a whole area does not show in the freeze (docs/decisions.md)."""
    return {number: page._replace(flags=frozenset()) for number, page in pages.items()}


@pytest.mark.timeout(600)
@settings(max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.dictionaries(st.sampled_from(POINTS), st.lists(_edits, min_size=1, max_size=4)))
def test_areas_are_as_they_were(program: Program, script: Script) -> None:
    theirs, ours = travel(program, script)
    assert _without_advice(ours) == _without_advice(theirs)

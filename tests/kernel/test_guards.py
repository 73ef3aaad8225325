"""Guard pages (madvise(2), MADV_GUARD_INSTALL) come along, and droppable memory (MAP_DROPPABLE) is that again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine import features
from phaul_engine.departure import Departure
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.memory import guards
from phaul_engine.memory.extents import Place
from phaul_engine.objects.address_space import Status
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.skeletons import collect, private_pages, remake
from tests.page_streams import page_pair
from tests.subjects.programs import wait_until

pytestmark = pytest.mark.skipif(not guards.visible(), reason="this kernel does not show guard pages (Linux 6.15)")

# Says at each step which pages it cannot touch, what the others hold, and which areas have which flags.
_PROGRAM = """
import ctypes, os, re, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
def area(address, pages, prot=3, flags=0x22):
    assert libc.mmap(address, pages * 4096, prot, flags | 0x100000, -1, 0) == address
def advise(address, first, pages, advice):
    assert libc.madvise(ctypes.c_void_p(address + first * 4096), pages * 4096, advice) == 0, ctypes.get_errno()
def touch(address, pages):
    "A letter a page: what it holds, 0 for nothing, ! for a guard."
    reader, writer = os.pipe()
    seen = ""
    for page in range(pages):
        if libc.write(writer, ctypes.c_void_p(address + page * 4096), 1) == 1:
            seen += os.read(reader, 1).replace(bytes(1), b"0").decode()
        else:
            seen += "!"
    os.close(reader); os.close(writer)
    return seen
A, B, C, D = 0x10000000, 0x20000000, 0x30000000, 0x40000000
area(A, 16); area(B, 8, prot=1); area(C, 8); area(D, 4, flags=0x28)
for page in range(16):
    ctypes.memset(A + page * 4096, ord("a") + page, 4096)
advise(A, 1, 1, 102); advise(A, 5, 2, 102); advise(B, 0, 1, 102); advise(C, 3, 1, 102)
libc.mlock(ctypes.c_void_p(C), 8 * 4096)
assert touch(C, 8) == "000!0000"
def change(*args):
    advise(A, 5, 1, 103)
    ctypes.memset(A + 5 * 4096, ord("X"), 1)
    advise(A, 10, 3, 102)
    advise(B, 0, 1, 103)
signal.signal(signal.SIGUSR1, change)
while True:
    smaps = open("/proc/self/smaps").read()
    flags = re.findall(r"^(10000000|30000000|40000000)-.*?VmFlags:([^\\n]*)", smaps, re.M | re.S)
    told = f"{touch(A, 16)} {touch(B, 8)} {touch(C, 8)} " + ",".join(
        name[:1] + "".join(" " + flag for flag in words.split() if flag in ("lo", "dp", "wf")) for name, words in flags)
    with open(sys.argv[1] + ".new", "w") as out:
        out.write(told)
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(0.01)
"""
_AS_IT_BEGAN = "a!cde!!hijklmnop !0000000 000!0000 1,3 lo,4 wf dp"
_CHANGED = "a!cdeX!hij!!!nop 00000000 000!0000 1,3 lo,4 wf dp"


@pytest.fixture
def status(tmp_path: Path) -> Path:
    return tmp_path / "status"


@pytest.fixture
def program(status: Path) -> Iterator[int]:
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", _PROGRAM, str(status)]
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True)
    wait_until(status.exists, "the program begins")
    yield process.pid
    process.returncode = 0  # whoever ended it has waited for it, and another may have its number
    if os.path.exists(f"/proc/{process.pid}"):
        os.kill(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)


def _guards(checkpoint: Checkpoint, pid: int) -> list[tuple[int, int]]:
    return [(vma.start, vma.end) for vma in checkpoint.one("mm", pid).vmas if vma.status & Status.GUARD]


def test_guard_pages_come_along(program: int, status: Path) -> None:
    assert status.read_text() == _AS_IT_BEGAN
    with Tracer() as tracer, stop_tree(tracer, program, timeout_ms=1000) as tree:
        checkpoint, pages = collect(tree, program)
        os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    assert set(features.needed(checkpoint)) == {"guard pages (MADV_GUARD_INSTALL)", "droppable memory (MAP_DROPPABLE)"}
    status.unlink()
    remake(program, checkpoint, pages)
    wait_until(status.exists, "the program goes on")
    assert status.read_text() == _AS_IT_BEGAN


@pytest.mark.parametrize("when", range(3))
def test_guard_pages_that_change_between_rounds(program: int, status: Path, when: int) -> None:
    """What scans since the survey say of changed pages, and where they were before, make the list in the freeze."""
    there = os.memfd_create("memory")  # what the page stream brings, at its addresses
    os.truncate(there, 1 << 47)
    source, sink = page_pair(1)
    with source, sink, Tracer() as tracer, Departure(tracer, program) as departure:
        survey = departure.survey(timeout_ms=1000)
        assert [str(one) for one in survey.blockers] == []
        before = _guards(survey.checkpoint, program)
        sink.add(program, Place(0, there))
        departure.connect(source)
        for number in range(3):
            sink.allow(number)
            if departure.changed():
                departure.survey(timeout_ms=1000)
            departure.send_round(number)
            sink.wait(number, 10)
            if number == when:
                os.kill(program, signal.SIGUSR1)
                wait_until(lambda: status.read_text() == _CHANGED, "the program has changed its guards")
        departure.freeze(timeout_ms=1000)
        sink.allow(3)
        if same := not departure.changed():
            departure.send_last(3)
        checkpoint = departure.collect(hold=lambda: None, seal=lambda _: None, note=lambda _: None)
        if not same:
            departure.send_last(3)
        sink.wait(3, 10)
        pages = private_pages(program, checkpoint)
        ours = [(address, content) for address, content in pages if address < 0x50000000]
        assert ours == [(address, os.pread(there, 4096, address)) for address, _ in ours]
        os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    os.close(there)
    base = 0x10000000
    wanted = [(1, 2), (6, 7), (10, 13)]
    assert before != _guards(checkpoint, program)
    assert _guards(checkpoint, program) == [
        *((base + 4096 * first, base + 4096 * end) for first, end in wanted),
        (0x30003000, 0x30004000),
    ]
    status.unlink()
    remake(program, checkpoint, pages)
    wait_until(status.exists, "the program goes on")
    assert status.read_text() == _CHANGED

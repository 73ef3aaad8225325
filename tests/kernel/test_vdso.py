"""Programs that read clocks through their vDSO, made again on a kernel with another.

This machine has one kernel. So the images are made to say that the source's vDSO was another one, by a function of
another name: then the program goes on with the old code at its old place, whose functions lead to this kernel's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine import vdso
from phaul_engine.collect import Collector
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.vma import Status
from phaul_engine.proc.access import open_process
from phaul_engine.proc.maps import Area, read_maps
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.skeletons import private_pages, remake
from tests.subjects.programs import build, parse_status, wait_until

Taken = tuple[Checkpoint, list[tuple[int, bytes]]]


def _areas(pid: int) -> list[Area]:
    proc = open_process(pid)
    try:
        return read_maps(proc)
    finally:
        os.close(proc)


def _numbers(status: Path) -> dict[str, str]:
    while "wrong" not in (fields := parse_status(status.read_text())):
        pass
    return fields


def _goes_on(status: Path) -> None:
    """It reads clocks, and none of them was wrong."""
    before = int(_numbers(status)["calls"])
    wait_until(lambda: int(_numbers(status)["calls"]) > before + 100_000, "the clocks are read")
    assert _numbers(status)["error"].strip() == ""


def _take(pid: int) -> Taken:
    """Collect the program, and end it."""
    with Tracer() as tracer, stop_tree(tracer, pid, timeout_ms=1000) as tree:
        tree.step_aside()
        with Collector() as collector:
            judged = collector.collect(tree, survey=True)
            collection = collector.collect(tree, survey=False)
        assert [str(one) for one in (*judged.blockers, *collection.blockers)] == []
        pages = private_pages(pid, collection.checkpoint)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return collection.checkpoint, pages


def _rename(checkpoint: Checkpoint, old: bytes, new: bytes) -> None:
    inventory = checkpoint.one("inventory")
    assert old + b"\0" in inventory.phaul_vdso
    inventory.phaul_vdso = inventory.phaul_vdso.replace(old + b"\0", new + b"\0")


def _redirected(pid: int) -> list[Area]:
    """What is left of other vDSOs in a process."""
    found = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        for area in _areas(pid):
            if area.prot & 4 and not area.is_file and not area.special:
                mem.seek(area.start)
                if vdso.is_redirected(mem.read(64)):
                    found.append(area)
    return found


@pytest.fixture
def status(tmp_path: Path) -> Path:
    return tmp_path / "status"


@pytest.fixture
def reader(status: Path) -> Iterator[int]:
    """A program that reads clocks: its pid."""
    quiet = subprocess.DEVNULL
    program = subprocess.Popen(
        [build("clock_reader"), str(status)], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
    )
    wait_until(lambda: status.exists() and "wrong" in parse_status(status.read_text()), "the program begins")
    yield program.pid
    program.returncode = 0  # its pid may be another process's by now: whoever ended it has waited for it
    if os.path.exists(f"/proc/{program.pid}"):
        os.kill(program.pid, signal.SIGKILL)
        os.waitpid(program.pid, 0)


def test_the_local_vdso_takes_the_place_of_the_same_one(reader: int, status: Path) -> None:
    before = [area[:4] for area in _areas(reader) if area.special]
    remake(reader, *_take(reader))
    _goes_on(status)
    assert [area[:4] for area in _areas(reader) if area.special] == before


def test_another_vdso_leads_to_the_local_one(reader: int, status: Path) -> None:
    """Three moves, each to a kernel with another vDSO: at any time there is the one that the program knows, the one
    before, and the kernel's."""
    known = next(area for area in _areas(reader) if area.path == "[vdso]")
    counts = []
    for old, new in ((b"clock_getres", b"clock_gotres"), (b"getcpu", b"gotcpu"), (b"time", b"tame")):
        checkpoint, pages = _take(reader)
        _rename(checkpoint, old, new)
        remake(reader, checkpoint, pages)
        _goes_on(status)
        left = _redirected(reader)
        assert (known.start, known.end) in [(area.start, area.end) for area in left]
        assert sum(area.path == "[vdso]" for area in _areas(reader)) == 1
        counts.append(len(left))
    assert counts == [1, 2, 2]


def test_images_without_the_code_of_another_vdso_are_refused(reader: int, status: Path) -> None:
    checkpoint, pages = _take(reader)
    code = next(vma for vma in checkpoint.one("mm", reader).vmas if vma.status & Status.VDSO)
    code.end -= 4096  # another size says that it is another one
    checkpoint.one("inventory").ClearField("phaul_vdso")
    with pytest.raises(RebuildError, match="another vDSO"):
        remake(reader, checkpoint, pages)


def test_threads_step_out_of_the_vdso(reader: int, status: Path) -> None:
    """Caught in the middle of it, again and again, they stand outside afterwards, and nothing was cut short."""
    (code,) = [area for area in _areas(reader) if area.path == "[vdso]"]
    inside = 0
    with Tracer() as tracer:
        for turn in range(1000):
            time.sleep(0.001 + turn % 7 * 0.0001)
            with stop_tree(tracer, reader, timeout_ms=1000) as tree:
                tree.read_states()
                inside += sum(code.start <= thread.state.regs[16] < code.end for thread in tree.threads)
                tree.step_aside()
                tree.read_states()
                assert not any(code.start <= thread.state.regs[16] < code.end for thread in tree.threads)
            if inside > 20:
                break
    _goes_on(status)
    assert inside > 0, "no thread was ever in the vDSO: this has tested nothing"

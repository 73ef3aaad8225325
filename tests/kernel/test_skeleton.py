"""A program with threads is collected, killed, made again as a skeleton, and goes on counting."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from phaul_engine.errors import TargetError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.proc.access import read_text
from phaul_engine.program import Program
from phaul_engine.skeleton import Skeleton
from phaul_engine.syscalls import NR
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.skeletons import collect, fill
from tests.subjects.programs import wait_until

_COUNTER = """
import os, threading, time
def count(which):
    step = 0
    while True:
        time.sleep(0.02)
        step += 1
        os.write(1, f"{which} {step} {os.getpid()} {threading.get_native_id()}\\n".encode())
for which in range(3):
    threading.Thread(target=count, args=(which,)).start()
"""


def _steps(out: Path) -> dict[str, list[list[str]]]:
    lines = [line.split() for line in out.read_text().splitlines()]
    return {which: [line for line in lines if line[0] == which] for which in "012"}


def _wait_for_steps(out: Path, wanted: dict[str, int]) -> None:
    wait_until(lambda: all(len(_steps(out)[which]) >= count for which, count in wanted.items()), "threads count", 30.0)


def test_a_program_goes_on_in_its_skeleton(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("wb") as stdout:
        program = subprocess.Popen(
            [sys.executable, "-c", _COUNTER], stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True
        )
    _wait_for_steps(out, dict.fromkeys("012", 5))
    with Tracer() as tracer, stop_tree(tracer, program.pid, timeout_ms=1000) as tree:
        checkpoint, pages = collect(tree, program.pid)
        program.kill()
    program.wait()
    before = _steps(out)
    with Tracer() as tracer, Skeleton(tracer, checkpoint) as skeleton:
        skeleton.build()
        assert skeleton.pids() == {program.pid: program.pid}
        fill(program.pid, pages)
        skeleton.protect()
        skeleton.rehearse()
        skeleton.finish(checkpoint)
        assert _steps(out) == before, "a parked task must not run"
        skeleton.release()
    _wait_for_steps(out, {which: len(lines) + 10 for which, lines in before.items()})
    os.kill(program.pid, 9)
    os.waitpid(program.pid, 0)
    for which, lines in _steps(out).items():
        assert [int(line[1]) for line in lines] == list(range(1, len(lines) + 1))
        assert {tuple(line[2:]) for line in lines} == {tuple(before[which][0][2:])}, "same pid and tid"


def _images() -> tuple[int, Checkpoint]:
    """Of a program that is gone."""
    program = subprocess.Popen(
        [sys.executable, "-c", _COUNTER], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(0.3)
    with Tracer() as tracer, stop_tree(tracer, program.pid, timeout_ms=1000) as tree:
        checkpoint, _ = collect(tree, program.pid)
        program.kill()
    program.wait()
    return program.pid, checkpoint


def test_programs_run_one_after_the_other() -> None:
    """More than fit into a slot, each of which finds what the one before has done."""
    pid, checkpoint = _images()
    with Tracer() as tracer, Skeleton(tracer, checkpoint) as skeleton:
        skeleton.build()
        births = skeleton._births
        (leader, *_) = births.tasks[pid].seats.values()
        programs = [Program() for _ in range(10)]
        programs[0].order(NR.umask, 1)
        for number, program in enumerate(programs[1:], 2):
            buffer = program.data(bytes(60_000) + bytes([number]))
            mask = program.register()
            program.load(mask, buffer.at(60_000))
            program.call(NR.umask, mask, expect=number - 1)
        births.run_all([(leader, [*programs, Program()])])
        assert int(read_text(births.view(births.tasks[pid]).proc, "status").split("Umask:\t")[1][:4], 8) == 10
        programs[4].order(NR.close, 9999, label="close what is not open")
        programs[0].order(NR.umask, 1)
        with pytest.raises(TargetError, match="close what is not open"):
            births.run_all([(leader, programs)])


def test_programs_that_take_long_or_need_the_tracer() -> None:
    pid, checkpoint = _images()
    with Tracer() as tracer, Skeleton(tracer, checkpoint) as skeleton:
        skeleton.build()
        births = skeleton._births
        leader, thread, *_ = births.tasks[pid].seats.values()
        slow, wrong = Program(), Program()
        slow.order(NR.nanosleep, slow.data(struct.pack("<qq", 0, 50_000_000)), 0)
        begun = time.monotonic()
        births.run_all([(leader, [slow]), (thread, [Program(), slow])])
        assert 0.05 <= time.monotonic() - begun < 2
        wrong.store(8, 1)
        with pytest.raises(TargetError, match="signal 11"):
            births.run_all([(leader, [slow]), (thread, [wrong])])


def test_a_skeleton_dies_with_its_maker() -> None:
    pid, checkpoint = _images()
    maker = os.fork()
    if maker == 0:
        skeleton = Skeleton(Tracer(), checkpoint)
        skeleton.build()
        os.kill(os.getpid(), 9)
    os.waitpid(maker, 0)
    time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}/exe") or not os.path.exists(f"/proc/{pid}")

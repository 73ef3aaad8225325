"""kill -9 of an agent at each thing that it does inside a program at the source, and at each instruction of what it has
injected: the program goes on as if nothing had been. Its threads check their own registers and system calls."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from tests.subjects import doomed_agent
from tests.subjects.programs import build, wait_until

ALL = bool(os.environ.get("PHAUL_ALL_FAULTS"))
TOGETHER = 40  # programs at a time
PATIENCE = 2.2  # seconds after which an interpreter whose engine is silent goes home
THREADS = ("computes", "sleeps", "reads", "polls")


@dataclass
class Program:
    process: subprocess.Popen[bytes]
    file: Path

    @classmethod
    def start(cls, file: Path) -> Self:
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(
            [build("steady"), file], stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )
        program = cls(process, file)
        wait_until(lambda: file.exists() and file.stat().st_size > 0 and min(program.ticks()) > 0, "it goes")
        return program

    def ticks(self) -> tuple[int, ...]:
        return struct.unpack("4Q", self.file.read_bytes()[:32])

    def wrong(self) -> dict[str, int]:
        counts = struct.unpack("4Q", self.file.read_bytes()[32:64])
        return {name: count for name, count in zip(THREADS, counts, strict=True) if count}

    def check(self, when: str) -> None:
        """All its threads go on, nobody traces them, and nothing was wrong."""
        before = self.ticks()
        try:
            wait_until(lambda: all(b > a for a, b in zip(before, self.ticks(), strict=True)), "all threads go on")
        except TimeoutError as error:
            raise AssertionError(f"{when}: {error}: {before}, {self.ticks()}, {self.states()}") from error
        assert not self.wrong(), f"{when}: {self.wrong()}"
        assert set(self.tracers()) == {"0"}, when

    def states(self) -> list[str]:
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]

    def tracers(self) -> Iterator[str]:
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            yield (task / "status").read_text().partition("TracerPid:")[2].split()[0]

    def end(self, when: str) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(10) == 0, when

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Agents:
    """Agents that die."""

    def __init__(self, library: Path) -> None:
        self._nest = subprocess.Popen(
            [sys.executable, doomed_agent.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_PRELOAD": str(library)},
        )

    def act(self, program: Program, act: str, at: int, steps: int = -1) -> tuple[str, int]:
        """What came of it ("killed", or "acts"), and after how many steps, or acts."""
        assert self._nest.stdin is not None
        assert self._nest.stdout is not None
        request = {"pid": program.process.pid, "act": act, "at": at, "steps": steps}
        self._nest.stdin.write(json.dumps(request) + "\n")
        self._nest.stdin.flush()
        end, number = self._nest.stdout.readline().split(" ")
        return end, int(number)

    def close(self) -> None:
        self._nest.kill()
        self._nest.wait()


@pytest.fixture
def agents() -> Iterator[Agents]:
    made = Agents(build("deadly", "-shared", "-fPIC"))
    yield made
    made.close()


@contextmanager
def started(file: Path) -> Iterator[Program]:
    program = Program.start(file)
    try:
        yield program
    finally:
        program.kill()


def kill_all(agents: Agents, tmp_path: Path, act: str, points: list[tuple[int, int]]) -> int:
    """A program and a dead agent for each point; how many points were there to be reached."""
    reached = 0
    for start in range(0, len(points), TOGETHER):
        with ExitStack() as stack:
            programs = []
            for at, steps in points[start : start + TOGETHER]:
                program = stack.enter_context(started(tmp_path / f"{at}.{steps}"))
                programs.append((program, f"killed at {act} {at}, step {steps}"))
                end, made = agents.act(program, act, at, steps)
                reached += end == "killed" and made == max(steps, 0)
            time.sleep(PATIENCE)
            for program, when in programs:
                program.check(when)
                program.end(when)
    return reached


STRIDES = {"ask": 2, "look": 30}  # of what every run of the tests tries


@pytest.mark.parametrize("act", STRIDES)
def test_at_each_act_on_another_process(agents: Agents, tmp_path: Path, act: str) -> None:
    with started(tmp_path / "whole") as program:
        end, count = agents.act(program, act, -1)
        assert (end, count > 50) == ("acts", True)
        program.check("not killed")
        program.end("not killed")
    points = [(at, -1) for at in range(0, count, 1 if ALL else STRIDES[act])]
    reached = kill_all(agents, tmp_path, act, points)
    assert reached > 0.9 * len(points)
    print(f"{reached} agents killed before one of {count} acts")


PARTS = 6
THE_RUN = 2  # the PTRACE_CONT that sets the injected program going: two came before, one for each mapping


@pytest.mark.parametrize("part", range(PARTS if ALL else 1))
def test_at_each_instruction_of_what_is_injected(agents: Agents, tmp_path: Path, part: int) -> None:
    """To where it has answered and waits to be told more."""
    with started(tmp_path / "whole") as program:
        end, count = agents.act(program, "ask", THE_RUN, 100_000)
        assert (end, count > 100) == ("killed", True)
        time.sleep(PATIENCE)
        program.check("killed while it waits")
        program.end("killed while it waits")
    dense = range(0, min(count, 500)) if ALL else range(0, count, count // 8)
    points = [(THE_RUN, steps) for steps in sorted({*dense, *range(0, count, 20 if ALL else count)})]
    points = points[part::PARTS] if ALL else points
    reached = kill_all(agents, tmp_path, "ask", points)
    assert reached > 0.9 * len(points)
    print(f"{reached} agents killed after one of {count} instructions")

"""State of every sort goes through images both ways: stored by one of phaul and CRIU 4.2, made again by the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from phaul_engine.images.checkpoint import Checkpoint

from tests.interop.states import HEAD, STATES, TAIL, State

# crit itself, on many files at once: it takes a while to start
_CRIT = """
import sys
from pycriu import cli
for path in sys.argv[1:]:
    sys.argv = ["crit", "decode", "-i", path, "-o", "/dev/null"]
    cli.main()
"""


class Program:
    """A program of STATES, in a session of its own, with nothing open but what it opens."""

    def __init__(self, state: State, path: Path) -> None:
        self.work, self.images, self.criu = path / "work", path / "images", state.criu
        self.work.mkdir()
        self.images.mkdir(mode=0o700)
        (path / "program.py").write_text(HEAD + state.program + TAIL)
        with (path / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, path / "program.py", self.work],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        self.pid, self.path = self.process.pid, path
        self.wait_for("ready")

    def said(self) -> str:
        """What it has told."""
        out = self.work / "out"
        return out.read_text() if out.exists() else ""

    def wait_for(self, word: str) -> None:
        """Until it has said so; it fails with whatever else it says."""
        deadline = time.monotonic() + 60
        while word not in self.said().split():
            assert "Traceback" not in self.said(), self.said()
            assert time.monotonic() < deadline, self.said() + (self.path / "errors").read_text()
            time.sleep(0.02)

    def family(self) -> set[int]:
        """The processes and threads of its tree."""
        found, fresh = set(), {self.pid}
        while fresh:
            found |= fresh
            fresh = {child for pid in fresh for child in _children(pid)}
        return {int(tid) for pid in found for tid in os.listdir(f"/proc/{pid}/task")}

    def until_gone(self, numbers: set[int]) -> None:
        """Nobody has these numbers any more: an orphan is reaped by init, which takes its time."""
        self.process.wait(30)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{number}").exists() for number in numbers):
            assert time.monotonic() < deadline, numbers
            time.sleep(0.02)

    def well(self) -> None:
        """It finds everything as it was."""
        os.kill(self.pid, signal.SIGUSR1)
        self.wait_for("well")

    def end(self) -> None:
        """Kill what is left of it."""
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(self.work).encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
        self.process.wait(10)


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


@contextmanager
def started(name: str, path: Path) -> Iterator[Program]:
    """One that is ended at last."""
    program = Program(STATES[name], path)
    try:
        yield program
    finally:
        program.end()


def run(*command: object, log: Path | None = None) -> None:
    """Run it; it has to succeed."""
    quiet = subprocess.DEVNULL
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=90, stdin=quiet)
    told = "\n".join(log.read_text().splitlines()[-15:]) if log is not None and log.exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + told


def phaul(*words: object) -> None:
    """Run phaul."""
    run(sys.executable, "-m", "phaul", *words)


@pytest.mark.parametrize("name", STATES)
def test_criu_to_phaul(criu: Path, name: str, tmp_path: Path) -> None:
    with started(name, tmp_path) as program:
        family, images = program.family(), program.images
        run(criu, "dump", "-t", program.pid, "-D", images, "-o", "dump.log", *program.criu, log=images / "dump.log")
        program.until_gone(family)
        phaul("restore", "--images", images, "--detach")
        program.well()


@pytest.mark.parametrize("name", STATES)
def test_phaul_to_criu(criu: Path, crit: str, name: str, tmp_path: Path) -> None:
    """crit reads every file on the way, and all records of it."""
    with started(name, tmp_path) as program:
        family, images = program.family(), program.images
        phaul("dump", "--pid", program.pid, "--images", images, "--tcp", "established")
        program.until_gone(family)
        assert Checkpoint.load(images).files()
        phaul("images", "unlock", images)
        readable = [one for one in images.glob("*.img") if not one.name.startswith("pages-")]
        run("/usr/bin/python3", "-c", _CRIT, *readable)
        log = images / "restore.log"
        run(criu, "restore", "-d", "-D", images, "-o", log.name, *program.criu, log=log)
        program.well()

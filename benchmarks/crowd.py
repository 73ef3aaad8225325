"""How long a tree stands by the number of its processes, threads and descriptors, phase by phase, beside CRIU."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.downtime import BenchmarkError, note_phases, run_criu
from benchmarks.figures import Figures
from tests.hosts import Host, Hosts
from tests.hosts.migrate import migrate
from tests.subjects.programs import build

CROWDS = ((1, 1, 0), (200, 1, 0), (1, 500, 0), (1, 1, 1000))  # processes, threads of the first, descriptors
_PR_SET_CHILD_SUBREAPER = 36
_BIRTH = 2.0  # seconds until all are there
_LIMIT = "60000"  # ms of downtime: it is to be measured, not refused


def measure(hosts: Hosts, crowd: tuple[int, int, int], criu: Path | None, repeats: int) -> dict[str, Any]:
    """One crowd moved to and fro, and stored and restored by CRIU."""
    figures = Figures()
    shutil.copy(build("crowd"), hosts.shared / "crowd")
    words = [str(number) for number in crowd]
    process = hosts.a.popen(["/srv/shared/crowd", *words])
    time.sleep(_BIRTH)
    host = hosts.a
    try:
        for _ in range(repeats):
            done = migrate(process.pid, host, hosts.other(host), ["--max-downtime", _LIMIT], timeout=300.0)
            if done.outcome != "migrated":
                raise BenchmarkError(f"the crowd was not moved: {done}")
            host = hosts.other(host)
            figures.add("phaul_ms", done.downtime_ms)
            note_phases(done, figures)
    finally:
        _end(host)
        (hosts.shared / "crowd").unlink()
    if criu is not None:
        for _ in range(repeats):
            _by_criu(criu, words, figures)
    names = ("processes", "threads", "descriptors")
    return {**dict(zip(names, crowd, strict=True)), "repeats": repeats, **figures.summary()}


def _end(host: Host) -> None:
    """End all of the crowd."""
    for pid in host.processes():
        with suppress(OSError):
            if host.path(f"/proc/{pid}/comm").read_text().strip() == "crowd":
                host.kill(pid)


def _by_criu(criu: Path, words: list[str], figures: Figures) -> None:
    """Dump and restore, with images on tmpfs that nobody copies: what it takes at least."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as images, _crowd(words) as process:
        begun = time.monotonic()
        run_criu([str(criu), "dump", "-t", str(process.pid), "-D", images, "-o", "dump.log"])
        _reap(process)
        run_criu([str(criu), "restore", "-d", "-D", images, "-o", "restore.log"])
        figures.add("criu_ms", (time.monotonic() - begun) * 1000)


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Reap all of a crowd that is dead, so that its numbers are free."""
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-process.pid, 0)


@contextmanager
def _crowd(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A crowd on this machine, in a process group of its own."""
    quiet = subprocess.DEVNULL
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    program = [str(build("crowd")), *words]
    process = subprocess.Popen(program, start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        time.sleep(_BIRTH)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _reap(process)

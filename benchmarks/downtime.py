"""How long a program stands, by its own counter and as its client sees it, phase by phase, beside CRIU.

Both hosts are of `tests/hosts`, on this machine. The subject `heap.c` notes its gaps between ticks of 200 us:
`counter_ms` is the one in which it moved, `longest_ms` the longest of the whole migration, in which surveys stop it too
(`survey_ms`, by phaul). On a busy machine it has gaps without any migration: `quiet_ms`, in as long a time, is that
control.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figures
from benchmarks.references import aim
from tests.hosts import Hosts
from tests.hosts.migrate import Migration, migrate, moving_service
from tests.subjects.programs import Subject, build, parse_status, start_echo_client, start_echo_server, start_heap

_CONTROL_S = 2.0  # seconds that the subject is watched without a migration, about as long as one takes
_CRIU_ROOM = 3  # images, their copy and the program: what must be free for CRIU's turn, times the heap


class BenchmarkError(Exception):
    """What was to be measured did not happen."""


def by_counter(hosts: Hosts, heap_mib: int, rate_mb: int, repeats: int) -> dict[str, Any]:
    """One cell of the table: a heap, written at a rate, moved to and fro."""
    subject = start_heap(hosts.a, heap_mib=heap_mib, rate_mb=rate_mb, status=f"/srv/shared/heap-{heap_mib}-{rate_mb}")
    figures = Figures()
    for _ in range(repeats):
        subject.clear_gap()
        time.sleep(_CONTROL_S)
        figures.add("quiet_ms", subject.number("gap_us") / 1000)
        _move(hosts, subject, figures)
    subject.finish(120.0)
    summary = figures.summary()
    reference = aim(heap_mib, rate_mb)
    if reference is not None:
        summary["counter_ms"]["reference"] = reference
    return {"heap_mib": heap_mib, "rate_mb": rate_mb, "repeats": repeats, **summary}


def _move(hosts: Hosts, subject: Subject, figures: Figures) -> None:
    destination = hosts.other(subject.host)
    subject.clear_gap()
    done = migrate(subject.pid, subject.host, destination, timeout=300.0)
    if done.outcome != "migrated":
        raise BenchmarkError(f"the program was not moved: {done}")
    subject.moved_to(destination)
    subject.goes_on("ticks")
    figures.add("counter_ms", subject.number("move_us") / 1000)
    figures.add("phaul_ms", done.downtime_ms)
    figures.add("longest_ms", subject.number("gap_us") / 1000)
    note_phases(done, figures)


def note_phases(done: Migration, figures: Figures) -> None:
    """What phaul says of its surveys, its rounds, and the parts of its downtime."""
    figures.add("survey_ms", max(float(event["stood_ms"]) for event in done.of("surveyed")))
    phases = done.of("phase")
    for phase in phases:
        figures.add(f"{phase.get('side', 'source')}: {phase['phase']}", float(phase["ms"]))
    figures.add("rest (hand-overs)", done.downtime_ms - sum(float(phase["ms"]) for phase in phases))
    figures.add("rounds", len(done.rounds))


def by_client(hosts: Hosts, repeats: int, connections: int = 10) -> dict[str, Any]:
    """The longest wait of a TCP client for an answer of an echo server that moves with its address."""
    server = start_echo_server(hosts.a, hosts.service)
    client = start_echo_client(hosts.client, hosts.service, connections=connections)
    figures = Figures()
    for _ in range(repeats):
        client.clear_gap()
        time.sleep(_CONTROL_S)
        figures.add("quiet_ms", client.number("gap_us") / 1000)
        client.clear_gap()
        destination = hosts.other(server.host)
        done = migrate(server.pid, server.host, destination, moving_service(hosts))
        if done.outcome != "migrated":
            raise BenchmarkError(f"the server was not moved: {done}")
        server.moved_to(destination)
        client.goes_on("requests")
        figures.add("client_ms", client.number("gap_us") / 1000)
        figures.add("phaul_ms", done.downtime_ms)
    client.finish()
    server.host.kill(server.pid)
    return {"connections": connections, "repeats": repeats, **figures.summary()}


def criu_program() -> Path | None:
    """CRIU 4.2: $PHAUL_CRIU, or shared/peers/criu-4.2/criu in a directory above the repository."""
    given = os.environ.get("PHAUL_CRIU")
    above = [parent / "shared/peers/criu-4.2/criu" for parent in Path(__file__).resolve().parents]
    return next((one for one in ([Path(given)] if given else above) if one.exists()), None)


def by_criu(program: Path, heap_mib: int, rate_mb: int, repeats: int) -> dict[str, Any]:
    """Dump, copy and restore of the same program by CRIU, images on tmpfs: the program's own gap."""
    if shutil.disk_usage("/dev/shm").free < _CRIU_ROOM * heap_mib << 20:
        return {"heap_mib": heap_mib, "rate_mb": rate_mb, "skipped": "too little room in /dev/shm"}
    figures = Figures()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        for number in range(repeats):
            _criu_turn(program, Path(directory, str(number)), heap_mib, rate_mb, figures)
            shutil.rmtree(Path(directory, str(number)))
    return {"heap_mib": heap_mib, "rate_mb": rate_mb, "repeats": repeats, **figures.summary()}


def _criu_turn(program: Path, directory: Path, heap_mib: int, rate_mb: int, figures: Figures) -> None:
    images, copy, status = directory / "images", directory / "copy", directory / "status"
    images.mkdir(parents=True)
    words = [str(build("heap")), "--status", str(status), "--heap", str(heap_mib), "--rate", str(rate_mb)]
    subject = subprocess.Popen(
        words, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pid = subject.pid
    try:
        _until_running(status)
        subprocess.run(["kill", "-USR1", str(pid)], check=True)
        time.sleep(0.2)
        begun = time.monotonic()
        run_criu([str(program), "dump", "-t", str(pid), "-D", str(images), "-o", "dump.log"])
        subject.wait()
        shutil.copytree(images, copy)
        run_criu([str(program), "restore", "-d", "-D", str(copy), "-o", "restore.log"])
        figures.add("commands_ms", (time.monotonic() - begun) * 1000)
        time.sleep(0.5)
        figures.add("counter_ms", int(parse_status(status.read_text())["gap_us"]) / 1000)
    finally:
        subprocess.run(["kill", "-KILL", str(pid)], check=False, capture_output=True)
        if subject.returncode is None:
            subject.wait()


def run_criu(words: Sequence[str]) -> None:
    """A command of CRIU's, which must succeed."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(words)} ended with status {done.returncode}: {done.stderr[-500:]}")


def _until_running(status: Path, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not (status.exists() and status.read_text().startswith("state=running")):
        if time.monotonic() > deadline:
            raise BenchmarkError("the program does not start")
        time.sleep(0.01)

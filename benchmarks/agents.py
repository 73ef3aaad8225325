"""What a migration costs in memory: the largest resident size of the agents of either side, which must not grow with
the program's.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.figures import Figures
from tests.hosts import Hosts
from tests.hosts.migrate import migrate_command
from tests.subjects.programs import start_heap

_AGENTS = {b"phaul.source": "source_mib", b"phaul.dest": "destination_mib"}
_LOOK_S = 0.05
_PATIENCE_S = 300.0


def measure(hosts: Hosts, heap_mib: int, rate_mb: int, repeats: int) -> dict[str, Any]:
    """The largest resident sizes in MiB (VmHWM in proc_pid_status(5)), in moves to and fro."""
    subject = start_heap(hosts.a, heap_mib=heap_mib, rate_mb=rate_mb, status=f"/srv/shared/agents-{heap_mib}")
    figures = Figures()
    for _ in range(repeats):
        destination = hosts.other(subject.host)
        words = [*migrate_command(subject.pid, destination), "--json", "--yes"]
        largest: dict[str, float] = {}
        with subject.host.popen(words, stdout="/srv/shared/agents.json", stderr="/srv/shared/agents.err") as moving:
            deadline = time.monotonic() + _PATIENCE_S
            while moving.poll() is None and time.monotonic() < deadline:
                for name, size in _sizes(hosts):
                    largest[name] = max(largest.get(name, 0.0), size)
                time.sleep(_LOOK_S)
        if moving.returncode != 0:
            raise RuntimeError(f"the program was not moved: {hosts.a.path('/srv/shared/agents.err').read_text()}")
        subject.moved_to(destination)
        for name in _AGENTS.values():
            figures.add(name, largest.get(name, 0.0))
    subject.finish(120.0)
    return {"heap_mib": heap_mib, "rate_mb": rate_mb, "repeats": repeats, **figures.summary()}


def _sizes(hosts: Hosts) -> list[tuple[str, float]]:
    """Which agent, and how many MiB it has had at most; of all agents on these hosts."""
    ours = {os.readlink(f"/proc/{host.init_pid}/ns/pid") for host in (hosts.a, hosts.b)}
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, StopIteration):
            words = (directory / "cmdline").read_bytes().split(b"\0")
            name = next(name for word, name in _AGENTS.items() if word in words)
            if os.readlink(directory / "ns/pid") in ours:
                lines = (directory / "status").read_text().splitlines()
                high = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
                found.append((name, high / 1024))
    return found

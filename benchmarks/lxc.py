"""How long a TCP client waits for a container of LXC that moves, phase by phase, beside CRIU under LXC's own commands.

The client writes to redis on four connections through the bridge, with a pause of a millisecond: `client_ms` is the
longest time without any answer, `quiet_ms` the same in two seconds without a migration. Connections of HTTP and ssh are
open too. What CRIU and LXC do not do here is in the table in their own words.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from benchmarks.container import Session, http_client, redis_client, serving, why_missing
from benchmarks.downtime import BenchmarkError, criu_program, note_phases
from benchmarks.figures import Figures
from tests.hosts import Host, Hosts
from tests.subjects.lxc import Container
from tests.subjects.servers import RedisWriter

_CONTROL_S = 2.0
_SETTLE_S = 0.5  # seconds for the client to have an answer after a move
_IMAGES = "/srv/own/checkpoint"
_PATIENCE = 120.0  # seconds for a command of LXC
_WORDS = 400  # characters of what it says


def by_phaul(hosts: Hosts, container: Container, repeats: int) -> dict[str, Any]:
    """Moves to and fro."""
    figures, where = Figures(), hosts.a
    with redis_client(hosts) as writer, http_client(hosts) as http, Session(hosts) as session:
        session.goes_on()
        for _ in range(repeats):
            _control(writer, figures)
            done = container.move(where)
            if done.outcome != "migrated":
                raise BenchmarkError(f"the container was not moved: {done}")
            where = hosts.other(where)
            time.sleep(_SETTLE_S)
            figures.add("client_ms", writer.mark()["gap_ms"])
            figures.add("phaul_ms", done.downtime_ms)
            note_phases(done, figures)
            prepared = done.of("prepared")[0]
            figures.add("processes", prepared["processes"])
            figures.add("threads", prepared["threads"])
            session.goes_on()
        problems = [*writer.stop()["errors"], *http.stop()["errors"], *([session.error] if session.error else [])]
    return {"way": "phaul", "repeats": repeats, "problems": problems or "none", **figures.summary()}


def by_criu(hosts: Hosts, container: Container, repeats: int) -> dict[str, Any]:
    """lxc-checkpoint, a copy over ssh, and lxc-checkpoint -r, by CRIU 4.2."""
    program = criu_program()
    if program is None:
        return {"way": "CRIU and LXC", "skipped": "CRIU 4.2 is not here; PHAUL_CRIU can say where it is"}
    figures, where, problem = Figures(), hosts.a, ""
    with redis_client(hosts) as writer:
        for _ in range(repeats):
            _control(writer, figures)
            problem = _criu_turn(container, where, hosts.other(where), program, figures)
            if problem:
                break
            where = hosts.other(where)
            time.sleep(_SETTLE_S)
            figures.add("client_ms", writer.mark()["gap_ms"])
        problems = [problem] if problem else writer.stop()["errors"]
    return {"way": "CRIU and LXC", "repeats": repeats, "problems": problems or "none", **figures.summary()}


def _control(writer: RedisWriter, figures: Figures) -> None:
    writer.mark()
    time.sleep(_CONTROL_S)
    figures.add("quiet_ms", writer.mark()["gap_ms"])


def _criu_turn(container: Container, source: Host, destination: Host, program: Path, figures: Figures) -> str:
    """One way; what failed, in its own words."""
    path = f"{program.parent}:{source.environment['PATH']}"
    steps = (
        ("dump_ms", source, ["lxc-checkpoint", "-s", "-n", container.name, "-D", _IMAGES]),
        ("copy_ms", source, ["scp", "-qr", _IMAGES, f"root@{destination.address}:{os.path.dirname(_IMAGES)}"]),
        ("restore_ms", destination, ["lxc-checkpoint", "-r", "-n", container.name, "-D", _IMAGES]),
    )
    for host in (source, destination):
        host.run(["rm", "-rf", _IMAGES])
    for name, host, words in steps:
        begun = time.monotonic()
        done = host.run(words, env={"PATH": path}, timeout=_PATIENCE, check=False)
        figures.add(name, (time.monotonic() - begun) * 1000)
        if done.returncode:
            return f"{' '.join(words)} ended with status {done.returncode}: {_words(host, done.stderr)}"
    return ""


def _words(host: Host, said: str) -> str:
    """The errors in CRIU's log, and what the command itself has said."""
    logs = sorted(host.path(_IMAGES).glob("*.log"))
    errors = [line for log in logs for line in re.findall(r"Error \(.*", log.read_text(errors="replace"))]
    return "; ".join(line.strip() for line in (*errors, *said.splitlines()) if line.strip())[:_WORDS]


def measure(hosts: Hosts, repeats: int) -> list[dict[str, Any]]:
    """Both ways, each with a container of its own."""
    if reason := why_missing():
        return [{"skipped": reason}]
    cells = []
    for way in (by_phaul, by_criu):
        with serving(hosts) as container:
            cells.append(way(hosts, container, repeats))
    return cells

"""redis-benchmark's rate of SET while rounds are under way, against the same server before any tracking.

Rounds go on for as long as is measured: the limit on the downtime is too low ever to be met, and the bandwidth so low
that there is always something left to send. A rate that was measured after the last round is not counted.
"""

from __future__ import annotations

import csv
import shutil
import time
from typing import Any

from benchmarks.figures import Figures
from tests.hosts import Host, Hosts
from tests.hosts.migrate import migrate_command, moving_service
from tests.subjects.servers import start_redis

_REQUESTS = 40_000
_KEYS = 100_000
_ROUNDS = "1000"
_BANDWIDTH = "20M"


def measure(hosts: Hosts, repeats: int) -> dict[str, Any]:
    """Requests a second in turns, and the ratio; skipped where redis is missing."""
    if not shutil.which("redis-benchmark"):
        return {"skipped": "redis-benchmark is not installed"}
    server = start_redis(hosts.a, hosts.service)
    figures = Figures()
    _rate(hosts.client, hosts.service)
    for _ in range(repeats):
        untracked = _rate(hosts.client, hosts.service)
        words = migrate_command(
            server.pid, hosts.b, [*moving_service(hosts), "--max-downtime", "1", "--bandwidth", _BANDWIDTH]
        )
        words += ["--max-rounds", _ROUNDS, "--json", "--yes"]
        with hosts.a.popen(words, stdout="/srv/shared/rounds.json", stderr="/srv/shared/rounds.err") as moving:
            told = hosts.a.path("/srv/shared/rounds.json")
            while moving.poll() is None and '"round-started"' not in told.read_text():
                time.sleep(0.02)
            tracked = _rate(hosts.client, hosts.service)
            during = moving.poll() is None
            if during:
                moving.send_signal(2)
            moving.wait(60)
        if hosts.b.alive(server.pid):
            return {"skipped": "redis moved before its rate was measured", **figures.summary()}
        if not during:
            continue
        rounds = told.read_text().count('"round-ended"')
        figures.add("untracked_per_s", untracked)
        figures.add("rounds_per_s", tracked)
        figures.add("ratio", tracked / untracked)
        figures.add("rounds", rounds)
    server.process.stop()
    return {"repeats": repeats, **figures.summary()}


def _rate(client: Host, address: str) -> float:
    words = ["redis-benchmark", "-h", address, "-t", "set", "-n", str(_REQUESTS), "-r", str(_KEYS), "-c", "20", "--csv"]
    lines = client.run(words, timeout=120.0).stdout.splitlines()
    return next(float(row[1]) for row in csv.reader(lines) if row and row[0] == "SET")

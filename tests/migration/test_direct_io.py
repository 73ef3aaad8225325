"""Memory that devices write, which no tracker sees, is compared in the freeze."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.hosts import Hosts
from tests.migration.conftest import Mover
from tests.subjects.programs import wait_until

_PROGRAM = Path(__file__).resolve().parents[1] / "subjects/direct_reader.py"


def _reads(directory: Path) -> tuple[int, int]:
    reads, wrong = (directory / "reads").read_text().split()
    return int(reads), int(wrong)


def test_what_devices_wrote_is_not_lost(mover: Mover, hosts: Hosts) -> None:
    directory = hosts.shared / "direct"
    directory.mkdir(exist_ok=True)
    words = ["setsid", "--fork", sys.executable, str(_PROGRAM), "/srv/shared/direct"]
    assert hosts.a.run(["sh", "-c", f"exec {' '.join(words)} </dev/null >/dev/null 2>&1"]).returncode == 0
    wait_until(lambda: (directory / "pid").exists() and (directory / "reads").exists(), "it reads")
    pid = int((directory / "pid").read_text())
    migration = mover.try_to_move(pid, hosts.a)
    assert migration.outcome == "migrated", str(migration)
    before, _ = _reads(directory)
    wait_until(lambda: _reads(directory)[0] > before + 50, "it reads on at the destination")
    hosts.b.run(["kill", "-9", str(pid)])
    assert _reads(directory)[1] == 0

"""The systemd units, by systemd's own judgement."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).parents[2] / "configs" / "systemd").iterdir())
EXPOSURE = 6.0
"""The most that `systemd-analyze security` may find: 9.6 is a service without any hardening, and as root it takes no
more than this to thaw, kill, trace and undo."""


@pytest.fixture(autouse=True)
def _installed() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")


def test_units_are_valid(tmp_path: Path) -> None:
    """The command that they start may be elsewhere on this machine."""
    for unit in UNITS:
        text = unit.read_text().replace("/usr/local/bin/phaul", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    paths = [str(tmp_path / unit.name) for unit in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "phaul" in line]
    assert ours == []


def test_services_are_hardened() -> None:
    services = [str(unit) for unit in UNITS if unit.suffix == ".service"]
    assert services
    for service in services:
        command = ["systemd-analyze", "security", "--offline=true", "--no-pager", service]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
        if found is None and "offline" in done.stderr:
            pytest.skip("this systemd-analyze cannot judge a file")
        assert found, done
        assert float(found[1]) <= EXPOSURE, done.stdout

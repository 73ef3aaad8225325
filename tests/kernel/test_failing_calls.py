"""Every system call and every allocation of the native library fails once (failing_calls.py has the scenarios).

A selection, unless PHAUL_FAILING_CALLS=all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts.rootfs import REPOSITORY
from tests.kernel.failing_calls import SCENARIOS
from tests.subjects.programs import build

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

_EXTENT = os.environ.get("PHAUL_FAILING_CALLS", "few")
_MINUTES = {"few": 5, "all": 30}


@pytest.mark.timeout(_MINUTES[_EXTENT] * 60)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_call_that_fails_leaves_all_well(scenario: str, tmp_path: Path) -> None:
    shim = build("failing", "-fno-builtin", "-shared", "-fPIC")
    command = [sys.executable, "-m", "tests.kernel.failing_calls", scenario, str(tmp_path), _EXTENT]
    environment = os.environ | {"LD_PRELOAD": str(shim)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("wrong") == []
    assert told["refused"] >= 3, "it is told when a call fails"
    assert sum(told.values()) >= 7, "many were tried"

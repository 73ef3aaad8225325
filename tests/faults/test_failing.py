"""Every step fails, or hangs until the other side has given up: exactly one copy runs afterwards, and serves.

PHAUL_ALL_FAULTS=1 python -m pytest tests/faults        every point; without it a selection
"""

from __future__ import annotations

import signal
import time

import pytest

from phaul.migration import Role
from tests.faults.scene import Scene, every_run, wait_hung
from tests.faults.test_killed import POINTS
from tests.hosts import Hosts

PATIENCE = 12.0  # seconds: longer than any deadline of the freeze and after it

ERRORS = every_run(
    (Role.SOURCE, "after work FREEZE"),
    (Role.SOURCE, "before row FROZEN-COMMITTED"),
    (Role.DESTINATION, "before work LAND"),
    (Role.DESTINATION, "after row PARKED-RESUMED"),
    (Role.DESTINATION, "before work TIDY"),
)
HANGS = every_run((Role.SOURCE, "after row FROZEN-COMMITTED"))


@pytest.mark.parametrize(("role", "point"), ERRORS(POINTS), ids=lambda one: str(one).replace(" ", "-"))
def test_a_step_that_fails_leaves_one_copy(hosts: Hosts, role: Role, point: str) -> None:
    scene = Scene.begin(hosts)
    scene.arm(role, point, "error")
    migration = scene.move()
    scene.agrees(migration)


@pytest.mark.parametrize(("role", "point"), HANGS(POINTS), ids=lambda one: str(one).replace(" ", "-"))
def test_an_agent_that_wakes_up_late_leaves_one_copy(hosts: Hosts, role: Role, point: str) -> None:
    scene = Scene.begin(hosts)
    scene.arm(role, point, "hang")
    process = scene.start()
    pid = wait_hung(scene.host(role), process)
    time.sleep(PATIENCE)
    scene.host(role).kill(pid, signal.SIGCONT)
    scene.agrees(scene.answer(process))

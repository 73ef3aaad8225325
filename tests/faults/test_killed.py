"""kill -9 of either agent before and after each of its steps: exactly one copy runs afterwards, and serves.

PHAUL_ALL_FAULTS=1 python -m pytest tests/faults        every point; without it a selection that takes minutes
"""

from __future__ import annotations

import os

import pytest

from phaul.migration import Role
from tests.faults.scene import Scene
from tests.hosts import Hosts

SOURCE = {
    "work": ("CONNECT", "EXAMINE", "PREPARE", "COPY", "FREEZE", "RELEASE"),
    "row": ("PREPARED-FROZEN", "FROZEN-COMMITTED", "COMMITTED-RELEASED"),
    "send": ("HELLO", "PREPARE", "COMMIT", "RELEASED"),
}
DESTINATION = {
    "work": ("BUILD", "LAND", "DETACH", "WAKE", "SYNC", "TIDY"),
    "row": ("PREPARED-PARKED", "PARKED-RESUMED", "RESUMED-RELEASED"),
    "send": ("WELCOME", "PREPARED", "READY", "RESUMED", "GOODBYE"),
}
SELECTED = {
    (Role.SOURCE, "before work PREPARE"),
    (Role.SOURCE, "after work COPY"),
    (Role.SOURCE, "before work FREEZE"),
    (Role.SOURCE, "after work FREEZE"),
    (Role.SOURCE, "after row FROZEN-COMMITTED"),
    (Role.SOURCE, "after send COMMIT"),
    (Role.SOURCE, "after row COMMITTED-RELEASED"),
    (Role.SOURCE, "after work RELEASE"),
    (Role.DESTINATION, "after work BUILD"),
    (Role.DESTINATION, "after work LAND"),
    (Role.DESTINATION, "after send READY"),
    (Role.DESTINATION, "after work DETACH"),
    (Role.DESTINATION, "after row PARKED-RESUMED"),
    (Role.DESTINATION, "after work WAKE"),
    (Role.DESTINATION, "before send RESUMED"),
    (Role.DESTINATION, "before row RESUMED-RELEASED"),
}
POINTS = [
    (role, f"{when} {kind} {name}")
    for role, kinds in ((Role.SOURCE, SOURCE), (Role.DESTINATION, DESTINATION))
    for kind, names in kinds.items()
    for name in names
    for when in ("before", "after")
]
STAYS = {  # from which point of each side on the destination has decided
    Role.SOURCE: "after send COMMIT",
    Role.DESTINATION: "after row PARKED-RESUMED",
}


def points() -> list[tuple[Role, str]]:
    """Those to be tested in this run."""
    return [one for one in POINTS if os.environ.get("PHAUL_ALL_FAULTS") or one in SELECTED]


@pytest.mark.parametrize(("role", "point"), points(), ids=lambda one: str(one).replace(" ", "-"))
def test_an_agent_killed_at_any_step_leaves_one_copy(hosts: Hosts, role: Role, point: str) -> None:
    scene = Scene.begin(hosts)
    scene.arm(role, point, "kill")
    migration = scene.move()
    scene.words.append(str(migration))
    where = scene.runs_once()
    log = "\n".join(path.read_text() for path in scene.host(role).path("/run/phaul").glob(f"*.{role}.log"))
    assert "SIGKILL" in log, f"the point was never reached\n{scene.told()}"
    if migration.outcome == "migrated":
        assert where is hosts.b, scene.told()
    elif migration.outcome == "stayed":
        assert where is hosts.a, scene.told()
    scene.finish()

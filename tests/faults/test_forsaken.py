"""Agents and keepers of both hosts are killed, and `phaul` too: what phaul-resolve.timer starts finishes it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from phaul.migration import Role
from tests.faults.scene import Scene, wait_hung
from tests.hosts import Host, Hosts

UNIT = Path(__file__).parents[2] / "configs" / "systemd" / "phaul-resolve.service"
POINTS = [  # where whose agent stands when all are killed, and where the program is to go on
    (Role.SOURCE, "after work FREEZE", "a"),
    (Role.DESTINATION, "before row PARKED-RESUMED", "a"),
    (Role.DESTINATION, "after row PARKED-RESUMED", "b"),
]
_MODULES = (b"phaul.keeper", b"phaul.source", b"phaul.dest")
"""Keepers first: they would start recovery."""


def kill_agents(host: Host) -> None:
    words = {pid: host.path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in host.processes()}
    pids = [str(pid) for module in _MODULES for pid, some in words.items() if module in some]
    assert len(pids) == 2, words
    host.run(["/bin/kill", "-9", *pids])


def as_the_timer_does(host: Host) -> int:
    """What the unit runs; its exit status."""
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    program, *words = shlex.split(line.removeprefix("ExecStart="))
    return host.run([Path(program).name, *words], check=False, timeout=150.0).returncode


@pytest.mark.parametrize(("role", "point", "where"), POINTS, ids=lambda one: str(one).replace(" ", "-"))
def test_what_nobody_works_on_is_finished(hosts: Hosts, role: Role, point: str, where: str) -> None:
    scene = Scene.begin(hosts)
    scene.arm(role, point, "hang")
    process = scene.start()
    wait_hung(scene.host(role), process)
    process.kill()
    for host in (scene.host(role), hosts.other(scene.host(role))):
        kill_agents(host)
    scene.disarm()
    assert not scene.ended(role)
    for host in (hosts.b, hosts.a):
        assert as_the_timer_does(host) == 0, scene.told()
    assert scene.runs_once().name == where, scene.told()
    scene.finish()

"""Agent and keeper are dead, and `phaul` too: what phaul-resolve.timer starts finishes what they began."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from phaul.migration import Role
from tests.faults.scene import RUN, Scene, wait_hung
from tests.hosts import Host, Hosts
from tests.subjects.programs import wait_until

UNIT = Path(__file__).parents[2] / "configs" / "systemd" / "phaul-resolve.service"
POINTS = [  # whose agent dies, where, and where the program is then
    (Role.SOURCE, "after work FREEZE", "a"),
    (Role.DESTINATION, "after row PARKED-RESUMED", "b"),
]


def kill_with_its_keeper(host: Host, agent: int) -> None:
    """The keeper first: it would start recovery."""
    keeper = int(host.path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"phaul.keeper" in host.path(f"/proc/{keeper}/cmdline").read_bytes()
    host.kill(keeper)
    host.kill(agent)


def as_the_timer_does(host: Host) -> int:
    """What the unit runs; its exit status."""
    (line,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    program, *words = shlex.split(line.removeprefix("ExecStart="))
    return host.run([Path(program).name, *words], check=False).returncode


@pytest.mark.parametrize(("role", "point", "where"), POINTS, ids=lambda one: str(one).replace(" ", "-"))
def test_what_nobody_works_on_is_finished(hosts: Hosts, role: Role, point: str, where: str) -> None:
    scene = Scene.begin(hosts)
    scene.arm(role, point, "hang")
    process = scene.start()
    agent = wait_hung(scene.host(role))
    process.kill()
    kill_with_its_keeper(scene.host(role), agent)
    scene.disarm()
    for host in (hosts.a, hosts.b):
        gone = scene.host(role) is host  # nobody is left to remove the listener's name
        wait_until(lambda host=host, gone=gone: gone or not list(host.path(RUN).glob("*.sock")), "its end", 150.0)
    assert not scene.ended(role)
    for host in (hosts.b, hosts.a):
        assert as_the_timer_does(host) == 0, scene.told()
    assert scene.runs_once().name == where, scene.told()
    scene.finish()

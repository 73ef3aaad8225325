"""What happens around a migration: the operator calls it off or goes away, sshd dies, the disk is full."""

from __future__ import annotations

import signal
import time

import pytest

from phaul.migration import Role
from tests.faults.scene import STATE, Scene, at_length, every_run, wait_hung
from tests.hosts import Hosts
from tests.subjects.programs import wait_until

STEPS = ["before work BUILD", "after send PREPARED", "before work LAND", "before send READY"]


@pytest.mark.parametrize("point", every_run("before work LAND")(STEPS))
def test_it_can_be_called_off_at_any_step(hosts: Hosts, point: str) -> None:
    """Even while the destination does not answer the program goes on here, within a second."""
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, point, "hang")
    process = scene.start()
    pid = wait_hung(hosts.b, process)
    process.send_signal(signal.SIGINT)
    migration = scene.answer(process)
    assert migration.outcome == "cancelled", f"{migration}\n{scene.told()}"
    scene.client.goes_on("requests")
    hosts.b.kill(pid, signal.SIGCONT)
    assert scene.runs_once() is hosts.a
    scene.finish()


@pytest.mark.parametrize("number", every_run(signal.SIGHUP)([signal.SIGHUP, signal.SIGKILL]))
def test_the_terminal_may_go(hosts: Hosts, number: signal.Signals) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "after work BUILD", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b, process)
    process.send_signal(number)
    assert process.wait(10) == -number
    hosts.b.kill(pid, signal.SIGCONT)
    assert scene.runs_once() is hosts.b
    scene.finish()


@at_length
def test_sshd_may_die(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "after work BUILD", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b, process)
    for other in hosts.b.processes():
        words = hosts.b.path(f"/proc/{other}/cmdline").read_bytes()
        if b"sshd" in words and b"listener" not in words:
            hosts.b.kill(other, signal.SIGKILL)
    hosts.b.kill(pid, signal.SIGCONT)
    migration = scene.answer(process)
    assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
    scene.agrees(migration)


@pytest.mark.parametrize("role", every_run(Role.SOURCE)(Role))
def test_no_room_for_the_journal(hosts: Hosts, role: Role) -> None:
    scene = Scene.begin(hosts)
    host = scene.host(role)
    host.run(["mkdir", "-p", STATE])
    host.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", STATE])
    migration = scene.move()
    host.run(["umount", "--lazy", STATE])  # an agent may be on its way out
    assert migration.outcome == "stayed", f"{migration}\n{scene.told()}"
    assert "No space left" in migration.reason
    scene.agrees(migration)


@at_length
@pytest.mark.parametrize("role", list(Role))
def test_the_disk_fills_up_on_the_way(hosts: Hosts, role: Role) -> None:
    """The journal has its space from the beginning."""
    scene = Scene.begin(hosts)
    host = scene.host(role)
    host.run(["mkdir", "-p", STATE])
    host.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", STATE])
    scene.arm(Role.DESTINATION, "after work BUILD", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b, process)
    host.run(["dd", "if=/dev/zero", f"of={STATE}/full", "bs=64k"], check=False)
    hosts.b.kill(pid, signal.SIGCONT)
    migration = scene.answer(process)
    assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
    scene.agrees(migration)
    host.run(["umount", "--lazy", STATE])  # an agent may be on its way out


@at_length
def test_through_a_tunnel_that_is_gone(hosts: Hosts) -> None:
    """Without phaul nobody can ask through SSH: doubt stays until `phaul resolve`, which can."""
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "before row PARKED-RESUMED", "hang")
    process = scene.start(["--tunnel"])
    pid = wait_hung(hosts.b, process)
    process.kill()
    hosts.b.kill(pid, signal.SIGCONT)
    wait_until(lambda: not list(hosts.a.path("/run/phaul").glob("*.sock")), "the source has given up", 60.0)
    (row,) = scene.rows(Role.SOURCE)
    assert (row["state"], row["ended"]) == ("committed", 0)
    time.sleep(1)
    done = hosts.a.run(["phaul", "resolve", str(row["migration"])], check=False)
    assert done.returncode == 0, done.stderr + scene.told()
    scene.runs_once()
    scene.finish()

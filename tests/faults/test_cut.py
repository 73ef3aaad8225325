"""Connections that break, and an operator that calls it off: one copy runs, where they say."""

from __future__ import annotations

import signal

from phaul.migration import Role
from tests.faults.scene import Scene, cut, wait_hung
from tests.hosts import Hosts

SLOWLY = ("--bandwidth", "500K")


def test_pages_that_break_off_leave_it_here(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "after send PREPARED", "hang")
    process = scene.start(SLOWLY)
    pid = wait_hung(hosts.b, process)
    cut(hosts.a, hosts.b, ssh=False)
    hosts.b.kill(pid, signal.SIGCONT)
    migration = scene.answer(process)
    assert migration.outcome == "stayed", f"{migration}\n{scene.told()}"
    assert scene.runs_once() is hosts.a
    scene.finish()


def test_a_cut_in_the_freeze_leaves_it_here(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "before work LAND", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b, process)
    cut(hosts.a, hosts.b, ssh=False)
    hosts.b.kill(pid, signal.SIGCONT)
    migration = scene.answer(process)
    assert migration.outcome == "stayed", f"{migration}\n{scene.told()}"
    assert scene.runs_once() is hosts.a
    scene.finish()


def test_a_cut_after_the_commit_is_asked_about(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "before row PARKED-RESUMED", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b, process)
    cut(hosts.a, hosts.b, ssh=False)
    hosts.b.kill(pid, signal.SIGCONT)
    migration = scene.answer(process)
    assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
    assert scene.runs_once() is hosts.b
    scene.finish()


def test_it_can_be_called_off(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "before send WELCOME", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b, process)
    process.send_signal(signal.SIGINT)
    migration = scene.answer(process)
    assert migration.outcome == "cancelled", f"{migration}\n{scene.told()}"
    scene.client.goes_on("requests")
    hosts.b.kill(pid, signal.SIGCONT)
    assert scene.runs_once() is hosts.a
    scene.finish()

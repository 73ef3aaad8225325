"""Two migrations of one tree: the second is refused in words, and the first does not notice."""

from __future__ import annotations

import signal

from phaul.migration import Role
from tests.faults.scene import Scene, wait_hung
from tests.hosts import Hosts


def test_what_moves_already_is_not_moved_again(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "after work BUILD", "hang")
    first = scene.start()
    pid = wait_hung(hosts.b)
    scene.disarm()
    second = scene.move()
    assert second.outcome == "refused", str(second)
    (row,) = scene.rows(Role.SOURCE)
    assert f"by migration {row['migration']}" in second.reason + second.stderr + str(second.events)
    hosts.b.kill(pid, signal.SIGCONT)
    migration = scene.answer(first)
    assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
    assert scene.runs_once() is hosts.b
    scene.finish()

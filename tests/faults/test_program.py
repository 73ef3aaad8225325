"""The moving program goes its own way: it is killed, forks or becomes another program while it is moved."""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from phaul.migration import Role
from tests.faults.scene import Scene, every_run, wait_hung
from tests.faults.test_killed import POINTS
from tests.hosts import Hosts
from tests.hosts.migrate import Migration
from tests.subjects.programs import wait_until

SELECTED = (Role.SOURCE, "before work FREEZE")
_FREE = {  # the steps of each side that it works through while the program runs
    Role.SOURCE: ("CONNECT", "EXAMINE", "PREPARE", "COPY", "PREPARED-FROZEN", "HELLO"),
    Role.DESTINATION: ("BUILD", "WELCOME", "PREPARED"),
}
STEPS = [one for one in POINTS if one[1].split()[2] in _FREE[one[0]] or one == SELECTED]
LATER = [one for one in POINTS if one not in STEPS]


def kill_at(hosts: Hosts, role: Role, point: str) -> tuple[Scene, Migration]:
    """The program is killed at a point; all is over when this returns."""
    scene = Scene.begin(hosts)
    scene.arm(role, point, "hang")
    process = scene.start()
    pid = wait_hung(scene.host(role), process)
    if hosts.a.alive(scene.server.pid):
        hosts.a.kill(scene.server.pid, signal.SIGKILL)
    scene.host(role).kill(pid, signal.SIGCONT)
    migration = scene.answer(process)
    wait_until(lambda: scene.ended(Role.SOURCE) and scene.ended(Role.DESTINATION), "all is over", 30.0)
    assert not hosts.a.alive(scene.server.pid), "it has risen from the dead"
    return scene, migration


@pytest.mark.parametrize(("role", "point"), every_run(SELECTED)(STEPS), ids=lambda one: str(one).replace(" ", "-"))
def test_one_that_is_killed_is_dead(hosts: Hosts, role: Role, point: str) -> None:
    scene, migration = kill_at(hosts, role, point)
    assert migration.outcome in ("stayed", "refused", "error"), f"{migration}\n{scene.told()}"
    assert not hosts.b.alive(scene.server.pid), "it has risen from the dead"
    hosts.client.kill(scene.client.pid, signal.SIGKILL)
    scene.clear()


@pytest.mark.parametrize(("role", "point"), every_run()(LATER) or LATER[:1], ids=lambda one: str(one).replace(" ", "-"))
def test_a_frozen_copy_that_is_killed_is_not_the_program(hosts: Hosts, role: Role, point: str) -> None:
    """From the freeze on the copy here is one of two. Killed, it leaves the other, or, if that never runs, none."""
    scene, migration = kill_at(hosts, role, point)
    assert hosts.b.alive(scene.server.pid) == (migration.outcome == "migrated"), f"{migration}\n{scene.told()}"
    if migration.outcome == "migrated":
        scene.server.moved_to(hosts.b)
        scene.client.goes_on("requests", 10.0)
        scene.client.finish()
        scene.server.finish()
    else:
        hosts.client.kill(scene.client.pid, signal.SIGKILL)
    scene.clear()


# Writes its number and what it is every few milliseconds; "fork" and "exec" when the file /srv/shared/go appears.
PROGRAM = """
import os, sys, time
def tell(what):
    place = "/srv/shared/said." + what
    with open(place + ".new", "w") as out: out.write(str(os.getpid()))
    os.rename(place + ".new", place)
what, how = sys.argv[1:]
if what == "changed": tell(what)
while not os.path.exists("/srv/shared/go"): time.sleep(0.005)
if what != "changed" and how == "exec": os.execv(sys.executable, [sys.executable, "-c", sys.argv[0], "changed", how])
if what != "changed" and how == "fork" and os.fork() == 0: what = "changed"
while True:
    tell(what)
    time.sleep(0.005)
"""


CHANGES = [(*step, how) for step in STEPS for how in ("fork", "exec")]


def _filled(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize(
    ("role", "point", "how"), every_run((*SELECTED, "fork"))(CHANGES), ids=lambda one: str(one).replace(" ", "-")
)
def test_one_that_changes_moves_as_it_is_then(hosts: Hosts, role: Role, point: str, how: str) -> None:
    words = [sys.executable, "-c", f"import sys; sys.argv[0] = code = {PROGRAM!r}; exec(code)", "first", how]
    subject = hosts.a.popen(words)
    directory = hosts.shared
    scene = Scene(hosts)
    scene.arm(role, point, "hang")
    process = scene.start_pid(subject.pid)
    agent = wait_hung(scene.host(role))
    (directory / "go").touch()
    wait_until(lambda: (directory / "said.changed").exists(), "it has changed")
    scene.disarm()
    scene.host(role).kill(agent, signal.SIGCONT)
    migration = scene.answer(process)
    assert migration.outcome in ("migrated", "stayed"), f"{migration}\n{scene.told()}"
    where = hosts.b if migration.outcome == "migrated" else hosts.a
    wait_until(lambda: scene.ended(Role.SOURCE) and scene.ended(Role.DESTINATION), "all is over", 30.0)
    assert where.alive(subject.pid)
    assert not hosts.other(where).alive(subject.pid)
    names = ["first", "changed"] if how == "fork" else ["changed"]
    for name in names:
        said = directory / f"said.{name}"
        pid = int(said.read_text())
        said.unlink()
        wait_until(partial(_filled, said), f"{name} goes on")
        assert int(said.read_text()) == pid
        where.kill(pid, signal.SIGKILL)
    scene.clear()

"""The destination fails at each kind of kernel object, in each thing that it does for it: the program stays, whole; or,
after the commit, the other try makes it right. The kinds are those that are registered: one without an object in
tests/subjects/everything.py fails here."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from phaul_engine.objects import base, catalogue

from phaul.migration import Role
from tests.faults.scene import Scene, every_run
from tests.hosts import Host, Hosts
from tests.hosts.host import Process
from tests.hosts.migrate import Migration, migrate_command, moving_service, parse
from tests.subjects import everything
from tests.subjects.programs import wait_until

assert catalogue.__all__  # all kinds are registered
KINDS = {
    kind.name: [
        method for method in base.REBUILDING if getattr(type(kind), method) is not getattr(base.DescriptorKind, method)
    ]
    for kind in base.descriptor_kinds()
}
PARTS = [kind.name for kind in base.task_kinds()]


@dataclass
class Program:
    """Everything, on host a."""

    hosts: Hosts
    process: Process
    directory: Path

    @classmethod
    def begin(cls, hosts: Hosts) -> Program:
        place = "/srv/shared/everything"
        hosts.a.path(place).mkdir()
        process = hosts.a.popen([sys.executable, everything.__file__, place, hosts.service])
        made = cls(hosts, process, hosts.a.path(place))
        wait_until(lambda: (made.directory / "said").exists(), "it is there")
        assert (made.directory / "said").read_text().endswith("ok")
        return made

    def move(self, scene: Scene, point: str) -> Migration:
        scene.arm(Role.DESTINATION, point, "error")
        words = [*migrate_command(self.process.pid, self.hosts.b, moving_service(self.hosts)), "--json", "--yes"]
        migration = parse(self.hosts.a.run(words, timeout=90.0, check=False))
        scene.disarm()
        return migration

    def check(self, where: Host) -> None:
        """It runs there, and only there, and finds everything as it was."""
        other = self.hosts.other(where)
        wait_until(lambda: where.alive(self.process.pid) and not other.alive(self.process.pid), "one copy", 30.0)
        before = (self.directory / "said").read_text().split()[0]
        where.kill(self.process.pid, signal.SIGUSR1)
        wait_until(lambda: (self.directory / "said").read_text().split()[0] != before, "it answers")
        number, _, verdict = (self.directory / "said").read_text().partition(" ")
        assert verdict == "ok", f"look {number}: {verdict}"

    def finish(self, scene: Scene, where: Host) -> None:
        self.check(where)
        for role in Role:
            wait_until(partial(scene.ended, role), "all is over", 30.0)
        where.kill(self.process.pid, signal.SIGKILL)
        wait_until(lambda: not where.alive(self.process.pid), "its end")
        scene.clear()


def reason(migration: Migration) -> str:
    return f"{migration.outcome}: {migration.reason}"


@pytest.mark.parametrize("name", every_run("eventfd")(KINDS), ids=lambda name: name.replace(" ", "-"))
def test_a_kind_that_fails_leaves_it_here(hosts: Hosts, name: str) -> None:
    scene, program = Scene(hosts), Program.begin(hosts)
    for method in KINDS[name]:
        point = f"before kind {name} {method}"
        if method == "release":
            continue
        migration = program.move(scene, point)
        assert migration.outcome == "stayed", f"{point}: {migration}\n{scene.told()}"
        assert point in migration.reason, f"the point was never reached: {reason(migration)}"
        program.check(hosts.a)
    program.finish(scene, hosts.a)


RELEASING = [name for name, methods in KINDS.items() if "release" in methods]


@pytest.mark.parametrize("name", every_run("unix socket")(RELEASING), ids=lambda name: name.replace(" ", "-"))
def test_after_the_commit_it_is_tried_again(hosts: Hosts, name: str) -> None:
    scene, program = Scene(hosts), Program.begin(hosts)
    migration = program.move(scene, f"before kind {name} release")
    assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
    program.finish(scene, hosts.b)


@pytest.mark.parametrize("name", every_run("umask")(PARTS), ids=lambda name: name.replace(" ", "-"))
def test_a_part_of_a_task_that_fails_leaves_it_here(hosts: Hosts, name: str) -> None:
    scene, program = Scene(hosts), Program.begin(hosts)
    for phase in base.Phase:
        point = f"before kind {name} rebuild {phase.name}"
        migration = program.move(scene, point)
        assert migration.outcome == "stayed", f"{point}: {migration}\n{scene.told()}"
        assert point in migration.reason, f"the point was never reached: {reason(migration)}"
        program.check(hosts.a)
    program.finish(scene, hosts.a)

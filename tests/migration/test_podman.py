"""Containers of Podman move by their name, and are the other host's own afterwards, as if podman had started them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.hosts import Hosts
from tests.subjects.podman import BUSYBOX, Container

pytestmark = [
    pytest.mark.skipif(not (shutil.which("podman") and shutil.which("runc")), reason="podman or runc is not installed"),
    pytest.mark.timeout(300),
]


@pytest.fixture
def container(hosts: Hosts) -> Iterator[Container]:
    """One that was created on both hosts and runs on a."""
    one = Container(hosts)
    one.set_up()
    one.create()
    one.start(hosts.a)
    yield one
    one.tear_down()


def test_it_moves_there_and_back_with_what_it_has_written(hosts: Hosts, container: Container) -> None:
    name = container.inside(hosts.a, "hostname")
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        migration = container.move(source, "--ship", "missing")
        assert migration.outcome == "migrated", str(migration)
        assert (container.state(source), container.state(destination)) == ("exited", "running")
        container.goes_on(destination)
        assert container.inside(destination, "hostname") == name
        assert container.inside(destination, "cat", "/etc/hostname") == name
        assert container.inside(destination, "cat", "/made/file") == "early"
        assert "gone" not in container.inside(destination, "ls", "/")
        assert not (container.layer(destination) / "bin" / "heap").exists(), "files of the image are the image's"
        pid = container.told(destination)["State"]["Pid"]
        status = destination.path(f"/proc/{pid}/status").read_text()
        assert "Seccomp_filters:\t1\n" in status
        assert "CapEff:\t00000000a80425fb\n" in status, "what podman gives"
        assert "overlay/" not in source.run(["cat", "/proc/mounts"]).stdout
    hosts.a.run(["podman", "stop", container.name])
    assert container.told(hosts.a)["State"]["ExitCode"] == 0
    assert container.status(hosts.a)["state"] == "pass"


def test_what_keeps_it_from_moving(hosts: Hosts, container: Container) -> None:
    def blockers(*options: str) -> set[str]:
        migration = container.move(hosts.a, *options)
        assert migration.outcome == "refused", str(migration)
        (answer,) = (event for event in migration.events if event["event"] == "preflight")
        return {finding["check"] for finding in answer["findings"] if finding["severity"] == "blocker"}

    container.create(hosts.b, options=["--privileged"])
    hosts.a.run(["podman", "exec", "--detach", container.name, BUSYBOX, "sleep", "100"])
    assert blockers() == {"tree-missing", "podman-options", "guest"}
    container.create(hosts.b)
    container.start(hosts.b)
    hosts.b.run(["podman", "stop", "--time", "0", container.name])
    assert blockers("--ship", "missing") == {"podman-used", "guest"}
    container.goes_on(hosts.a)


def test_a_migration_that_is_undone_leaves_it_as_it_was(hosts: Hosts, container: Container) -> None:
    fault = hosts.b.path("/var/lib/phaul/fault")
    fault.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fault.write_text("destination before send READY: error\n")
    migration = container.move(hosts.a, "--ship", "missing")
    fault.unlink()
    assert migration.outcome == "stayed", str(migration)
    assert (container.state(hosts.a), container.state(hosts.b)) == ("running", "exited")
    container.goes_on(hosts.a)
    assert container.move(hosts.a, "--ship", "missing").outcome == "migrated"
    container.goes_on(hosts.b)


def test_one_that_writes_to_a_volume_only(hosts: Hosts) -> None:
    """Nothing is sent: both hosts see the volume, and what it has in memory file systems comes along."""
    one = Container(hosts, ["--user", "4242", "--security-opt", "no-new-privileges"], volume=True)
    one.set_up()
    one.create()
    one.start(hosts.a)
    one.inside(hosts.a, "sh", "-c", "for i in tmp dev/shm; do echo memory > /$i/file; done")
    migration = one.move(hosts.a)
    assert migration.outcome == "migrated", str(migration)
    one.goes_on(hosts.b)
    assert one.inside(hosts.b, "cat", "/tmp/file", "/dev/shm/file").split() == ["memory"] * 2
    assert one.inside(hosts.b, "id", "-u") == "4242"
    one.tear_down()

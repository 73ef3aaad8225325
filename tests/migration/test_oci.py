"""Containers of runc and crun move by their name, and are the other host's own afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.migrate import fault
from tests.subjects.programs import build, parse_status, wait_until

BUNDLE = "/srv/shared/bundle"
RUNTIMES = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not installed"))
    for name in ("runc", "crun")
]


@dataclass
class Container:
    """A container whose program is `heap`, which checks its own memory."""

    hosts: Hosts
    runtime: str
    name: str = "web"

    def make_bundle(self) -> None:
        """A root file system with nothing but the program, and a shell."""
        root = self.hosts.shared / "bundle" / "rootfs"
        for directory in ("bin", "dev", "proc", "sys", "tmp"):
            (root / directory).mkdir(parents=True)
        shutil.copy(build("heap", "-static"), root / "bin" / "heap")
        shutil.copy("/bin/busybox", root / "bin" / "busybox")
        self.hosts.a.run(["sh", "-c", f"cd {BUNDLE} && runc spec"])
        path = self.hosts.shared / "bundle" / "config.json"
        config = json.loads(path.read_text())
        config["process"]["terminal"] = False
        config["process"]["args"] = ["/bin/heap", "--status", "/status", "--heap", "32", "--rate", "10"]
        config["root"]["readonly"] = False
        config["hostname"] = "inside"
        path.write_text(json.dumps(config))

    def start(self) -> None:
        """Run it on host a. Skips the test where the runtime does not work at all."""
        words = f"{self.runtime} --log /tmp/oci.log run -d -b {BUNDLE} {self.name} </dev/null >/dev/null 2>&1"
        done = self.hosts.a.run(["sh", "-c", f"{words} || cat /tmp/oci.log; rm -f /tmp/oci.log"])
        if "RLIM_MEMLOCK" in done.stdout:
            pytest.skip(f"{self.runtime} needs CAP_SYS_RESOURCE: {done.stdout.strip()}")
        assert not done.stdout, done.stdout
        wait_until(lambda: self._path.exists() and "writes" in self.status(), "it runs", 20.0)

    @property
    def _path(self) -> Path:
        return self.hosts.shared / "bundle" / "rootfs" / "status"

    def status(self) -> dict[str, str]:
        """What the program says of itself."""
        return parse_status(self._path.read_text())

    def goes_on(self) -> None:
        """Wait until it has written more, without an error."""
        before = int(self.status()["writes"])
        wait_until(lambda: int(self.status()["writes"]) > before + 10, f"it runs on: {self.status()}", 20.0)
        assert self.status()["state"] == "running", self.status()

    def state(self, host: Host) -> str:
        """What the runtime of a host says of it; empty if it knows none."""
        done = host.run([self.runtime, "state", self.name], check=False)
        return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else ""

    def inside(self, host: Host, *words: str) -> str:
        """What a command says that is run in it."""
        return host.run([self.runtime, "exec", self.name, "/bin/busybox", *words]).stdout.strip()

    def move(self, source: Host, *options: str) -> tuple[int, dict[str, object]]:
        """Ask for it: the exit status, and the result."""
        words = ["phaul", "migrate", "--runc", self.name, f"root@{self.hosts.other(source).address}"]
        done = source.run([*words, "--json", "--yes", "--max-downtime", "5000", *options], check=False)
        return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=RUNTIMES)
def container(hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[Container]:
    """A container that runs on host a; wherever it is afterwards, it passes its own check and is removed."""
    one = Container(hosts, request.param)
    try:
        one.make_bundle()
        one.start()
        yield one
        (host,) = (each for each in (hosts.a, hosts.b) if one.state(each))
        host.run([one.runtime, "kill", one.name, "TERM"])
        wait_until(lambda: one.state(host) == "stopped", "it ends")
        assert one.status()["state"] == "pass", one.status()
    finally:
        for each in (hosts.a, hosts.b):
            each.run([one.runtime, "delete", "--force", one.name], check=False)
        shutil.rmtree(hosts.shared / "bundle")


def test_it_moves_there_and_back(hosts: Hosts, container: Container) -> None:
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        status, result = container.move(source)
        assert (status, result["outcome"]) == (0, "migrated"), result
        container.goes_on()
        assert (container.state(source), container.state(destination)) == ("", "running")
        assert container.inside(destination, "hostname") == "inside"
        assert "heap" in container.inside(destination, "ps")
        group = destination.run(["sh", "-c", f"cat /sys/fs/cgroup/{container.name}/cgroup.procs"]).stdout.split()
        assert len(group) == 1
        assert not source.path(f"/sys/fs/cgroup/{container.name}").exists()


def test_what_keeps_a_host_from_taking_it_over(hosts: Hosts, container: Container) -> None:
    create = f"{container.runtime} create -b /tmp/other {container.name} </dev/null >/dev/null 2>&1"
    hosts.b.run(["sh", "-c", f"cp -a {BUNDLE} /tmp/other; {create}"])
    status, result = container.move(hosts.a)
    assert (status, "there is a container web there already" in str(result["reason"])) == (20, True), result
    hosts.b.run(["sh", "-c", f"{container.runtime} delete --force {container.name}; rm -r /tmp/other"])
    path = hosts.shared / "bundle" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"hooks": {"prestart": [{"path": "/bin/true"}]}}))
    status, result = container.move(hosts.a)
    assert (status, "has hooks (prestart)" in str(result["reason"])) == (20, True), result
    path.write_text(before)
    hosts.shared.joinpath("bundle").chmod(0o777)
    status, result = container.move(hosts.a)
    assert (status, "can be changed by others than root" in str(result["reason"])) == (20, True), result
    hosts.shared.joinpath("bundle").chmod(0o755)
    status, result = container.move(hosts.b)
    assert (status, "this host has no container web" in str(result["reason"])) == (2, True), result


def test_a_migration_that_is_undone_leaves_none_there(hosts: Hosts, container: Container) -> None:
    with fault(hosts.b, "destination before send READY: error"):
        status, result = container.move(hosts.a)
    assert (status, result["outcome"]) == (30, "stayed"), result
    assert (container.state(hosts.a), container.state(hosts.b)) == ("running", "")
    assert not hosts.b.path(f"/sys/fs/cgroup/{container.name}").exists()
    container.goes_on()

"""A container whose file system only its own host sees takes that along, while it works with it in every way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Host, Hosts, disks
from tests.hosts.files import describe, make_something_of_everything
from tests.hosts.migrate import fault
from tests.subjects.programs import build, parse_status, wait_until

PLACE = "/srv/own/there/web"
RUNTIMES = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not installed"))
    for name in ("runc", "crun")
]
pytestmark = [pytest.mark.skipif(not shutil.which("runc"), reason="runc is not installed"), pytest.mark.timeout(300)]


@dataclass
class Container:
    """A container whose program is `filer`, with a root file system that has something of everything."""

    hosts: Hosts
    runtime: str
    name: str = "web"

    def make(self) -> None:
        """The bundle, on host a alone."""
        bundle = self.hosts.a.path(PLACE)
        root = bundle / "rootfs"
        for directory in ("bin", "dev", "proc", "sys", "tmp", "data", "empty"):
            (root / directory).mkdir(parents=True)
        shutil.copy(build("filer", "-static"), root / "bin" / "filer")
        shutil.copy("/bin/busybox", root / "bin" / "busybox")
        make_something_of_everything(root / "some")
        self.write_config(bundle)

    def write_config(self, bundle: Path) -> None:
        """What it is to run."""
        self.hosts.a.run(["sh", "-c", f"cd {PLACE} && runc spec"])
        path = bundle / "config.json"
        config = json.loads(path.read_text())
        config["process"]["terminal"] = False
        config["process"]["args"] = ["/bin/filer", "/data", "status"]
        config["root"]["readonly"] = False
        path.write_text(json.dumps(config))

    def start(self) -> None:
        """Run it on host a. Skips the test where the runtime does not work at all."""
        words = f"{self.runtime} --log /tmp/oci.log run -d -b {PLACE} {self.name} </dev/null >/dev/null 2>&1"
        done = self.hosts.a.run(["sh", "-c", f"{words} || cat /tmp/oci.log; rm -f /tmp/oci.log"])
        if "RLIM_MEMLOCK" in done.stdout:
            pytest.skip(f"{self.runtime} needs CAP_SYS_RESOURCE: {done.stdout.strip()}")
        assert not done.stdout, done.stdout
        wait_until(lambda: "writes" in self.status(self.hosts.a), "it runs", 20.0)

    def status(self, host: Host, place: str = PLACE) -> dict[str, str]:
        """What the program says of itself."""
        try:
            return parse_status(host.path(f"{place}/rootfs/data/status").read_text())
        except FileNotFoundError:
            return {}

    def goes_on(self, host: Host) -> None:
        """Wait until it has written more, without an error."""
        before = int(self.status(host)["writes"])
        wait_until(lambda: int(self.status(host)["writes"]) > before + 500, f"it runs on: {self.status(host)}", 30.0)
        assert self.status(host)["state"] == "running", self.status(host)

    def state(self, host: Host) -> str:
        """What the runtime of a host says of it; empty if it knows none."""
        done = host.run([self.runtime, "state", self.name], check=False)
        return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else ""

    def move(self, source: Host, *options: str) -> tuple[int, dict[str, Any]]:
        """Ask for it: the exit status, and the result."""
        words = ["phaul", "migrate", "--runc", self.name, f"root@{self.hosts.other(source).address}"]
        words += ["--json", "--yes", "--max-downtime", "5000", "--ship", "missing", *options]
        done = source.run(words, check=False, timeout=120.0)
        print(done.stdout)
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    def is_cut_off(self, role: str, condition: Callable[[], bool]) -> None:
        """Move it from host a, slowly; an agent dies as soon as a condition is met. It stays."""
        words = ["phaul", "migrate", "--runc", self.name, f"root@{self.hosts.b.address}", "--yes"]
        moving = self.hosts.a.popen([*words, "--ship", "missing", "--bandwidth", "2M"])
        wait_until(condition, "it is being sent", 60.0)
        host = self.hosts.a if role == "source" else self.hosts.b
        (agent,) = _agents(host)
        host.kill(agent)
        assert moving.wait(timeout=120) == 30

    def passes(self) -> None:
        """It ends and passes its own check, wherever it is."""
        (host,) = (each for each in (self.hosts.a, self.hosts.b) if self.state(each))
        host.run([self.runtime, "kill", self.name, "TERM"])
        wait_until(lambda: self.state(host) == "stopped", "it ends", 20.0)
        assert self.status(host)["state"] == "pass", self.status(host)

    def remove(self) -> None:
        """Nothing is left of it, whatever state it is in."""
        for each in (self.hosts.a, self.hosts.b):
            each.run([self.runtime, "delete", "--force", self.name], check=False)
            shutil.rmtree(each.path(PLACE).parent, ignore_errors=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[Container]:
        """It runs on host a; wherever it is afterwards, it passes its own check. Nothing is left of it."""
        try:
            self.make()
            self.start()
            yield self
            self.passes()
        finally:
            self.remove()


def _agents(host: Host) -> list[int]:
    """Those of a migration, without their keepers."""
    words = {pid: host.path(f"/proc/{pid}/cmdline").read_bytes() for pid in host.processes()}
    modules = (b"phaul.source", b"phaul.dest")
    return [pid for pid, some in words.items() if any(one in some for one in modules) and b"phaul.keeper" not in some]


def _left(host: Host) -> list[str]:
    """What stands where the bundle would be."""
    place = host.path(PLACE).parent
    return sorted(one.name for one in place.iterdir()) if place.exists() else []


@pytest.fixture(params=RUNTIMES)
def container(hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[Container]:
    """A container that runs on host a; wherever it is afterwards, it passes its own check and is removed."""
    with Container(hosts, request.param).running() as one:
        yield one


def test_it_takes_its_files_along_and_back(hosts: Hosts, container: Container) -> None:
    before = describe(hosts.a.path(f"{PLACE}/rootfs/some"))
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        status, result = container.move(source)
        assert (status, result["outcome"]) == (0, "migrated"), result
        container.goes_on(destination)
        assert (container.state(source), container.state(destination)) == ("", "running")
        assert describe(destination.path(f"{PLACE}/rootfs/some")) == before
        assert _left(source) == ["web.migrated"]
        done = destination.run([container.runtime, "exec", container.name, "/bin/busybox", "ls", "/data/big"])
        assert done.stdout.strip() == "/data/big"
    assert _left(hosts.a) == ["web", "web.migrated"]


UNDONE = [
    "source after work PREPARE: error",
    "source before row PREPARED-FROZEN: error",
    "source after work FREEZE: error",
    "source before work COPY: kill",
    "source after work FREEZE: kill",
    "destination before work BUILD: error",
    "destination after work BUILD: error",
    "destination before send READY: error",
    "destination after work BUILD: kill",
    "destination after row PREPARED-PARKED: kill",
]
"""Before the commit: the program goes on where it was."""
FINISHED = ["destination after row PARKED-RESUMED: kill", "source after row COMMITTED-RELEASED: kill"]
"""After it: there, whoever finishes it."""


@pytest.fixture
def one(hosts: Hosts) -> Iterator[Container]:
    """A container of runc on host a."""
    with Container(hosts, "runc").running() as made:
        yield made


def _armed(hosts: Hosts, words: str) -> contextlib.AbstractContextManager[None]:
    """Have something go wrong."""
    return fault(hosts.a if words.startswith("source") else hosts.b, words)


def explained(hosts: Hosts) -> None:
    """A keeper says in a log that its agent was killed; that is no trace of the migration."""
    for host in (hosts.a, hosts.b):
        for log in host.path("/run/phaul").glob("*.log"):
            log.unlink()


@pytest.mark.parametrize("words", UNDONE)
def test_what_fails_leaves_nothing_there(hosts: Hosts, one: Container, words: str) -> None:
    with _armed(hosts, words):
        status, result = one.move(hosts.a)
    assert (status, result["outcome"]) == (30, "stayed"), result
    wait_until(lambda: not hosts.b.path(PLACE).parent.exists(), f"nothing is left: {_left(hosts.b)}", 30.0)
    assert _left(hosts.a) == ["web"]
    wait_until(lambda: (one.state(hosts.a), one.state(hosts.b)) == ("running", ""), "it is where it was", 30.0)
    one.goes_on(hosts.a)
    explained(hosts)


@pytest.mark.parametrize("words", FINISHED)
def test_what_dies_after_the_commit_is_finished(hosts: Hosts, one: Container, words: str) -> None:
    with _armed(hosts, words):
        one.move(hosts.a)
    wait_until(lambda: _left(hosts.b) == ["web"], f"it has its name: {_left(hosts.b)}", 30.0)
    wait_until(lambda: _left(hosts.a) == ["web.migrated"], f"the other is put aside: {_left(hosts.a)}", 60.0)
    wait_until(lambda: (one.state(hosts.a), one.state(hosts.b)) == ("", "running"), "it is there", 30.0)
    one.goes_on(hosts.b)
    explained(hosts)


def test_a_bundle_that_is_a_mount_of_its_own(hosts: Hosts, tmp_path: Path) -> None:
    """As a volume or a data set is: it arrives as a directory, and at the source its name stays."""
    made = Container(hosts, "runc")
    hosts.a.path(PLACE).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.callback(made.remove)
        stack.enter_context(disks.mounted_on(hosts.a, tmp_path / "volume", PLACE, kind="ext4"))
        stack.enter_context(made.running())
        status, result = made.move(hosts.a)
        assert (status, result["outcome"]) == (0, "migrated"), result
        made.goes_on(hosts.b)
        assert (_left(hosts.a), _left(hosts.b)) == (["web"], ["web"])
        status, result = made.move(hosts.b)
        assert (status, f"{PLACE} is there already" in str(result["reason"])) == (20, True), result
        hosts.a.run(["sh", "-c", f"umount {PLACE} && mount -t tmpfs empty {PLACE}"])
        status, result = made.move(hosts.b)
        assert (status, "is a mount or a subvolume there" in str(result["reason"])) == (20, True), result


def test_a_bundle_on_tmpfs(hosts: Hosts) -> None:
    """As below /run: its files are the haul's, and not carried as memory; nor has it to be tmpfs there."""
    made = Container(hosts, "runc")
    parent = str(Path(PLACE).parent)
    hosts.a.path(parent).mkdir()
    hosts.a.run(["mount", "-t", "tmpfs", "-o", "size=100m,mode=755", "memory", parent])
    made.make()
    made.start()
    for source in (hosts.a, hosts.b):
        status, result = made.move(source)
        assert (status, result["outcome"]) == (0, "migrated"), result
        made.goes_on(hosts.other(source))
    assert (_left(hosts.a), _left(hosts.b)) == (["web", "web.migrated"], ["web.migrated"])
    hosts.a.run(["runc", "kill", made.name, "TERM"])
    wait_until(lambda: made.state(hosts.a) == "stopped", "it ends", 20.0)
    assert made.status(hosts.a)["state"] == "pass", made.status(hosts.a)
    hosts.a.run(["sh", "-c", f"runc delete {made.name} && umount {parent} && rmdir {parent}"])
    shutil.rmtree(hosts.b.path(parent))


def test_file_attributes_go_along(hosts: Hosts, one: Container) -> None:
    """What may not be changed can be sent all the same, and be removed where it is not to stay."""
    known = {"some/file": "i", "some/directory": "a", "bin/busybox": "A"}

    def attributes(host: Host) -> dict[str, str]:
        done = host.run(["lsattr", "-d", *(f"{PLACE}/rootfs/{name}" for name in known)])
        found = (line.split()[0].replace("-", "").replace("e", "") for line in done.stdout.splitlines())
        return dict(zip(known, found, strict=True))

    for name, letter in known.items():
        hosts.a.run(["chattr", f"+{letter}", f"{PLACE}/rootfs/{name}"])
    try:
        with fault(hosts.b, "destination before send READY: error"):
            status, result = one.move(hosts.a)
        assert (status, result["outcome"]) == (30, "stayed"), result
        wait_until(lambda: not hosts.b.path(PLACE).parent.exists(), f"nothing is left: {_left(hosts.b)}", 30.0)
        status, result = one.move(hosts.a)
        assert (status, result["outcome"]) == (0, "migrated"), result
        one.goes_on(hosts.b)
        assert attributes(hosts.b) == known
        explained(hosts)
    finally:
        for host in (hosts.a, hosts.b):
            host.run(["chattr", "-R", "-f", "-ia", str(Path(PLACE).parent)], check=False)


def test_what_is_found_before_anything_is_touched(hosts: Hosts, one: Container) -> None:
    status, result = one.move(hosts.a, "--ship", "none")
    assert (status, "or let phaul send it: --ship missing" in str(result["reason"])) == (20, True), result
    there = hosts.b.path(PLACE)
    there.mkdir(parents=True)
    (there / "somebody's").write_text("somebody's")
    status, result = one.move(hosts.a)
    assert (status, f"{PLACE} is there already" in str(result["reason"])) == (20, True), result
    assert os.listdir(there) == ["somebody's"]
    shutil.rmtree(there)
    there.parent.chmod(0o777)
    status, result = one.move(hosts.a)
    assert (status, "can be changed by others than root" in str(result["reason"])) == (20, True), result
    there.parent.rmdir()
    hosts.a.run(["mount", "-t", "tmpfs", "inside", f"{PLACE}/rootfs/empty"])
    status, result = one.move(hosts.a)
    hosts.a.run(["umount", f"{PLACE}/rootfs/empty"])
    assert (status, "is a mount of its own in it" in str(result["reason"])) == (20, True), result
    assert (_left(hosts.a), _left(hosts.b)) == (["web"], [])


def test_a_disk_that_gets_full(hosts: Hosts, one: Container) -> None:
    parent = str(Path(PLACE).parent)
    options = "size=256m,nr_inodes=50,mode=755"  # nobody asks before how many files there is room for
    hosts.b.run(["sh", "-c", f"mkdir {parent} && mount -t tmpfs -o {options} small {parent}"])
    status, result = one.move(hosts.a)
    assert (status, result["outcome"]) == (30, "stayed"), result
    assert "No space left on device" in str(result["reason"]), result
    wait_until(lambda: _left(hosts.b) == [], f"nothing is left: {_left(hosts.b)}", 30.0)
    hosts.b.run(["umount", parent])
    hosts.b.path(parent).rmdir()
    one.goes_on(hosts.a)

"""Services of systemd move by their name, and are the other systemd's own afterwards."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from phaul.migration import Role
from phaul.workloads.systemd import BOOTED
from tests.faults.scene import Scene, every_run, wait_hung
from tests.hosts import PIPE, Host, Hosts, service_manager, two_hosts
from tests.subjects.programs import wait_until

PROGRAM = "/srv/shared/service.py"
POINTS = [
    (Role.SOURCE, "after work PREPARE"),
    (Role.SOURCE, "after work FREEZE"),
    (Role.SOURCE, "after row FROZEN-COMMITTED"),
    (Role.SOURCE, "after send COMMIT"),
    (Role.SOURCE, "before work RELEASE"),
    (Role.SOURCE, "after work RELEASE"),
    (Role.DESTINATION, "after work BUILD"),
    (Role.DESTINATION, "after row PARKED-RESUMED"),
    (Role.DESTINATION, "before work TIDY"),
]
SELECTED = every_run(POINTS[2], POINTS[3], POINTS[7])
SECTIONS = """[Unit]
DefaultDependencies=no
[Service]
ExecStart=/usr/bin/python3 -S -E {program} {log} {words}
"""


@pytest.fixture(scope="module")
def managed(workplace: object) -> Iterator[Hosts]:
    """Two hosts whose process 1 is systemd."""
    reason = service_manager.missing()
    if reason:
        pytest.skip(reason)
    with two_hosts(f"systemd-{os.getpid()}", systemd=True) as hosts:  # beside those of other tests
        shutil.copy(Path(__file__).parents[1] / "subjects" / "service.py", hosts.shared)
        yield hosts


@dataclass
class Service:
    """A service that counts, and looks after nothing else."""

    hosts: Hosts
    name: str

    @property
    def unit(self) -> str:
        """Its unit."""
        return f"{self.name}.service"

    def install(self, settings: str = "", words: str = "", hosts: tuple[Host, ...] = ()) -> None:
        """Have its unit file on both hosts."""
        text = SECTIONS.format(program=PROGRAM, log=f"/srv/shared/{self.name}.log", words=words) + settings
        for host in hosts or (self.hosts.a, self.hosts.b):
            host.path(f"{BOOTED}/{self.unit}").write_text(text)
            host.run(["systemctl", "daemon-reload"])

    def start(self, settings: str = "", words: str = "") -> None:
        """Have it run on host a."""
        self.install(settings, words)
        log = self.hosts.shared / f"{self.name}.log"
        log.touch()
        log.chmod(0o666)
        self.hosts.a.run(["systemctl", "start", self.unit])
        wait_until(lambda: len(self.counts()) > 3, "it counts")

    def remove(self) -> None:
        """No unit, no process, nothing left of it on either host."""
        for host in (self.hosts.a, self.hosts.b):
            host.run(["systemctl", "stop", self.unit], check=False)
            shutil.rmtree(host.path(f"{BOOTED}/{self.unit}.d"), ignore_errors=True)
            for path in host.path(BOOTED).glob(f"{self.name}.*"):
                path.unlink()
            host.run(["systemctl", "daemon-reload"])
            host.run(["systemctl", "reset-failed", self.unit], check=False)
        (self.hosts.shared / f"{self.name}.log").unlink(missing_ok=True)

    def show(self, host: Host, name: str) -> str:
        """A property, as systemd of a host tells it."""
        return host.run(["systemctl", "show", "-p", name, "--value", self.unit]).stdout.strip()

    def state(self, host: Host) -> tuple[str, str]:
        """Whether it runs there."""
        return self.show(host, "ActiveState"), self.show(host, "SubState")

    def counts(self) -> list[tuple[str, int, int]]:
        """Host, PID and count of each line that it has written."""
        path = self.hosts.shared / f"{self.name}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(host, int(pid), int(count)) for host, pid, count in map(str.split, lines)]

    def goes_on(self, host: Host) -> None:
        """It counts on, there, and has never been there twice."""
        before = len(self.counts())
        wait_until(lambda: len(self.counts()) > before + 5, f"it goes on: {self.states()}", 20.0)
        assert self.counts()[-1][0] == f"host-{host.name}", self.counts()[-1]
        numbers = [count for _, _, count in self.counts()]
        assert numbers == list(range(len(numbers))), "another copy of it runs, or it began again"
        assert len({pid for _, pid, _ in self.counts()}) == 1

    def states(self) -> str:
        """What there is to know when something is wrong."""
        return "\n".join(
            host.run(["sh", "-c", f"systemctl status {self.unit}; journalctl -n 20 --no-pager"], check=False).stdout
            for host in (self.hosts.a, self.hosts.b)
        )

    def move(self, source: Host, *options: str, name: str = "") -> tuple[int, dict[str, object]]:
        """Ask for it: the exit status, and the result."""
        words = ["phaul", "migrate", "--unit", name or self.unit, f"root@{self.hosts.other(source).address}"]
        words += ["--json", "--yes", "--max-downtime", "5000", *options]
        done = source.run(words, check=False, timeout=180.0)
        result = json.loads(done.stdout.splitlines()[-1])
        return done.returncode, result | {"events": done.stdout}

    def over(self) -> bool:
        """Whether no migration is under way any more, on either side."""
        scene = Scene(self.hosts)
        agents = [path for host in (self.hosts.a, self.hosts.b) for path in host.path("/run/phaul").glob("*.sock")]
        return not agents and scene.ended(Role.SOURCE) and scene.ended(Role.DESTINATION)

    def unheld(self, host: Host) -> None:
        """Nothing is left there of a migration."""
        assert not host.path(f"{BOOTED}/{self.unit}.d").exists()
        assert self.show(host, "DropInPaths") == ""
        assert not list(host.path("/run/phaul").glob("unit-*"))

    def logged(self, host: Host) -> str:
        """What the journal of a host has of it."""
        return host.run(["journalctl", "--no-pager", "-o", "cat", "-u", self.unit]).stdout


@pytest.fixture
def service(managed: Hosts, request: pytest.FixtureRequest) -> Iterator[Service]:
    """A service, which a test starts; removed afterwards."""
    one = Service(managed, request.node.name.replace("_", "-").split("[")[0])
    yield one
    one.remove()


def test_it_moves_there_and_back(managed: Hosts, service: Service) -> None:
    service.start("Restart=always\nRestartSec=100ms\n")
    pid = int(service.show(managed.a, "MainPID"))
    for source, there in ((managed.a, managed.b), (managed.b, managed.a)):
        status, result = service.move(source, name=service.name)
        assert (status, result["outcome"]) == (0, "migrated"), f"{result}\n{service.states()}"
        service.goes_on(there)
        assert service.state(there) == ("active", "running")
        assert service.state(source) == ("inactive", "dead")
        assert service.show(source, "Result") == "success"
        assert service.show(there, "MainPID") == str(pid)
        assert service.show(there, "Type") == "simple"
        group = there.run(["cat", f"/sys/fs/cgroup{service.show(there, 'ControlGroup')}/cgroup.procs"]).stdout.split()
        assert len(group) == 2, group
        for host in (managed.a, managed.b):
            service.unheld(host)
        count = service.counts()[-1][2]
        wait_until(lambda: f"count {count}\n" in service.logged(there), "its output is in the journal")  # noqa: B023
    managed.a.kill(pid, 9)
    wait_until(lambda: service.counts()[-1][1] != pid, "it is started again where it lives", 20.0)


@pytest.mark.parametrize("users", ["no", "yes"])
def test_what_it_is_shut_in_is_made_there(managed: Hosts, service: Service, users: str) -> None:
    """PrivateTmp= and the like: each systemd makes a view of its own host. With PrivateUsers= most of its users are
    nobody in there."""
    shut = "PrivateTmp=yes\nProtectSystem=strict\nReadWritePaths=/srv/shared\nPrivateDevices=yes\nStateDirectory=web\n"
    service.start(f"{shut}NoNewPrivileges=yes\nSystemCallFilter=@system-service\nUser=nobody\nPrivateUsers={users}\n")
    pid = service.show(managed.a, "MainPID")
    for source, there in ((managed.a, managed.b), (managed.b, managed.a)):
        status, result = service.move(source)
        assert (status, result["outcome"]) == (0, "migrated"), f"{result}\n{service.states()}"
        service.goes_on(there)
        assert service.state(there) == ("active", "running")
        assert service.show(there, "MainPID") == pid
        mounts = there.path(f"/proc/{pid}/mountinfo").read_text()
        assert f"-{service.unit}-" in mounts, "it has no /tmp of its own"
        assert there.run(["nsenter", "-m", "-t", pid, "touch", "/usr/x"], check=False).returncode != 0
        assert "\nUid:\t65534\t65534" in there.path(f"/proc/{pid}/status").read_text()
        apart = there.run(["test", f"/proc/{pid}/ns/user", "-ef", "/proc/1/ns/user"], check=False).returncode != 0
        assert apart == (users == "yes")
        for host in (managed.a, managed.b):
            service.unheld(host)
    managed.a.run(["systemctl", "stop", service.unit])
    assert not list(managed.a.path("/tmp").glob("systemd-private-*")), "what was private is left"


@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")
def test_a_service_as_debian_ships_it_moves(managed: Hosts) -> None:
    """redis-server.service: Type=notify, PrivateUsers=, PrivateTmp=, ProtectSystem=, and what else there is. Its data
    are in memory, and nothing of it is open."""
    redis = Service(managed, "redis-server")
    for host in (managed.a, managed.b):
        host.run(["sh", "-c", "install -d -o redis -g redis /var/lib/redis /var/log/redis"])
    managed.a.run(["systemctl", "start", redis.unit])
    try:
        managed.a.run(["redis-cli", "set", "where", "it was"])
        pid = redis.show(managed.a, "MainPID")
        for source, there in ((managed.a, managed.b), (managed.b, managed.a)):
            status, result = redis.move(source)
            assert (status, result["outcome"]) == (0, "migrated"), f"{result}\n{redis.states()}"
            assert there.run(["redis-cli", "get", "where"]).stdout == "it was\n"
            assert redis.state(there) == ("active", "running")
            assert redis.show(there, "MainPID") == pid
            assert redis.state(source) == ("inactive", "dead")
            shell = (
                ["nsenter", "-t", pid, "-m", "-w/", "/usr/bin/redis-server", "--version"],
                ["nsenter", "-t", pid, "-m", "true"],
            )
            assert [there.run(one, check=False).returncode != 0 for one in shell] == [False, True], "NoExecPaths= holds"
            assert os.path.realpath("/bin/sh") not in there.path(f"/proc/{pid}/mountinfo").read_text().split()
    finally:
        for host in (managed.a, managed.b):
            host.run(["systemctl", "stop", redis.unit], check=False)


def test_a_migration_that_is_undone_leaves_nothing(managed: Hosts, service: Service) -> None:
    service.start("Restart=always\n")
    scene = Scene(managed)
    scene.arm(Role.DESTINATION, "before send READY", "error")
    status, result = service.move(managed.a)
    scene.clear()
    assert (status, result["outcome"]) == (30, "stayed"), f"{result}\n{service.states()}"
    service.goes_on(managed.a)
    assert (service.state(managed.a)[0], service.state(managed.b)[0]) == ("active", "inactive")
    assert service.show(managed.a, "Restart") == "always"
    for host in (managed.a, managed.b):
        service.unheld(host)


@pytest.mark.parametrize(("role", "point"), SELECTED(POINTS), ids=lambda one: str(one).replace(" ", "-"))
def test_an_agent_killed_at_any_step_leaves_one_copy(managed: Hosts, service: Service, role: Role, point: str) -> None:
    """Restart=always would start another one wherever systemd sees the process end."""
    service.start("Restart=always\nRestartSec=100ms\n")
    scene = Scene(managed)
    scene.arm(role, point, "kill")
    _, result = service.move(managed.a)
    scene.clear()
    rows = scene.host(role).path("/var/lib/phaul").glob(f"*.{role}")
    row = max(rows, key=lambda path: path.stat().st_mtime).name
    told = scene.host(role).run(["journalctl", "--no-pager", "-o", "cat", "-t", f"phaul-{row}"]).stdout
    assert "SIGKILL" in told, f"the point was never reached: {result}"
    wait_until(service.over, f"all is over\n{scene.told()}", 60.0)
    where = next(host for host in (managed.a, managed.b) if service.state(host)[0] == "active")
    assert result["outcome"] != "migrated" or where is managed.b, result
    assert service.state(managed.other(where))[0] == "inactive", service.states()
    service.goes_on(where)
    assert service.show(where, "Restart") == "always"
    for host in (managed.a, managed.b):
        service.unheld(host)


def test_what_ends_while_it_is_held_is_started_again(managed: Hosts, service: Service) -> None:
    """systemd must not start it while it may run elsewhere; but Restart= holds when it does not."""
    service.start("Restart=always\nRestartSec=100ms\n")
    pid = int(service.show(managed.a, "MainPID"))
    scene = Scene(managed)
    scene.arm(Role.SOURCE, "after work PREPARE", "hang")
    words = ["phaul", "migrate", "--unit", service.unit, f"root@{managed.b.address}", "--json", "--yes"]
    with managed.a.popen(words, stdout=PIPE, stderr=PIPE) as process:
        agent = wait_hung(managed.a)
        managed.a.kill(pid, 9)
        wait_until(lambda: service.state(managed.a) == ("inactive", "dead"), "it has ended, and stays so")
        refused = managed.a.run(["systemctl", "start", service.unit], check=False)
        assert refused.returncode != 0, "it was started beside what might run elsewhere"
        managed.a.kill(agent, 18)
        process.communicate(timeout=60.0)
    scene.clear()
    wait_until(service.over, f"all is over\n{scene.told()}", 60.0)
    wait_until(lambda: service.state(managed.a)[0] == "active", f"it runs again: {service.states()}")
    assert service.state(managed.b)[0] == "inactive"
    for host in (managed.a, managed.b):
        service.unheld(host)


def test_its_watchdog_moves_and_does_not_bite_what_is_frozen(managed: Hosts, service: Service) -> None:
    service.start("Type=notify\nWatchdogSec=3\nRestart=always\n", "keep-alive")
    scene = Scene(managed)
    scene.arm(Role.SOURCE, "after work FREEZE", "hang")
    words = ["phaul", "migrate", "--unit", service.unit, f"root@{managed.b.address}", "--json", "--yes"]
    with managed.a.popen(words, stdout=PIPE, stderr=PIPE) as process:
        agent = wait_hung(managed.a)
        time.sleep(4.5)  # longer than the watchdog waits
        managed.a.kill(agent, 18)
        process.communicate(timeout=60.0)
    scene.clear()
    wait_until(service.over, f"all is over\n{scene.told()}", 60.0)
    where = next(host for host in (managed.a, managed.b) if service.state(host)[0] == "active")
    service.goes_on(where)
    if where is managed.a:
        status, result = service.move(managed.a)
        assert (status, result["outcome"]) == (0, "migrated"), f"{result}\n{service.states()}"
    assert service.show(managed.b, "WatchdogUSec") == "3s"
    assert service.show(managed.b, "StatusText") == "counting"
    pid = int(service.show(managed.b, "MainPID"))
    time.sleep(4.5)
    service.goes_on(managed.b)
    managed.b.kill(pid, 19)
    wait_until(lambda: service.show(managed.b, "MainPID") not in ("0", str(pid)), "the watchdog has bitten", 20.0)


def test_what_keeps_a_service_from_moving(managed: Hosts, service: Service) -> None:
    private = f"ExecStart=\nExecStart=/usr/bin/python3 -S -E {PROGRAM} /tmp/private.log\n"
    service.install(f"PrivateTmp=yes\nExecStopPost=/bin/true\n{private}")
    managed.a.run(["systemctl", "start", service.unit])
    inside = f"/proc/{service.show(managed.a, 'MainPID')}/root/tmp/private.log"
    wait_until(lambda: managed.a.path(inside).exists(), "it counts where nobody sees it")
    status, result = service.move(managed.a, "--dry-run")
    assert (status, "a file of its own mount namespace" in str(result["reason"])) == (20, True), result
    assert "ExecStopPost= of" in str(result["events"])
    managed.a.run(["systemctl", "stop", service.unit])
    service.start("DynamicUser=no\n")
    service.install("LimitNOFILE=1000\n", hosts=(managed.b,))
    status, result = service.move(managed.a, "--dry-run")
    assert (status, "the files of" in str(result["events"])) == (0, True), result
    service.install("User=nobody\n", hosts=(managed.b,))
    status, result = service.move(managed.a)
    assert (status, "is something else there: User=nobody" in str(result["reason"])) == (20, True), result
    service.install(hosts=(managed.b,))
    managed.b.run(["systemctl", "start", service.unit])
    status, result = service.move(managed.a)
    assert (status, "is active (running) there" in str(result["reason"])) == (20, True), result
    managed.b.run(["systemctl", "stop", service.unit])
    managed.b.path(f"{BOOTED}/{service.unit}").unlink()
    managed.b.run(["systemctl", "daemon-reload"])
    status, result = service.move(managed.a)
    assert (status, "there is no service" in str(result["reason"])) == (20, True), result
    status, result = service.move(managed.b)
    assert (status, "this host has no service" in str(result["reason"])) == (2, True), result


def test_sockets_that_systemd_has_too_keep_it(managed: Hosts, service: Service) -> None:
    service.install()
    text = f"[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=127.0.0.1:8123\nService={service.unit}\n"
    managed.a.path(f"{BOOTED}/{service.name}.socket").write_text(text)
    managed.a.run(["systemctl", "daemon-reload"])
    managed.a.run(["systemctl", "start", f"{service.name}.socket", service.unit])
    wait_until(lambda: len(service.counts()) > 3, "it counts")
    status, result = service.move(managed.a)
    managed.a.run(["systemctl", "stop", f"{service.name}.socket"])
    assert (status, "passes its sockets to" in str(result["reason"])) == (20, True), result
    assert service.state(managed.a)[0] == "active"

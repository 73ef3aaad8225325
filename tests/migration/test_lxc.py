"""Containers of LXC move by their name, and are the other host's own afterwards, as if LXC had started them there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests import debian
from tests.hosts import Host, Hosts
from tests.hosts.bridges import BRIDGE
from tests.hosts.migrate import fault
from tests.subjects.lxc import (
    ADDRESS,
    BASIC,
    MAC,
    NETWORK,
    UNPRIVILEGED,
    Container,
    allow_ids,
    forbid_ids,
    make_debian_root,
    make_small_root,
)
from tests.subjects.programs import start_echo_client, wait_until

pytestmark = [
    pytest.mark.skipif(not shutil.which("lxc-start"), reason="lxc is not installed"),
    pytest.mark.timeout(400),
]

_BUSYBOX = "/bin/busybox"


@pytest.fixture
def container(hosts: Hosts, bridges: None) -> Iterator[Container]:
    """A privileged one, with a heap that checks itself and an echo server."""
    one = Container(hosts, BASIC + NETWORK + "lxc.console.path = none\nlxc.tty.max = 0\n")
    make_small_root(one.root)
    one.configure()
    one.start(hosts.a)
    wait_until(lambda: all((one.root / name).exists() for name in ("heap.status", "echo.status")), "it runs", 20.0)
    yield one
    one.remove()


def test_it_moves_there_and_back_with_its_connections(hosts: Hosts, container: Container) -> None:
    client = start_echo_client(hosts.client, ADDRESS)
    client.goes_on("requests", 20.0)
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        migration = container.move(source, ["--tcp", "established"])
        assert migration.outcome == "migrated", str(migration)
        assert (container.state(source), container.state(destination)) == ("STOPPED", "RUNNING")
        container.goes_on("heap.status", "writes")
        client.goes_on("requests", 20.0)
        assert container.inside(destination, _BUSYBOX, "hostname") == container.name
        assert MAC in container.inside(destination, _BUSYBOX, "ip", "link", "show", "eth0")
        status = destination.path(f"/proc/{container.info(destination)['PID']}/status").read_text()
        assert "Seccomp_filters:\t1\n" in status, "it has LXC's filter once"
        link = container.info(destination)["Link"]
        assert f"master {BRIDGE}" in destination.run(["ip", "link", "show", link]).stdout
        assert not list(source.path("/sys/fs/cgroup").glob("lxc.payload.*"))
    client.finish()
    container.inside(hosts.a, _BUSYBOX, "killall", "-TERM", "heap")
    wait_until(lambda: container.status("heap.status")["state"] != "running", "its own check")
    assert container.status("heap.status")["state"] == "pass"


def test_it_can_be_started_again_from_inside(hosts: Hosts, container: Container) -> None:
    assert container.move(hosts.a).outcome == "migrated"
    first = container.info(hosts.b)["PID"]
    container.inside(hosts.b, _BUSYBOX, "reboot", "-f", check=False)
    wait_until(lambda: container.info(hosts.b).get("PID", first) != first, "another first process")
    container.goes_on("heap.status", "writes")
    container.stop(hosts.b)


def test_what_keeps_a_host_from_taking_it_over(hosts: Hosts, container: Container) -> None:
    def refused() -> str:
        migration = container.move(hosts.a)
        assert migration.outcome == "refused", str(migration)
        return migration.reason

    settings = container.settings
    container.settings = settings.replace(f"link = {BRIDGE}", "link = nowhere")
    container.configure(hosts.b)
    assert "there is no bridge nowhere there" in refused()
    container.settings = settings + "lxc.cap.drop = net_raw\n"
    container.configure(hosts.b)
    assert "configuration there is another one: lxc.cap.drop = net_raw" in refused()
    container.settings = settings
    container.configure(hosts.b)
    config = hosts.b.path("/var/lib/lxc/web/config")
    config.chmod(0o666)
    assert "can be changed by others than root" in refused()
    config.unlink()
    assert "there is no container web there" in refused()
    container.configure(hosts.b)
    config.chmod(0o644)
    assert container.state(hosts.a) == "RUNNING"


def test_a_migration_that_is_undone_leaves_none_there(hosts: Hosts, container: Container) -> None:
    with fault(hosts.b, "destination before send READY: error"):
        migration = container.move(hosts.a)
    assert migration.outcome == "stayed", str(migration)
    assert (container.state(hosts.a), container.state(hosts.b)) == ("RUNNING", "STOPPED")
    assert not list(hosts.b.path("/sys/fs/cgroup").glob("lxc.[mp]*.web"))
    container.goes_on("heap.status", "writes")


def test_its_root_and_its_configuration_are_sent_along(hosts: Hosts, bridges: None) -> None:
    one = Container(hosts, BASIC + NETWORK + "lxc.console.path = none\nlxc.tty.max = 0\n", own=hosts.a)
    make_small_root(one.root)
    one.configure(hosts.a)
    one.start(hosts.a)
    wait_until(lambda: (one.root / "heap.status").exists(), "it runs", 20.0)
    with fault(hosts.b, "destination before send READY: error"):
        undone = one.move(hosts.a, ["--ship", "missing"])
    assert (undone.outcome, "a test has this fail" in undone.reason) == ("stayed", True), str(undone)
    assert not hosts.b.path("/var/lib/lxc/web").exists()
    migration = one.move(hosts.a, ["--ship", "missing"])
    assert migration.outcome == "migrated", str(migration)
    one.own = hosts.b
    one.goes_on("heap.status", "writes")
    one.inside(hosts.b, _BUSYBOX, "touch", "/made")
    assert (one.root / "made").exists()
    one.remove()


@pytest.fixture(params=["privileged", "unprivileged"])
def system(hosts: Hosts, bridges: None, request: pytest.FixtureRequest) -> Iterator[Container]:
    """A Debian with systemd, sshd, cron, nginx and redis, with LXC's usual consoles."""
    if debian.missing():
        pytest.skip(debian.missing())
    unprivileged = request.param == "unprivileged"
    one = Container(hosts, BASIC + (UNPRIVILEGED if unprivileged else "") + NETWORK, name="sys")
    make_debian_root(one.root, unprivileged=unprivileged)
    for host in (hosts.a, hosts.b):
        allow_ids(host)
    one.configure()
    one.start(hosts.a)
    wait_until(lambda: _settled(one, hosts.a), "systemd is through", 60.0)
    yield one
    one.remove()
    for host in (hosts.a, hosts.b):
        forbid_ids(host)


def _settled(system: Container, host: Host) -> bool:
    said = system.inside(host, "systemctl", "is-system-running", check=False)
    return any(word in ("running", "degraded") for word in said.split())


def _banner(host: Host, port: int, words: bytes = b"") -> bytes:
    """What a server in the container says."""
    code = "import socket,sys; s=socket.create_connection((sys.argv[1],int(sys.argv[2])),5); "
    code += "s.sendall(sys.argv[3].encode()); print(s.recv(40))"
    return host.run(["python3", "-c", code, ADDRESS, str(port), words.decode()]).stdout.encode()


def _redis(system: Container, host: Host) -> dict[str, str]:
    """What redis-server.service is."""
    pid = system.inside(host, "systemctl", "show", "--property=MainPID", "--value", "redis-server")
    commands: dict[str, tuple[str, ...]] = {
        name: ("cat", f"/proc/{pid}/{name}") for name in ("uid_map", "gid_map", "setgroups")
    }
    commands["status"] = ("grep", "-E", "^(Name|Uid|Gid|Groups|NSpid|Threads|Cap|NoNew|Seccomp)", f"/proc/{pid}/status")
    commands["threads"] = ("ls", f"/proc/{pid}/task")
    commands["directory"] = ("readlink", f"/proc/{pid}/cwd")
    return {name: system.inside(host, *words) for name, words in commands.items()}


def test_a_debian_with_systemd_moves(hosts: Hosts, system: Container) -> None:
    units = ("cron", "ssh", "nginx", "redis-server")
    before = system.inside(hosts.a, "cat", "/proc/1/cgroup", "/etc/machine-id")
    assert system.inside(hosts.a, "redis-cli", "set", "key", "value") == "OK"
    service = _redis(system, hosts.a)
    assert service["uid_map"].split()[:3] == ["0", "0", "1"], "systemd gives it a user namespace of its own"
    assert system.move(hosts.a).outcome == "migrated"
    assert (system.state(hosts.a), system.state(hosts.b)) == ("STOPPED", "RUNNING")
    assert system.inside(hosts.b, "systemctl", "is-active", *units).split() == ["active"] * len(units)
    assert system.inside(hosts.b, "cat", "/proc/1/cgroup", "/etc/machine-id") == before
    assert system.inside(hosts.b, "redis-cli", "get", "key") == "value"
    assert _redis(system, hosts.b) == service
    assert b"SSH-2.0" in _banner(hosts.client, 22)
    assert b"HTTP/1.1 200" in _banner(hosts.client, 80, b"GET / HTTP/1.0\r\n\r\n")
    system.inside(hosts.b, "systemctl", "restart", *units)
    assert system.inside(hosts.b, "systemctl", "is-active", *units).split() == ["active"] * len(units)
    assert "success" in system.inside(hosts.b, "sh", "-c", "systemd-run --wait true 2>&1")
    typing = f"(sleep 1; echo; sleep 3) | timeout 8 script -qc 'lxc-console -n {system.name} -t 0' /dev/null"
    assert "login:" in hosts.b.run(["sh", "-c", typing], check=False).stdout
    hosts.b.run(["lxc-stop", "-n", system.name, "-t", "60"])
    assert system.state(hosts.b) == "STOPPED"

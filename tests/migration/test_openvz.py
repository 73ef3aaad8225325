"""Containers of OpenVZ move by their id, and are the other node's own afterwards, as if vzctl had started them there.

The nodes are made by a stand-in of OpenVZ's commands: tests/openvz/README.md."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.migrate import Migration, fault, parse
from tests.openvz import Node
from tests.openvz.node import HOME, PRIVATE
from tests.subjects.programs import build, parse_status, start_echo_client, wait_until

CTID, NAME = "101", "web"
BRIDGE, OUTER, MAC, ADDRESS, ADDRESS6 = "brc", "veth101.0", "00:18:51:22:24:81", "10.77.0.50", "fd77::50"
CONFIG = f"""# This is an example configuration file.
VERSION="2"
ONBOOT="yes"
PHYSPAGES="131072:131072"
SWAPPAGES="0"
CPUUNITS="1000"
NETFILTER="full"
FEATURES="nfs:on fuse:on"
DISKSPACE="10485760:10485760"
DISKINODES="655360:655360"
QUOTATIME="0"
IP_ADDRESS="0.0.0.0"
PLATFORM="linux"
NUMMEMORYSUBGROUPS="512"
NAME="{NAME}"
HOSTNAME="lists.example.net"
OSTEMPLATE="centos-7-x86_64"
CPUMASK="0-1"
NETIF="ifname=eth0,bridge={BRIDGE},mac={MAC},host_ifname={OUTER},host_mac=00:18:51:B6:1A:F1"
"""
_INIT = f"""#!/bin/busybox sh
export PATH=/bin
ip link set lo up
ip link set eth0 up
ip addr add {ADDRESS}/24 dev eth0
ip addr add {ADDRESS6}/64 dev eth0 nodad
/bin/heap --status /heap.status --heap 16 --rate 10 &
/bin/echo server :: 7777 /echo.status &
while :; do wait; sleep 1; done
"""
_APPLETS = ("sh", "sleep", "ip", "hostname", "killall", "ps")


def make_root(root: Path) -> None:
    """Busybox, a heap that checks itself, and an echo server; init is a shell."""
    for directory in ("bin", "sbin", "dev", "etc", "proc", "run", "sys", "tmp"):
        (root / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    for applet in _APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    for name in ("heap", "echo"):
        shutil.copy(build(name, "-static"), root / "bin" / name)
    (root / "sbin" / "init").write_text(_INIT)
    (root / "sbin" / "init").chmod(0o755)


@dataclass
class Container:
    """One, on a pair of nodes that both see its files."""

    hosts: Hosts
    a: Node
    b: Node

    @property
    def files(self) -> Path:
        """Its files, from outside."""
        return self.hosts.shared / f"ct-{CTID}"

    def see_files(self, node: Node) -> None:
        """Have them where a node looks for them, as a mount of network storage would."""
        node.host.run(["mkdir", "-p", f"{PRIVATE}/{CTID}/fs"])
        node.host.run(["mount", "--bind", f"/srv/shared/ct-{CTID}", f"{PRIVATE}/{CTID}/fs"])

    def create(self) -> None:
        """On node a, and start it there."""
        area = self.a.area(CTID)
        make_root(self.files)
        for node in (self.a, self.b):
            self.see_files(node)
        (area / "ve.conf").write_text(CONFIG)
        (area / ".ve.layout").symlink_to("4")
        self.a.vzctl("register", f"{PRIVATE}/{CTID}", CTID)
        self.a.vzctl("start", CTID)
        wait_until(
            lambda: all((self.files / name).exists() for name in ("heap.status", "echo.status")), "it runs", 20.0
        )

    def status(self, file: str) -> dict[str, str]:
        """What a program in it says of itself."""
        return parse_status((self.files / file).read_text())

    def goes_on(self, file: str, name: str) -> None:
        """Wait until a program in it has gone on, without an error."""
        for _ in range(2):
            before = int(self.status(file)[name])
            wait_until(lambda now=before: int(self.status(file)[name]) > now, f"{name} goes on", 20.0)  # type: ignore[misc]
        assert self.status(file)["state"] == "running", self.status(file)

    def move(self, source: Host, options: Sequence[str] = (), name: str = CTID) -> Migration:
        """Ask for it."""
        words = ["phaul", "migrate", "--vz", name, f"root@{self.hosts.other(source).address}"]
        done = source.run([*words, "--json", "--yes", "--max-downtime", "5000", *options], check=False, timeout=180.0)
        return parse(done)


@pytest.fixture
def container(hosts: Hosts, bridges: None) -> Iterator[Container]:
    """It runs on node a; wherever it is afterwards, it is stopped."""
    one = Container(hosts, Node(hosts.a), Node(hosts.b))
    for node in (one.a, one.b):
        node.make()
    one.create()
    yield one
    for node in (one.a, one.b):
        if "running" in node.status(CTID):
            node.vzctl("stop", CTID, "--fast")
        for mount in node.host.run(["sh", "-c", f"grep -o '{PRIVATE}/[^ ]*' /proc/mounts"], check=False).stdout.split():
            node.host.run(["umount", mount])
        node.unmake()
    shutil.rmtree(one.files)


def test_it_moves_there_and_back_with_its_connections(hosts: Hosts, container: Container) -> None:
    client = start_echo_client(hosts.client, ADDRESS)
    client.goes_on("requests")
    for here, there in ((container.a, container.b), (container.b, container.a)):
        here.host.run(["cgset", "-r", "ve.aio_max_nr=131072", CTID])
        migration = container.move(here.host, ["--tcp", "established"])
        assert migration.outcome == "migrated", str(migration)
        _handed_over(here, there)
        container.goes_on("heap.status", "writes")
        client.goes_on("requests")
        assert there.vzctl("exec", NAME, "/bin/hostname").stdout.strip() == "lists.example.net"
        assert MAC in there.vzctl("exec", CTID, "/bin/ip", "link", "show", "eth0").stdout
        assert f"master {BRIDGE}" in there.host.run(["ip", "link", "show", OUTER]).stdout
        _same_container(here, there)
        here.host.run(["umount", f"{PRIVATE}/{CTID}.migrated/fs"])
        shutil.rmtree(here.host.path(f"{PRIVATE}/{CTID}.migrated"))
        container.see_files(here)
    client.finish()
    container.a.vzctl("exec", CTID, "/bin/killall", "-TERM", "heap")
    wait_until(lambda: container.status("heap.status")["state"] != "running", "its own check")
    assert container.status("heap.status")["state"] == "pass"


def _handed_over(here: Node, there: Node) -> None:
    """Wait until both nodes' vzctl know: they are told after the operator is."""
    wait_until(lambda: here.status(CTID) == "deleted unmounted down", "the source has forgotten it", 30.0)
    wait_until(lambda: there.status(CTID) == "exist mounted running", "it is the destination's", 30.0)
    wait_until(lambda: "NETIF=" in (there.area(CTID) / "ve.conf").read_text(), "its configuration is whole", 30.0)


def _same_container(here: Node, there: Node) -> None:
    """What was left at one node, and what is there at the other."""
    left = here.host.path(f"{PRIVATE}/{CTID}.migrated")
    assert (left / "ve.conf").exists()
    assert not here.area(CTID).exists()
    configured = (there.area(CTID) / "ve.conf").read_text()
    for line in CONFIG.splitlines():
        carried = not line.startswith(("#", "IP_ADDRESS", "CPUMASK"))
        assert (line in configured) is carried, line
    assert there.value(CTID, "ve.veid") == CTID
    assert there.value(CTID, "ve.aio_max_nr") == "131072"
    assert not here.host.path(f"/sys/fs/cgroup/machine.slice/{CTID}").exists()


def _writes(container: Container) -> bool:
    """Whether the heap has begun to tell of itself."""
    return (container.files / "heap.status").exists() and "writes" in container.status("heap.status")


def test_it_is_the_nodes_own_afterwards(hosts: Hosts, container: Container) -> None:
    migration = container.move(hosts.a)
    assert migration.outcome == "migrated", str(migration)
    _handed_over(container.a, container.b)
    container.b.vzctl("stop", CTID, "--fast")
    assert container.b.status(CTID) == "exist unmounted down"
    for name in ("heap.status", "echo.status"):
        (container.files / name).unlink()
    container.b.vzctl("start", CTID)
    wait_until(lambda: _writes(container), "it runs again", 20.0)
    container.goes_on("heap.status", "writes")
    assert f"master {BRIDGE}" in hosts.b.run(["ip", "link", "show", OUTER]).stdout


def test_a_migration_that_is_undone_leaves_none_there(hosts: Hosts, container: Container) -> None:
    with fault(hosts.b, "destination before send READY: error"):
        migration = container.move(hosts.a)
    assert migration.outcome == "stayed", str(migration)
    assert (container.a.status(CTID), container.b.status(CTID)) == ("exist mounted running", "deleted unmounted down")
    assert [path.name for path in container.b.area(CTID).iterdir()] == ["fs"]
    assert not hosts.b.path(f"/sys/fs/cgroup/machine.slice/{CTID}").exists()
    container.goes_on("heap.status", "writes")
    container.a.vzctl("stop", CTID, "--fast")
    container.a.vzctl("start", CTID)


def test_what_keeps_it_where_it_is(hosts: Hosts, container: Container) -> None:
    def refused(name: str = CTID) -> str:
        migration = container.move(hosts.a, name=name)
        assert migration.outcome in ("refused", "error"), str(migration)
        return str(migration.reason)

    conf = container.a.area(CTID) / "ve.conf"
    plain = conf.read_text()
    conf.write_text(plain + 'BINDMOUNT="/home:/home"\n')
    assert "BINDMOUNT in its configuration is for the operator of a host to give" in refused()
    conf.write_text(plain.replace("0.0.0.0", "192.0.2.7"))
    assert "192.0.2.7 are on venet0" in refused()
    conf.write_text(plain)
    script = container.a.area(CTID) / "scripts" / "start"
    script.parent.mkdir()
    script.touch()
    assert "scripts/start is run by vzctl as root of the host" in refused()
    script.unlink()
    (container.b.area(CTID) / "ve.conf").touch()
    assert f"there is a private area {PRIVATE}/{CTID} there already" in refused()
    (container.b.area(CTID) / "ve.conf").unlink()
    hosts.b.run(["umount", "/proc/cgroups"])
    assert "the kernel of the other host has no VEs" in refused()
    hosts.b.run(["mount", "--bind", f"{HOME}/cgroups", "/proc/cgroups"])
    assert "this host has no container 999" in refused("999")
    assert container.a.status(CTID) == "exist mounted running"
    container.goes_on("heap.status", "writes")

"""Containers of Podman move by their name, and are the other host's own afterwards, as if podman had started them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.migrate import Migration, fault
from tests.subjects.podman import ADDRESS, BUSYBOX, LAN, MAC, PORT, Container
from tests.subjects.programs import start_echo_client, wait_until

pytestmark = [
    pytest.mark.skipif(not (shutil.which("podman") and shutil.which("runc")), reason="podman or runc is not installed"),
    pytest.mark.timeout(300),
]

_plugins = pytest.mark.skipif(
    not Path("/usr/lib/cni/bridge").exists(), reason="no containernetworking-plugins: run .ci/packages"
)
_netavark = pytest.mark.skipif(not Path("/usr/lib/podman/netavark").exists(), reason="no netavark: run .ci/packages")
_backends = pytest.mark.parametrize(
    "backend", [pytest.param("cni", marks=_plugins), pytest.param("netavark", marks=_netavark)]
)


@contextmanager
def _running(one: Container) -> Iterator[Container]:
    """It was created on both hosts and runs on a."""
    one.set_up()
    one.create()
    one.start(one.hosts.a)
    yield one
    one.tear_down()


@pytest.fixture
def container(hosts: Hosts) -> Iterator[Container]:
    """One that was created on both hosts and runs on a."""
    with _running(Container(hosts)) as one:
        yield one


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
    with fault(hosts.b, "destination before send READY: error"):
        migration = container.move(hosts.a, "--ship", "missing")
    assert migration.outcome == "stayed", str(migration)
    assert (container.state(hosts.a), container.state(hosts.b)) == ("running", "exited")
    container.goes_on(hosts.a)
    assert container.move(hosts.a, "--ship", "missing").outcome == "migrated"
    container.goes_on(hosts.b)


def test_one_that_is_removed_when_it_ends(hosts: Hosts) -> None:
    """Here when it has gone, there when it ends; or there when it has not come."""
    with _running(Container(hosts, ["--rm"])) as one:
        with fault(hosts.b, "destination before send READY: error"):
            assert one.move(hosts.a, "--ship", "missing").outcome == "stayed"
        assert one.names(hosts.b) == []
        one.create(hosts.b)
        migration = one.move(hosts.a, "--ship", "missing")
        assert migration.outcome == "migrated", str(migration)
        one.goes_on(hosts.b)
        assert one.inside(hosts.b, "cat", "/made/file") == "early"
        assert one.names(hosts.a) == []
        hosts.b.run(["podman", "stop", "--time", "5", one.name])
        wait_until(lambda: one.names(hosts.b) == [], "it is removed")


def test_one_that_writes_to_a_volume_only(hosts: Hosts) -> None:
    """Nothing is sent: both hosts see the volume, and what it has in memory file systems comes along. Its health is
    checked there, too, where somebody asks."""
    options = ["--user", "4242", "--security-opt", "no-new-privileges"]
    options += ["--health-cmd", f'["{BUSYBOX}","grep","running","/data/heap.status"]', "--health-interval", "disable"]
    with _running(Container(hosts, options, volume=True)) as one:
        one.inside(hosts.a, "sh", "-c", "for i in tmp dev/shm; do echo memory > /$i/file; done")
        migration = one.move(hosts.a)
        assert migration.outcome == "migrated", str(migration)
        one.goes_on(hosts.b)
        assert one.inside(hosts.b, "cat", "/tmp/file", "/dev/shm/file").split() == ["memory"] * 2
        assert one.inside(hosts.b, "id", "-u") == "4242"
        hosts.b.run(["podman", "healthcheck", "run", one.name])
        assert one.told(hosts.b)["State"]["Health"]["Status"] == "healthy"


@pytest.fixture
def plugged(hosts: Hosts, bridges: None, backend: str) -> Iterator[Container]:
    """One on a network whose bridge is on the hosts' own network."""
    with _running(Container(hosts, ["--ip", ADDRESS, "--mac-address", MAC], network=LAN, backend=backend)) as one:
        yield one


@_backends
@pytest.mark.timeout(600)
def test_one_on_a_bridge_moves_there_and_back_with_its_connections(hosts: Hosts, plugged: Container) -> None:
    client = start_echo_client(hosts.client, ADDRESS)
    client.goes_on("requests", 20.0)
    with fault(hosts.b, "destination before send READY: error"):
        assert plugged.move(hosts.a, "--ship", "missing").outcome == "stayed"
    assert _leftover(hosts.b) == []
    client.goes_on("requests", 20.0)
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        migration = plugged.move(source, "--ship", "missing")
        assert migration.outcome == "migrated", str(migration)
        assert _leftover(source) == []
        plugged.goes_on(destination)
        client.goes_on("requests", 20.0)
        settings = plugged.told(destination)["NetworkSettings"]["Networks"][LAN]
        assert (settings["IPAddress"], settings["MacAddress"]) == (ADDRESS, MAC)
        assert {f"link/ether {MAC}", f"inet {ADDRESS}/24"} <= _pairs(plugged.inside(destination, "ip", "addr"))
        name = plugged.inside(destination, "hostname")
        assert f"{ADDRESS}\t{name}" in plugged.inside(destination, "cat", "/etc/hosts")
        hairpins = destination.run(["bridge", "-d", "link"]).stdout.count("hairpin on")
        assert hairpins == (plugged.backend == "cni"), "as podman has set it"
    client.finish()
    hosts.a.run(["podman", "stop", "--time", "5", plugged.name])
    assert (_leftover(hosts.a), plugged.told(hosts.a)["State"]["ExitCode"]) == ([], 0)


@_backends
@pytest.mark.timeout(600)
def test_one_on_podmans_own_network(hosts: Hosts, backend: str) -> None:
    """It moves where podman was told its addresses, by the command that the preflight writes down; with a volume that
    is sent along, too, for which podman there runs in a mount namespace of its own."""
    options = ["--publish", f"{PORT}:7777", "--volume", "/srv/own/sent:/sent"]
    one = Container(hosts, options, volume=True, network="podman", backend=backend)
    one.set_up()
    for host in (hosts.a, hosts.b):
        host.path("/srv/own/sent").mkdir()
    one.create()
    hosts.b.path("/srv/own/sent").rmdir()
    one.start(hosts.a)
    settings = one.told(hosts.a)["NetworkSettings"]["Networks"]["podman"]
    addresses = [settings["IPAddress"], settings["MacAddress"]]
    finding = _blocker(one.move(hosts.a, "--ship", "missing"))
    assert (finding["check"], addresses[0] in finding["text"]) == ("podman-address", True), finding
    advice = finding["advice"].removeprefix("there: ").split(", and ")
    assert advice[1] == f"podman network connect --ip {addresses[0]} --mac-address {addresses[1]} podman web"
    for command in advice:
        hosts.b.run(command.split())
    assert _greeting(hosts.client, hosts.a) == "hello"
    migration = one.move(hosts.a, "--ship", "missing")
    assert migration.outcome == "migrated", str(migration)
    one.goes_on(hosts.b)
    settings = one.told(hosts.b)["NetworkSettings"]["Networks"]["podman"]
    assert [settings["IPAddress"], settings["MacAddress"]] == addresses
    assert (_greeting(hosts.client, hosts.a), _greeting(hosts.client, hosts.b)) == ("", "hello"), "the published port"
    assert _leftover(hosts.a) == []
    assert "0% packet loss" in one.inside(hosts.b, "ping", "-c", "1", hosts.client.address), "through its gateway"
    hosts.b.run(["podman", "stop", "--time", "5", one.name])
    assert _leftover(hosts.b) == []
    one.tear_down()


@_backends
@pytest.mark.timeout(600)
def test_one_on_several_networks_with_ipv6_and_aliases(hosts: Hosts, bridges: None, backend: str) -> None:
    one = Container(hosts, network=f"{LAN}:ip={ADDRESS},mac={MAC},interface_name=eth0", backend=backend)
    one.set_up()
    subnets = ["--subnet", "10.99.0.0/24", "--ipv6", "--subnet", "fd99::/64"]
    for host in (hosts.a, hosts.b):
        host.run(["podman", "network", "create", *subnets, "--disable-dns", "back"])
    place = "back:ip=10.99.0.9,ip6=fd99::9,mac=02:77:00:00:00:51,interface_name=eth1"
    one.create(hosts.b, options=["--network", place])
    one.create(hosts.a, options=["--network", f"{place},alias=db"])
    one.start(hosts.a)
    client = start_echo_client(hosts.client, ADDRESS)
    client.goes_on("requests", 20.0)
    finding = _blocker(one.move(hosts.a, "--ship", "missing"))
    assert "on the network back as no other name, here as db" in finding["text"], finding
    for command in finding["advice"].removeprefix("there: ").split(", and "):
        hosts.b.run(command.split())
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        before = _routes(one, source)
        migration = one.move(source, "--ship", "missing")
        assert migration.outcome == "migrated", str(migration)
        one.goes_on(destination)
        client.goes_on("requests", 20.0)
        assert _routes(one, destination) == before
        networks = one.told(destination)["NetworkSettings"]["Networks"]
        assert networks[LAN]["IPAddress"] == ADDRESS
        assert "db" in networks["back"]["Aliases"]
        back = [networks["back"][key] for key in ("IPAddress", "GlobalIPv6Address", "MacAddress")]
        assert back == ["10.99.0.9", "fd99::9", "02:77:00:00:00:51"]
        assert {f"inet {ADDRESS}/24", "inet 10.99.0.9/24", "inet6 fd99::9/64"} <= _pairs(
            one.inside(destination, "ip", "addr")
        )
        for address in ("10.99.0.9", "fd99::9"):
            said = destination.run([BUSYBOX, "ping", "-c", "1", address]).stdout
            assert " 0% packet loss" in said, "over the bridge"
        assert _leftover(source) == []
    client.finish()
    one.tear_down()


@_netavark
@pytest.mark.timeout(600)
def test_a_bridge_that_netavark_would_remove(hosts: Hosts) -> None:
    """It does so when the last container of a network has ended: not while one comes, and then as ever."""
    address = "10.88.0.50"
    options = ["--ip", address, "--mac-address", MAC]
    with _running(Container(hosts, options, volume=True, network="podman", backend="netavark")) as one:
        other = ["podman", "run", "-d", "--rm", "--name", "other", "--network", "podman", "small"]
        hosts.b.run([*other, BUSYBOX, "sleep", "100"])
        with ThreadPoolExecutor() as pool:
            moving = pool.submit(one.move, hosts.a, "--bandwidth", "4MiB")
            wait_until(lambda: _is_made(hosts.b), "it comes", 20.0)
            hosts.b.run(["podman", "stop", "--time", "0", "other"])
            ports = hosts.b.run(["ip", "-o", "link", "show", "master", "podman0"]).stdout.splitlines()
            assert (len(ports), moving.running()) == (1, True), ports
            migration = moving.result()
        assert migration.outcome == "migrated", str(migration)
        one.goes_on(hosts.b)
        assert len(hosts.b.run(["ip", "-o", "link", "show", "master", "podman0"]).stdout.splitlines()) == 1
        assert _leftover(hosts.a) == []
        with fault(hosts.a, "destination before send READY: error"):
            assert one.move(hosts.b).outcome == "stayed"
        assert _leftover(hosts.a) == []
        with fault(hosts.a, "destination before send READY: kill"):
            assert one.move(hosts.b).outcome == "stayed"
        wait_until(lambda: one.state(hosts.a) == "exited", "podman has cleared it away", 20.0)
        wait_until(lambda: " ph" not in hosts.a.run(["ip", "-o", "link"]).stdout, "the bridge is not kept", 20.0)
        for log in hosts.a.path("/run/phaul").glob("*.log"):  # of an agent that was killed
            log.unlink()
        assert "0% packet loss" in one.inside(hosts.b, "ping", "-c", "1", hosts.client.address), "through its gateway"
        hosts.b.run(["podman", "stop", "--time", "5", one.name])
        assert _leftover(hosts.b) == []


@pytest.fixture
def published(hosts: Hosts) -> Iterator[Container]:
    """One on podman's own network, with a published port."""
    with _running(Container(hosts, ["--publish", f"{PORT}:7777"], volume=True, network="podman")) as one:
        yield one


@_plugins
@pytest.mark.timeout(600)
def test_networks_that_another_host_has_not(hosts: Hosts, published: Container) -> None:
    def refused() -> tuple[str, str]:
        finding = _blocker(published.move(hosts.a))
        return finding["text"], finding["advice"]

    hosts.a.run(["podman", "network", "create", "--subnet", "10.99.0.0/24", "--disable-dns", "back"])
    published.network = "back"
    published.options += ["--ip", "10.99.0.9", "--mac-address", MAC]
    published.create(hosts.a)
    published.start(hosts.a)
    published.network = "podman"
    published.create(hosts.b, options=["--publish", f"{PORT}:7777"])
    text, advice = refused()
    assert text == "there is no network back there"
    command = advice.rpartition(": ")[2]
    hosts.b.run(command.replace("10.99.0", "10.98.0").split())
    assert "the network back there is another one: subnets is" in refused()[0]
    hosts.b.run(["podman", "network", "rm", "back"])
    hosts.b.run(command.split())
    assert refused()[0] == "the container there is not on the network back"
    published.network = "back"
    published.create(hosts.b, options=["--publish", f"{PORT}:7777", "--ip", "10.99.0.8", "--mac-address", MAC])
    assert f"other addresses on the network back: 10.99.0.8, {MAC}, here 10.99.0.9, {MAC}" in refused()[0]
    published.create(hosts.b)
    other = ["podman", "run", "-d", "--name", "other", "--network", "back", "--ip", "10.99.0.9"]
    hosts.b.run([*other, "small", BUSYBOX, "sleep", "100"])
    assert refused()[0] == "the container other there has its address on the network back"


def _blocker(migration: Migration) -> dict[str, str]:
    """The first thing of a refused migration's that speaks against it."""
    assert migration.outcome == "refused", str(migration)
    (answer,) = (event for event in migration.events if event["event"] == "preflight")
    return next(finding for finding in answer["findings"] if finding["severity"] == "blocker")


def _pairs(text: str) -> set[str]:
    return {f"{one} {other}" for one, other in itertools.pairwise(text.split())}


def _greeting(client: Host, host: Host) -> str:
    """What is answered at the published port of a host."""
    script = f"printf hello | timeout 10 {BUSYBOX} nc -w 5 {host.address} {PORT}"
    return client.run(["sh", "-c", script], check=False).stdout


def _routes(one: Container, host: Host) -> list[str]:
    return sorted(line for kind in ("-4", "-6") for line in one.inside(host, "ip", kind, "route").splitlines())


def _is_made(host: Host) -> bool:
    """Whether a host has a container's veth pair which is not plugged in yet."""
    links = host.run(["ip", "-o", "link", "show", "up", "type", "veth"]).stdout.splitlines()
    return any(" master " not in line for line in links if " eth0" not in line)


def _leftover(host: Host) -> list[str]:
    """What a host has of a container's network."""
    links = host.run(["ip", "-o", "link"]).stdout.splitlines()
    ports = [line for line in links if " master " in line or " podman" in line]
    leases = [path.name for path in host.path("/var/lib/cni/networks").glob("*/10.*")]
    spaces = [path.name for path in host.path("/run/netns").glob("*")]
    rules = [line for line in host.run(["nft", "list", "ruleset"]).stdout.splitlines() if " 10." in line]
    return [*(port for port in ports if " eth0" not in port), *leases, *spaces, *rules]

"""A program in a network namespace of its own moves with it: devices, addresses, every connection through a bridge."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.bridges import BRIDGE
from tests.migration.conftest import Mover
from tests.subjects.programs import Subject, build, start, start_echo_client, wait_until

_ADDRESS, _ADDRESS6, _MAC, _PORT = "10.77.0.50", "fd77::50", "02:77:00:00:00:50", 7777
_OUTER = "veth-web"
_SERVE = f"""
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip link set eth0 address {_MAC} up
ip addr add {_ADDRESS}/24 dev eth0
ip addr add {_ADDRESS6}/64 dev eth0 nodad
ip route add default via 10.77.0.3
sysctl -qw net.ipv4.conf.all.rp_filter=0 net.core.somaxconn=99
exec "$@"
"""


def _ip(host: Host, words: str) -> str:
    return host.run(["ip", *words.split()]).stdout


def _in_network(host: Host, pid: int, words: str) -> str:
    return host.run(["nsenter", "-n", "-t", str(pid), *words.split()]).stdout


@pytest.fixture
def web(hosts: Hosts, bridges: None) -> Iterator[Subject]:
    """An echo server in a network namespace on host a, plugged into the bridge."""
    status = "/srv/shared/echo-server.status"
    words = [str(build("echo")), "server", "::", str(_PORT), status]
    with_network = ["unshare", "--net", "bash", "-ec", _SERVE, "-", *words]

    def attach(pid: int) -> None:
        _ip(hosts.a, f"link add {_OUTER} type veth peer name eth0 netns {pid}")
        _ip(hosts.a, f"link set {_OUTER} master {BRIDGE} up")

    server = start(hosts.a, with_network, status, attach)
    wait_until(lambda: "tentative" not in _in_network(hosts.a, server.pid, "ip addr"), "its addresses are its own")
    yield server
    server.finish()


@pytest.mark.parametrize("address", [_ADDRESS, _ADDRESS6])
def test_clients_of_a_container_lose_nothing(hosts: Hosts, web: Subject, mover: Mover, address: str) -> None:
    client = start_echo_client(hosts.client, address)
    client.goes_on("requests")
    source, destination = hosts.a, hosts.b
    for _ in range(2):
        link = json.loads(_in_network(source, web.pid, "ip -json -d addr show dev eth0"))[0]
        mover.move(web, ["--tcp", "established"])
        client.goes_on("requests")
        wait_until(lambda host=source: _OUTER not in _ip(host, "link show"), "the source's end is gone")  # type: ignore[misc]
        assert f"master {BRIDGE}" in _ip(destination, f"link show {_OUTER}")
        moved = json.loads(_in_network(destination, web.pid, "ip -json -d addr show dev eth0"))[0]
        for volatile in ("link_index", "link_netnsid"):
            link.pop(volatile, None)
            moved.pop(volatile, None)
        assert moved == link
        assert "default via 10.77.0.3" in _in_network(destination, web.pid, "ip route")
        assert _in_network(destination, web.pid, "sysctl -n net.core.somaxconn") == "99\n"
        late = start_echo_client(hosts.client, address, connections=1, status="/srv/shared/late.status")
        late.goes_on("requests")
        late.finish()
        source, destination = destination, source
    client.finish()


def test_a_bridge_that_is_not_there(hosts: Hosts, web: Subject, mover: Mover) -> None:
    _ip(hosts.b, f"link set {BRIDGE} name other")
    try:
        client = start_echo_client(hosts.client, _ADDRESS)
        migration = mover.try_to_move(web.pid, hosts.a)
        assert migration.outcome == "refused", str(migration)
        assert f"network device eth0 uses a bridge {BRIDGE}" in migration.reason
        client.goes_on("requests")
        client.finish()
        assert _OUTER not in _ip(hosts.b, "link show")
    finally:
        _ip(hosts.b, f"link set other name {BRIDGE}")


def test_a_network_that_nothing_comes_in_to(hosts: Hosts, mover: Mover) -> None:
    status = "/srv/shared/echo-server.status"
    words = [str(build("echo")), "server", "127.0.0.1", str(_PORT), status]
    server = start(hosts.a, ["unshare", "--net", "sh", "-ec", 'ip link set lo up; exec "$@"', "-", *words], status)
    migration = mover.try_to_move(server.pid, hosts.a)
    assert migration.outcome == "migrated", str(migration)
    server.moved_to(hosts.b)
    assert "127.0.0.1" in _in_network(hosts.b, server.pid, "ip addr show dev lo")
    server.finish()

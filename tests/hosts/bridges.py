"""A bridge on either host, into which containers are plugged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.hosts.host import Host
from tests.hosts.lab import Hosts

BRIDGE = "brc"


@contextmanager
def bridged(hosts: Hosts) -> Iterator[None]:
    """On both hosts a bridge, with eth0 as a port, that has the host's addresses."""
    pair = (hosts.a, hosts.b)
    for host in pair:
        _ip(host, f"link add {BRIDGE} type bridge")
        _ip(host, f"link set {BRIDGE} address {host.spec.mac} up")
        _ip(host, "addr flush dev eth0")
        _ip(host, f"link set eth0 master {BRIDGE}")
        _ip(host, f"addr add {host.address}/24 dev {BRIDGE}")
        _ip(host, f"addr add {host.address6}/64 dev {BRIDGE} nodad")
    yield
    for host in pair:
        _ip(host, f"link del {BRIDGE}")
        _ip(host, f"addr add {host.address}/24 dev eth0")
        _ip(host, f"addr add {host.address6}/64 dev eth0 nodad")
    hosts.reset()


def _ip(host: Host, words: str) -> None:
    host.run(["ip", *words.split()])

"""What networks do: one connection of several breaks, packets vanish, bytes change, the link is slow."""

from __future__ import annotations

import signal
import time

import pytest

from phaul.migration import Role
from tests.faults.scene import Scene, at_length, cut, every_run, wait_hung
from tests.hosts import Host, Hosts

SLOWLY = ("--bandwidth", "500K")


def rule(host: Host, text: str) -> None:
    """A firewall rule for what the host sends; the host is given up with it in the end."""
    host.run(["nft", "add table inet faults"])
    host.run(["nft", "add chain inet faults out { type filter hook output priority 0; }"])
    host.run(["nft", f"add rule inet faults out {text}"])


def no_rules(host: Host) -> None:
    """All packets pass again."""
    host.run(["nft", "delete table inet faults"])


def test_ssh_may_go_when_the_agents_have_met(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "after work BUILD", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b, process)
    cut(hosts.a, hosts.b, ssh=True)
    hosts.b.kill(pid, signal.SIGCONT)
    migration = scene.answer(process)
    assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
    scene.agrees(migration)


STEPS = [  # where the destination stands when its packets begin to vanish, and for how long they do
    ("after send PREPARED", 15.0),
    ("before work LAND", 15.0),
    ("before row PARKED-RESUMED", 8.0),
    ("after row PARKED-RESUMED", 8.0),
]


@pytest.mark.parametrize(("point", "seconds"), every_run(STEPS[2])(STEPS))
def test_packets_that_vanish(hosts: Hosts, point: str, seconds: float) -> None:
    """Half open: neither side is told anything. The service's own clients are not concerned."""
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, point, "hang")
    process = scene.start()
    pid = wait_hung(hosts.b, process)
    for host, other in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        rule(host, f"ip saddr {host.address} ip daddr {other.address} drop")
    hosts.b.kill(pid, signal.SIGCONT)
    time.sleep(seconds)
    for host in (hosts.a, hosts.b):
        no_rules(host)
    scene.agrees(scene.answer(process, 120.0))


def one_of_several(hosts: Hosts) -> int:
    """The local port of one connection between the agents, the one made last."""
    done = hosts.a.run(["ss", "-tnH", "state", "established", "dst", hosts.b.address, "and", "dport", "!=", ":22"])
    ports = [int(line.split()[2].rpartition(":")[2]) for line in done.stdout.splitlines()]
    assert len(ports) > 2, done.stdout
    return max(ports)


@pytest.mark.parametrize("how", every_run("cut", "half-open")(["cut", "stalled", "half-open"]))
def test_one_connection_of_several(hosts: Hosts, how: str) -> None:
    """It breaks, stands still for 30 s, or passes nothing any more without a word: what it carries is missed."""
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "after send PREPARED", "hang")
    process = scene.start(["--streams", "4", *SLOWLY])
    pid = wait_hung(hosts.b, process)
    port = one_of_several(hosts)
    if how == "cut":
        hosts.a.run(["ss", "--kill", "--tcp", "state", "established", "sport", "=", f":{port}"])
    else:
        rule(hosts.a, f"tcp sport {port} drop")
    hosts.b.kill(pid, signal.SIGCONT)
    if how == "stalled":
        time.sleep(30)
        no_rules(hosts.a)
    migration = scene.answer(process, 150.0)
    if how == "half-open":
        no_rules(hosts.a)
    assert migration.outcome == "stayed" or how == "stalled", f"{migration}\n{scene.told()}"
    scene.agrees(migration)


def test_a_byte_that_changes_on_the_way_ends_it(hosts: Hosts) -> None:
    """TLS tells (RFC 8446, 6.2): no such page is ever written."""
    scene = Scene.begin(hosts)
    process = scene.start(SLOWLY)
    rule(hosts.a, f"ip daddr {hosts.b.address} tcp dport != 22 ip length > 1200 @th,4800,8 set 0x5a")
    migration = scene.answer(process)
    no_rules(hosts.a)
    assert migration.outcome == "stayed", f"{migration}\n{scene.told()}"
    scene.agrees(migration)


@pytest.mark.parametrize("how", every_run("corrupted")(["stalled", "half-open", "corrupted"]))
def test_what_carries_everything(hosts: Hosts, how: str) -> None:
    """--tunnel: SSH's connection stands still for 30 s, or for good, or changes a byte (RFC 4253, 6.4)."""
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "after send PREPARED", "hang")
    process = scene.start(["--tunnel", *SLOWLY])
    pid = wait_hung(hosts.b, process)
    to_ssh = f"ip daddr {hosts.b.address} tcp dport 22"
    rule(hosts.a, f"{to_ssh} ip length > 1200 @th,4800,8 set 0x5a" if how == "corrupted" else f"{to_ssh} drop")
    hosts.b.kill(pid, signal.SIGCONT)
    if how == "stalled":
        time.sleep(30)
        no_rules(hosts.a)
    migration = scene.answer(process, 150.0)
    if how != "stalled":
        no_rules(hosts.a)
    assert migration.outcome == "stayed" or how == "stalled", f"{migration}\n{scene.told()}"
    scene.agrees(migration)


@at_length
def test_a_slow_link(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    hosts.a.run(
        ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "4mbit", "burst", "32kbit", "latency", "1s"]
    )
    migration = scene.move(["--max-downtime", "5000"])
    hosts.a.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
    scene.agrees(migration)

"""The link between the hosts is cut in the switchover, and both reach an etcd: the program goes on, without a human."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.migration import Role
from tests import etcd
from tests.faults.scene import Scene, hung
from tests.hosts import Host, Hosts
from tests.hosts.host import Process
from tests.subjects.programs import wait_until

PORT = 2379
DEADLINE = 5.5
"""Seconds: a claim takes less (phaul.migration.destination.Claiming), the source waits for longer."""


@pytest.fixture
def arbiter(hosts: Hosts) -> Iterator[Process]:
    """An etcd on the client's host, which both hosts reach by their own ways, and are told of."""
    if etcd.missing():
        pytest.skip(etcd.missing())
    directory = hosts.shared / "etcd"
    directory.mkdir()
    etcd.Certificates.make(directory, hosts.client.address)
    inside = etcd.Certificates(Path("/srv/shared/etcd"))
    process = hosts.client.popen(inside.server(hosts.client.address, PORT, "/tmp/etcd"), cwd="/tmp")
    lines = [
        f"{name} = {json.dumps(value)}"
        for name, value in inside.settings(f"https://{hosts.client.address}:{PORT}").items()
    ]
    for host in (hosts.a, hosts.b):
        host.run(
            ["sh", "-c", "mkdir -p ~/.config/phaul; cat > ~/.config/phaul/phaul.toml"],
            feed="\n".join(["[arbiter]", *lines]),
        )
    wait_until(lambda: "no arbiter" not in problem(hosts.a) and not problem(hosts.a), "etcd answers", 60.0)
    yield process
    for host in (hosts.a, hosts.b):
        host.run(["sh", "-c", "rm -r ~/.config/phaul"])
    process.kill()
    hosts.client.run(["rm", "-rf", "/tmp/etcd"])
    hosts.a.run(["rm", "-r", "/srv/shared/etcd"])


def wait_hung(host: Host) -> int:
    """An agent has reached its point; its PID. With an etcd beside it a busy machine takes its time."""
    wait_until(lambda: hung(host) is not None, f"an agent on host {host.name} hangs", 90.0)
    pid = hung(host)
    assert pid is not None
    return pid


def problem(host: Host) -> str:
    code = "from phaul import arbiter, config\nprint(arbiter.problem(config.load().arbiter))"
    return host.run(["python", "-c", code]).stdout.strip()


def registers(hosts: Hosts) -> int:
    """How many registers there are."""
    code = (
        "from phaul.arbiter import Arbiter, _encoded\nfrom phaul.config import load\n"
        "found = Arbiter(load().arbiter, '')\n"
        "answer = found._post(0, __import__('json').dumps({'success': [{'request_range': {'key': _encoded('phaul/'),"
        "'range_end': _encoded('phaul0')}}]}).encode(), __import__('time').monotonic() + 9)\n"
        "print(answer['responses'][0]['response_range'].get('count', 0))"
    )
    return int(hosts.a.run(["python", "-c", code]).stdout)


def cut_link(hosts: Hosts) -> None:
    """Nothing passes between a and b any more; both reach the client."""
    for host, other in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        host.run(["nft", "add table inet cut"])
        host.run(["nft", "add chain inet cut out { type filter hook output priority 0; }"])
        host.run(["nft", f"add rule inet cut out ip saddr {host.address} ip daddr {other.address} drop"])


def mend_link(hosts: Hosts) -> None:
    for host in (hosts.a, hosts.b):
        host.run(["nft", "delete table inet cut"])


def test_without_trouble_nothing_is_left_of_it(hosts: Hosts, arbiter: Process) -> None:
    scene = Scene.begin(hosts)
    migration = scene.move()
    assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
    assert "claim" in [one["phase"] for one in migration.of("phase")]
    scene.agrees(migration)
    assert registers(hosts) == 0


def test_a_destination_that_was_first_goes_on(hosts: Hosts, arbiter: Process) -> None:
    """COMMIT has come, then nothing more does: it claims the program, and runs it. The source keeps its frozen copy
    until it hears of that."""
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "before work CLAIM", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b)
    cut_link(hosts)
    hosts.b.kill(pid, signal.SIGCONT)
    wait_until(lambda: hosts.b.alive(scene.server.pid), "a copy on b", 10.0)
    migration = scene.answer(process, 120.0)
    assert migration.outcome == "in-doubt", f"{migration}\n{scene.told()}"
    assert "by the arbiter's word the program goes on there" in migration.reason, migration
    scene.server.moved_to(hosts.b)
    scene.client.goes_on("requests", 20.0)
    told = hosts.a.run(["phaul", "status"]).stdout
    assert "does not run here" in told
    mend_link(hosts)
    wait_until(lambda: hosts.a.run(["phaul", "resolve"], check=False).returncode == 0, "it is resolved", 60.0)
    scene.agrees(migration)
    assert registers(hosts) == 0


def test_a_source_that_was_first_goes_on(hosts: Hosts, arbiter: Process) -> None:
    """The destination has COMMIT and hangs: nobody answers. The source revokes, and the late claim finds it so."""
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "before work CLAIM", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b)
    cut_link(hosts)
    migration = scene.answer(process, 120.0)
    assert migration.outcome == "stayed", f"{migration}\n{scene.told()}"
    assert "the arbiter decided for this host" in migration.reason, migration
    scene.client.goes_on("requests", 20.0)
    hosts.b.kill(pid, signal.SIGCONT)
    mend_link(hosts)
    scene.agrees(migration)
    assert registers(hosts) == 0


def test_a_claim_that_finds_the_arbiter_slow_is_made_again(hosts: Hosts, arbiter: Process) -> None:
    """The destination is still reaching for the arbiter when the commit comes, and hangs until its deadline is over."""
    scene = Scene.begin(hosts)
    scene.arm(Role.SOURCE, "before work FREEZE", "hang")
    scene.arm(Role.DESTINATION, "before work CLAIM", "hang")
    process = scene.start()
    source = wait_hung(hosts.a)
    arbiter.send_signal(signal.SIGSTOP)
    hosts.a.kill(source, signal.SIGCONT)
    destination = wait_hung(hosts.b)
    time.sleep(DEADLINE)
    arbiter.send_signal(signal.SIGCONT)
    hosts.b.kill(destination, signal.SIGCONT)
    migration = scene.answer(process, 120.0)
    assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
    scene.agrees(migration)
    assert registers(hosts) == 0


def test_an_arbiter_that_is_down_decides_nothing(hosts: Hosts, arbiter: Process) -> None:
    """It is needed for the preflight; in the switchover, without it, the answer of the destination decides as ever."""
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "before work CLAIM", "hang")
    process = scene.start()
    pid = wait_hung(hosts.b)
    arbiter.send_signal(signal.SIGSTOP)
    hosts.b.kill(pid, signal.SIGCONT)
    migration = scene.answer(process, 120.0)
    assert migration.outcome in ("stayed", "in-doubt"), f"{migration}\n{scene.told()}"
    arbiter.send_signal(signal.SIGCONT)
    wait_until(lambda: hosts.a.run(["phaul", "resolve"], check=False).returncode == 0, "it is resolved", 60.0)
    scene.agrees(migration)
    arbiter.send_signal(signal.SIGSTOP)
    refused = Scene.begin(hosts)
    done = refused.move()
    assert done.exit_status == 20, done
    assert "the arbiter does not answer" in done.reason
    arbiter.send_signal(signal.SIGCONT)
    refused.finish()

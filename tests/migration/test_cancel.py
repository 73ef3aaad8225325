"""Ctrl-C at each step: before the commit the program stays, at once; after it, nothing can be called off, and that is
said. How long it took is a property of each test (`--junitxml FILE -o junit_family=xunit1`); here it is only bounded,
for machines that are busy with much else."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import pytest

from phaul.migration import Role
from tests.faults.scene import RUN, Scene, wait_hung
from tests.hosts import Host, Hosts
from tests.hosts.host import Process
from tests.hosts.migrate import migrate_command, moving_service
from tests.subjects.programs import Subject, start_heap, wait_until

OUT = "/tmp/events"
Note: TypeAlias = Callable[[str, object], None]
BOUND = 10.0
"""Seconds in which it must be over on a machine that is busy with other things too."""


class Command:
    """`phaul migrate --json` on host a, whose events can be read while it runs."""

    def __init__(self, hosts: Hosts, pid: int, *options: str, env: dict[str, str] | None = None) -> None:
        self._host = hosts.a
        words = [*migrate_command(pid, hosts.b, options), "--json", "--yes"]
        self.process: Process = hosts.a.popen(words, stdout=OUT, env=env)

    def events(self) -> list[dict[str, Any]]:
        lines = self._host.path(OUT).read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def wait_for(self, name: str, words: str = "") -> None:
        """Until there is such an event."""
        wait_until(
            lambda: any(one["event"] == name and words in json.dumps(one) for one in self.events()),
            f"an event {name} {words}",
            150.0,
        )

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def ends(self, status: int) -> dict[str, Any]:
        """It ends with this status; the result."""
        assert self.process.wait(BOUND) == status, self.events()
        result = self.events()[-1]
        self._host.run(["rm", OUT])
        assert result["event"] == "result"
        return result

    def ends_cancelled(self, note: Note, released: Callable[[], bool] = lambda: True) -> None:
        """At once, and as the contract says."""
        begun = time.monotonic()
        self.interrupt()
        wait_until(released, "the program goes on", BOUND)
        note("released", round(time.monotonic() - begun, 2))
        result = self.ends(130)
        note("ended", round(time.monotonic() - begun, 2))
        assert result["outcome"] == "cancelled"


@pytest.fixture
def heap(hosts: Hosts) -> Iterator[Subject]:
    """A heap of 16 MiB that is written all the time."""
    subject = start_heap(hosts.a, heap_mib=16)
    yield subject
    subject.goes_on()
    subject.finish()


@contextmanager
def slow_link(host: Host) -> Iterator[None]:
    """4 Mbit/s for what the host sends."""
    limit = ["tbf", "rate", "4mbit", "burst", "32kbit", "latency", "1s"]
    host.run(["tc", "qdisc", "add", "dev", "eth0", "root", *limit])
    try:
        yield
    finally:
        host.run(["tc", "qdisc", "del", "dev", "eth0", "root"])


def remote(hosts: Hosts, script: str) -> dict[str, str]:
    """The environment in which phaul there is this script."""
    hosts.b.run(["sh", "-c", "cat > /tmp/there; chmod 755 /tmp/there"], feed=f"#!/bin/sh\n{script}\n")
    return {"PHAUL_SSH_REMOTE_COMMAND": "/tmp/there", "PHAUL_SSH_CONNECT_TIMEOUT": "50"}


@pytest.mark.parametrize("script", ["exec sleep 60", "sleep 60 | phaul agent --stdio"], ids=["connect", "preflight"])
def test_before_there_is_a_migration(hosts: Hosts, heap: Subject, record_property: Note, script: str) -> None:
    """The other host's phaul does not come up, or does not answer."""
    command = Command(hosts, heap.pid, env=remote(hosts, script))
    wait_until(lambda: any("sleep" in _name(hosts.b, pid) for pid in hosts.b.processes()), "phaul there", 60.0)
    time.sleep(1)
    command.ends_cancelled(record_property)
    for pid in hosts.b.processes():
        if "sleep" in _name(hosts.b, pid):
            hosts.b.kill(pid)
    hosts.b.run(["rm", "/tmp/there"])


def _name(host: Host, pid: int) -> str:
    try:
        return host.path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize("point", ["before work BUILD", "before send PREPARED"])
def test_while_the_destination_prepares(hosts: Hosts, heap: Subject, record_property: Note, point: str) -> None:
    """It has been asked, and does not answer."""
    scene = Scene(hosts)
    scene.arm(Role.DESTINATION, point, "hang")
    command = Command(hosts, heap.pid)
    pid = wait_hung(hosts.b)
    command.ends_cancelled(record_property)
    hosts.b.kill(pid, signal.SIGCONT)
    agents = [pid for pid in hosts.b.processes() if "python" in _name(hosts.b, pid)]
    wait_until(lambda: not any(_name(hosts.b, pid) for pid in agents), "the end of the agent there", 60.0)
    scene.clear()


def test_in_a_long_round_over_a_slow_link(hosts: Hosts, heap: Subject, record_property: Note) -> None:
    with slow_link(hosts.a):
        command = Command(hosts, heap.pid, "--compress", "none")
        command.wait_for("round-progress")
        command.ends_cancelled(record_property)
    _wait_until_gone(hosts, heap.pid)


def test_while_the_last_pages_take_long(hosts: Hosts, heap: Subject, record_property: Note) -> None:
    """--stop-copy sends all of the memory while the program stands."""
    with slow_link(hosts.a):
        command = Command(hosts, heap.pid, "--compress", "none", "--stop-copy", "--max-downtime", "100s")
        command.wait_for("switchover-started")
        wait_until(lambda: _frozen(hosts.a, heap.pid), "the freeze", 30.0)
        time.sleep(1)
        command.ends_cancelled(record_property, lambda: not _frozen(hosts.a, heap.pid))
    _wait_until_gone(hosts, heap.pid)


def _wait_until_gone(hosts: Hosts, pid: int) -> None:
    """The copy, which hears of it behind the pages that are under way, and the agents."""
    wait_until(lambda: not hosts.b.alive(pid), "the end of the copy", 60.0)
    places = [host.path(RUN) for host in (hosts.a, hosts.b)]
    wait_until(lambda: not any(list(place.glob("*.sock")) for place in places), "nobody is at work", 60.0)


def _frozen(host: Host, pid: int) -> bool:
    name = host.path(f"/proc/{pid}/cgroup").read_text().strip().rpartition("/")[2]  # as seen from outside the host
    try:
        return "frozen 1" in host.path(f"/sys/fs/cgroup/{name}/cgroup.events").read_text()
    except FileNotFoundError:  # it has been given back
        return False


def test_a_second_interrupt_says_what_it_would_cost(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.SOURCE, "before work UNDO", "hang")
    command = Command(hosts, scene.server.pid, "--bandwidth", "500K", *moving_service(hosts))
    command.wait_for("round-started")
    command.interrupt()
    pid = wait_hung(hosts.a)
    command.wait_for("notice", "calling it off")
    command.interrupt()
    command.wait_for("notice", "To kill phaul gains nothing")
    hosts.a.kill(pid, signal.SIGCONT)
    assert command.ends(130)["outcome"] == "cancelled"
    assert scene.runs_once() is hosts.a
    scene.finish()


def test_after_the_commit_it_goes_on_or_leaves(hosts: Hosts) -> None:
    scene = Scene.begin(hosts)
    scene.arm(Role.DESTINATION, "before work DETACH", "hang")
    command = Command(hosts, scene.server.pid, *moving_service(hosts))
    pid = wait_hung(hosts.b)
    command.wait_for("committed")
    command.interrupt()
    command.wait_for("notice", "nobody can call that off now")
    command.interrupt()
    result = command.ends(40)
    assert "you left after the commit" in result["reason"]
    assert "phaul status" in result["reason"]
    hosts.b.kill(pid, signal.SIGCONT)
    scene.runs_once()
    scene.finish()

"""`phaul check` and `phaul migrate --dry-run` between two hosts: everything is asked, nothing is touched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import ANY

import pytest

from tests.hosts import Hosts
from tests.hosts.host import Host, Process

LAST_PID = "/proc/sys/kernel/ns_last_pid"
WRITER = "import sys, time; f = open(sys.argv[1], 'a'); print('ready', file=f, flush=True); time.sleep(600)"


@contextmanager
def running(host: Host, *words: str) -> Iterator[Process]:
    process = host.popen(words)
    try:
        yield process
    finally:
        process.stop()


def run(host: Host, *words: str) -> tuple[int, list[dict[str, Any]], str]:
    done = host.run(["phaul", *words, "--json"], check=False, timeout=60)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def dry_run(hosts: Hosts, process: Process, *options: str, user: str = "root") -> tuple[int, dict[str, str], str]:
    """Exit status, findings as {check: text} without the warnings about a host, and the reason."""
    target = f"{user}@{hosts.b.address}"
    status, events, stderr = run(hosts.a, "migrate", str(process.pid), target, "--dry-run", *options)
    assert events, stderr
    assert events[-1]["event"] == "result"
    found = [finding for event in events if event["event"] == "preflight" for finding in event["findings"]]
    mine = {one["check"]: one["text"] for one in found if not one["check"].startswith("host-")}
    return status, mine, events[-1]["reason"]


@pytest.mark.parametrize("user", ["root", "operator"])
def test_a_pair_can_be_checked(hosts: Hosts, user: str) -> None:
    """`operator` has no privileges but sudo -n."""
    status, events, stderr = run(hosts.a, "check", f"{user}@{hosts.b.address}")
    assert status == 0, stderr
    assert [event["event"] for event in events] == ["host", "host", "findings"]
    assert [event["hostname"] for event in events[:2]] == ["host-a", "host-b"]


def test_a_host_can_be_checked_alone(hosts: Hosts) -> None:
    status, events, stderr = run(hosts.a, "check")
    assert status == 0, stderr
    assert [event["event"] for event in events] == ["host", "findings"]
    told = hosts.a.run(["phaul", "check"]).stdout
    assert told.splitlines()[-1] == "programs can move"


@pytest.mark.parametrize("user", ["root", "operator"])
def test_a_program_that_can_move(hosts: Hosts, user: str) -> None:
    with running(hosts.a, "sleep", "600") as process:
        assert dry_run(hosts, process, user=user) == (0, {}, "dry run: nothing stands in the way")
        assert hosts.a.alive(process.pid)


def test_what_the_destination_lacks_or_uses_is_named(hosts: Hosts) -> None:
    hosts.a.run(["cp", "/bin/sleep", "/srv/own/snooze"])
    with running(hosts.a, "/srv/own/snooze", "600") as process:
        status, findings, reason = dry_run(hosts, process)
        assert status == 20
        assert set(findings) == {"file-missing"}
        assert "/srv/own/snooze" in findings["file-missing"]
        assert "it runs here, untouched" in reason
        assert dry_run(hosts, process, "--ship", "missing")[0] == 0

        hosts.b.run(["cp", "/bin/cat", "/srv/own/snooze"])
        status, findings, _ = dry_run(hosts, process, "--ship", "missing")
        assert (status, set(findings)) == (20, {"file-differs"})


@pytest.mark.parametrize(("directory", "status"), [("/srv/shared", 0), ("/srv/own", 20), ("/tmp", 0)])
def test_files_that_are_written_are_on_shared_storage_or_memory(hosts: Hosts, directory: str, status: int) -> None:
    with running(hosts.a, "python3", "-c", WRITER, f"{directory}/log") as process:
        hosts.a.run(["sh", "-c", f"until grep -q ready {directory}/log; do sleep 0.05; done"])
        found = dry_run(hosts, process)
    assert found[0] == status, found
    assert set(found[1]) == ({"file-not-shared"} if status else set())
    assert hosts.a.run(["ls", "-A", directory]).stdout.split() == ["log"]
    hosts.a.run(["rm", f"{directory}/log"])


def test_a_taken_pid_names_its_owner(hosts: Hosts) -> None:
    with running(hosts.a, "sleep", "600") as process:
        before = hosts.b.run(["cat", LAST_PID]).stdout.strip()
        hosts.b.run(["sh", "-c", f"echo {process.pid - 1} > {LAST_PID}"])
        with running(hosts.b, "sleep", "601") as other:
            hosts.b.run(["sh", "-c", f"echo {before} > {LAST_PID}"])  # each host keeps to its own range
            assert other.pid == process.pid
            status, findings, _ = dry_run(hosts, process)
    assert status == 20
    sleep = f"pid {process.pid} (sleep)"
    assert findings["pid-taken"] == f"{sleep} needs number {process.pid}, which {hosts.b.address} uses for {sleep}"


def test_moving_the_address_that_ssh_uses_is_refused(hosts: Hosts) -> None:
    with running(hosts.a, "sleep", "600") as process:
        status, findings, _ = dry_run(hosts, process, "--move-address", f"{hosts.a.address}/24@eth0")
        assert status == 20
        assert set(findings) == {"move-address-channel"}
        assert dry_run(hosts, process, "--move-address", f"{hosts.service}/24@eth0") == (0, {}, ANY)


def test_a_host_without_phaul_is_12(hosts: Hosts) -> None:
    words = ["phaul", "migrate", "2000", hosts.b.address]
    done = hosts.a.run(["env", "PHAUL_SSH_REMOTE_COMMAND=/no/such/phaul", *words], check=False)
    assert (done.returncode, done.stdout) == (12, "")
    assert "phaul deploy" in done.stderr

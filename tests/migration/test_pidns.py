"""`--pidns`: a program whose PIDs are taken at the destination moves into a PID namespace, goes on, and moves back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests.hosts import Host
from tests.hosts.migrate import Migration, migrate
from tests.migration.conftest import Mover
from tests.subjects import jobs
from tests.subjects.programs import start_heap, wait_until

LAST_PID = "/proc/sys/kernel/ns_last_pid"
PATIENT = ["--max-downtime", "5000"]


@contextmanager
def taken(host: Host, pid: int) -> Iterator[None]:
    """Another program has that PID on a host."""
    before = host.run(["cat", LAST_PID]).stdout.strip()
    host.run(["sh", "-c", f"echo {pid - 1} > {LAST_PID}"])
    with host.popen(["sleep", "600"]) as other:
        host.run(["sh", "-c", f"echo {before} > {LAST_PID}"])  # each host keeps to its own range
        assert other.pid == pid
        yield


def outer_pid(migration: Migration, inner: int) -> int:
    """What the operator is told: the number that the destination's other processes know it by."""
    (text,) = [one["text"] for one in migration.of("notice") if "PID namespace" in one["text"]]
    found = re.fullmatch(rf"process {inner} lives in a PID namespace on \S+, where it is process (\d+)", text)
    assert found, text
    return int(found[1])


def numbers(host: Host, pid: int) -> list[str]:
    """The numbers of a process, outermost first, as its host sees them: from its own namespace on."""
    status = host.path(f"/proc/{pid}/status").read_text()
    return next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]


def test_a_tree_moves_beside_its_taken_pid_and_back(mover: Mover) -> None:
    hosts = mover.hosts
    job = jobs.start_python(hosts.a)
    with taken(hosts.b, job.pid):
        refused = migrate(job.pid, hosts.a, hosts.b, PATIENT)
        assert refused.outcome == "refused"
        assert f"needs number {job.pid}" in refused.reason
        assert f"pid {job.pid} (sleep)" in refused.reason
        assert "--pidns" in refused.reason

        moved = migrate(job.pid, hosts.a, hosts.b, [*PATIENT, "--pidns"])
        assert moved.outcome == "migrated", str(moved)
        there = outer_pid(moved, job.pid)
        assert numbers(hosts.b, there)[-1] == str(job.pid)
        assert not hosts.a.alive(job.pid)
        job.host = hosts.b
        job.goes_on()
        inside = hosts.b.run(["nsenter", "-t", str(there), "-m", "-p", "ls", "/proc"]).stdout.split()
        assert {"1", str(job.pid)} <= set(inside)
        assert str(there) not in inside

        back = migrate(there, hosts.b, hosts.a, PATIENT)
        assert back.outcome == "migrated", str(back)
    assert hosts.a.alive(job.pid)
    job.host = hosts.a
    job.goes_on()
    wait_until(lambda: not hosts.b.alive(there), "the copy there is gone")
    hosts.a.kill(job.pid)


def test_signals_and_the_end_go_through_its_init(mover: Mover) -> None:
    """SIGTERM to the namespace's process 1 reaches the program; when that ends, nothing of the namespace is left."""
    hosts = mover.hosts
    subject = start_heap(hosts.a, heap_mib=4)
    moved = migrate(subject.pid, hosts.a, hosts.b, [*PATIENT, "--pidns"])
    assert moved.outcome == "migrated", str(moved)
    there = outer_pid(moved, subject.pid)
    subject.moved_to(hosts.b)
    subject.goes_on()
    init = int(hosts.b.path(f"/proc/{there}/stat").read_text().rpartition(")")[2].split()[1])
    assert hosts.b.path(f"/proc/{init}/comm").read_text() == "phaul-init\n"
    hosts.b.kill(init, 15)
    wait_until(lambda: not hosts.b.alive(init), "the end of the namespace")
    assert not hosts.b.alive(there)
    assert subject.status()["state"] == "pass", subject.status()


def test_a_pipeline_goes_on_forking_in_its_namespace(mover: Mover) -> None:
    """Numbers are given out inside: a shell forks for every line."""
    hosts = mover.hosts
    job = jobs.start_pipeline(hosts.a)
    moved = migrate(job.pid, hosts.a, hosts.b, [*PATIENT, "--pidns"])
    assert moved.outcome == "migrated", str(moved)
    job.host = hosts.b
    job.goes_on()
    there = outer_pid(moved, job.pid)
    again = migrate(there, hosts.b, hosts.a, [*PATIENT, "--pidns"])
    assert again.outcome == "migrated", str(again)
    job.host = hosts.a
    job.goes_on()
    init = int(hosts.a.path(f"/proc/{outer_pid(again, there)}/stat").read_text().rpartition(")")[2].split()[1])
    hosts.a.kill(init)


def test_one_whose_session_leader_has_ended(mover: Mover) -> None:
    """Its session and group keep their numbers, which nobody has."""
    hosts = mover.hosts
    for name in ("pid", "status"):
        hosts.a.path(f"{jobs.DIRECTORY}/leaderless.{name}").unlink(missing_ok=True)
    words = f"/usr/bin/python3 {jobs.SOURCES}/threads_and_child.py {jobs.DIRECTORY}/leaderless.status"
    started = f"{words} </dev/null >/dev/null 2>&1 & echo $! >{jobs.DIRECTORY}/leaderless.pid"
    hosts.a.run(["setsid", "--wait", "sh", "-c", started])
    pid = int(hosts.a.path(f"{jobs.DIRECTORY}/leaderless.pid").read_text())

    def counted(host: Host) -> int:
        number, _, verdict = host.path(f"{jobs.DIRECTORY}/leaderless.status").read_text().partition(" ")
        assert verdict.strip() == "ok"
        return int(number)

    def led(host: Host, pid: int) -> list[int]:
        status = host.path(f"/proc/{pid}/status").read_text()
        lines = [line.split() for line in status.splitlines() if line.startswith(("NSsid:", "NSpgid:"))]
        return [int(line[-1]) for line in lines]

    wait_until(hosts.a.path(f"{jobs.DIRECTORY}/leaderless.status").exists, "it counts")
    before = led(hosts.a, pid)
    assert pid not in before
    assert not any(hosts.a.alive(number) for number in before)
    with taken(hosts.b, before[0]):
        moved = migrate(pid, hosts.a, hosts.b, [*PATIENT, "--pidns"])
        assert moved.outcome == "migrated", str(moved)
    there = outer_pid(moved, pid)
    assert led(hosts.b, there) == before
    count = counted(hosts.b)
    wait_until(lambda: counted(hosts.b) > count + 10, "it goes on")
    hosts.b.kill(there)

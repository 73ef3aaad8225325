"""Containers: programs in namespaces of their own move between the hosts, seen from outside of them."""

from __future__ import annotations

import pytest

from tests.hosts import Host
from tests.hosts.migrate import Migration, migrate
from tests.migration import test_trees as trees
from tests.migration.conftest import Mover
from tests.subjects import jobs
from tests.subjects.jobs import Job

_PATIENT = ["--max-downtime", "5000"]


def _start(host: Host, flags: list[str]) -> tuple[Job, int]:
    """A container, and its process 1 as the host counts."""
    subject = [
        "/usr/bin/python3",
        "-I",
        "-S",
        str(jobs.SOURCES / "contained.py"),
        f"{jobs.DIRECTORY}/contained.status",
    ]
    job = jobs.start(host, "contained", ["unshare", *flags, "--fork", *subject])
    return job, _first(job)


def _first(job: Job) -> int:
    """Process 1 of a container that unshare(1) has made, as its host counts."""
    return int(job.host.path(f"/proc/{job.pid}/task/{job.pid}/children").read_text())


def _moved(migration: Migration) -> int:
    """What the operator is told: the number that the destination's other processes know its process 1 by."""
    assert migration.outcome == "migrated", str(migration)
    (text,) = [one["text"] for one in migration.of("notice") if "PID namespace" in one["text"]]
    return int(text.rsplit(" ", 1)[1])


@pytest.mark.parametrize(
    "flags",
    [["--uts", "--ipc", "--pid", "--cgroup"], ["--uts", "--ipc", "--pid", "--user", "--map-root-user"]],
    ids=["privileged", "unprivileged"],
)
def test_a_container_moves_there_and_back(mover: Mover, flags: list[str]) -> None:
    hosts = mover.hosts
    job, pid = _start(hosts.a, flags)
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        pid = _moved(migrate(pid, source, destination, _PATIENT))
        job.host = destination
        job.goes_on()
    hosts.a.run(["kill", "-9", str(pid)])


def test_a_sandbox_of_bubblewrap_in_a_container(mover: Mover) -> None:
    hosts = mover.hosts
    around = ["unshare", "--uts", "--ipc", "--pid", "--cgroup", "--mount-proc", "--fork", "setsid", *trees.BUBBLEWRAP]
    with trees.running(hosts.a, trees.FORK + trees.IN_BUBBLEWRAP, around=around) as job:
        pid = _first(job)
        for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
            pid = _moved(migrate(pid, source, destination, _PATIENT))
            job.host = destination
            job.goes_on()
        hosts.a.run(["kill", "-9", str(pid)])

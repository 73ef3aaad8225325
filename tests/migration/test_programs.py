"""Real programs move to the other host, and neither they nor their clients notice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.migrate import moving_service
from tests.migration.conftest import Mover
from tests.subjects import jobs
from tests.subjects.jobs import Job
from tests.subjects.programs import wait_until
from tests.subjects.servers import (
    POSTGRES,
    PostgresSession,
    RequestClient,
    Server,
    start_memcached,
    start_nginx,
    start_node,
    start_postgres,
    why_missing,
)

PATIENT = ["--max-downtime", "5000"]
"""For a tree that forks all the while, on a machine that may be busy."""
Start = Callable[[Host, str], Server]


def require(program: str) -> None:
    """Skip the test where a program is not installed."""
    if reason := why_missing(program):
        pytest.skip(reason)


def children(host: Host, pid: int) -> str:
    """The children of a process, proc_tid_children(5)."""
    return host.path(f"/proc/{pid}/task/{pid}/children").read_text()


def move(mover: Mover, pid: int, source: Host, check: Callable[[], None], options: Sequence[str] = ()) -> Host:
    """Move a tree to the other host; `check` that it goes on, the children of its leader being the same. Where it is
    now."""
    before = children(source, pid)
    migration = mover.try_to_move(pid, source, options)
    assert migration.outcome == "migrated", str(migration)
    check()
    assert children(mover.hosts.other(source), pid) == before
    return mover.hosts.other(source)


@pytest.mark.parametrize(
    ("program", "kind", "start", "back"),
    [
        pytest.param("memcached", "memcached", start_memcached, False, id="memcached"),
        pytest.param("nginx", "files", start_nginx, True, id="nginx"),
        pytest.param("nginx", "visits", start_nginx, False, id="nginx-with-new-connections"),
        pytest.param("node", "counter", start_node, False, id="node"),
    ],
)
def test_a_server_under_requests(mover: Mover, program: str, kind: str, start: Start, back: bool) -> None:
    require(program)
    hosts = mover.hosts
    server = start(hosts.a, hosts.service)
    with RequestClient(hosts.client, kind, server, connections=16 if kind == "visits" else 4) as client:
        where = move(mover, server.pid, hosts.a, client.goes_on, moving_service(hosts))
        if back:
            where = move(mover, server.pid, where, client.goes_on, moving_service(hosts))
        assert client.stop()["errors"] == []
    where.kill(server.pid, 15)


def test_connections_end_where_the_program_goes(mover: Mover, hosts: Hosts) -> None:
    """--tcp close: the server and all clients see their end, and new connections are served."""
    require("nginx")
    server = start_nginx(hosts.a, hosts.service)
    with RequestClient(hosts.client, "files", server) as client:
        where = move(mover, server.pid, hosts.a, lambda: None, ["--tcp", "close", *moving_service(hosts)])
        assert len(client.stop()["errors"]) == 4
    with RequestClient(hosts.client, "visits", server) as other:
        other.goes_on()
        assert other.stop()["errors"] == []
    where.kill(server.pid, 15)


@pytest.mark.parametrize(
    ("program", "start"),
    [
        pytest.param("python3", jobs.start_python, id="python"),
        pytest.param("java", lambda host: jobs.start_java(host, "-XX:+PerfDisableSharedMem"), id="java"),
    ],
)
def test_a_program_that_counts(mover: Mover, program: str, start: Callable[[Host], Job]) -> None:
    require(program)
    job = start(mover.hosts.a)
    job.host = move(mover, job.pid, job.host, job.goes_on)
    job.host.kill(job.pid)


def test_a_jvm_with_its_statistics_in_tmp_is_refused(mover: Mover, hosts: Hosts) -> None:
    """/tmp/hsperfdata_USER/PID is a file of this host that other programs map."""
    require("java")
    job = jobs.start_java(hosts.a)
    migration = mover.try_to_move(job.pid, hosts.a)
    assert migration.outcome == "refused"
    assert f"/tmp/hsperfdata_root/{job.pid}" in migration.reason
    job.goes_on()
    job.process.kill()
    hosts.a.run(["rm", "-r", "/tmp/hsperfdata_root"])


def segments(host: Host) -> list[str]:
    """The System V shared memory there."""
    return host.run(["cat", "/proc/sysvipc/shm"]).stdout.splitlines()[1:]


def test_postgres_with_a_session_inside_a_transaction(mover: Mover, hosts: Hosts) -> None:
    """The session's own backend, its locks, and what it has not yet committed."""
    if not Path(POSTGRES).exists():
        pytest.skip("PostgreSQL 15 is not installed")
    server = start_postgres(hosts.a, hosts.service)
    with PostgresSession(hosts.client, server) as session, PostgresSession(hosts.client, server) as other:
        assert session.do("create table t (n int); insert into t select generate_series(1, 1000); select 1")
        session.do("begin; insert into t values (0) returning n")
        backend = session.do("select pg_backend_pid()")
        migration = mover.try_to_move(server.pid, hosts.a, moving_service(hosts))
        assert migration.outcome == "migrated", str(migration)
        assert session.do("select count(*) from t") == "1001"
        assert session.do("select pg_backend_pid()") == backend
        assert other.do("select count(*) from t") == "1000"
        assert session.do("commit; select sum(n) from t") == "500500"
        with PostgresSession(hosts.client, server) as late:  # a new backend attaches the same memory
            assert late.do("select count(*) from t") == "1001"
    assert (segments(hosts.a), len(segments(hosts.b))) == ([], 1)
    hosts.b.kill(server.pid, 2)
    wait_until(lambda: not hosts.b.alive(server.pid), "PostgreSQL shuts down")
    assert segments(hosts.b) == []


def test_a_pipeline_of_a_shell(mover: Mover) -> None:
    """It forks all the while: processes come and go between the rounds and up to the freeze."""
    job = jobs.start_pipeline(mover.hosts.a)
    migration = mover.try_to_move(job.pid, job.host, PATIENT)
    assert migration.outcome == "migrated", str(migration)
    job.host = mover.hosts.b
    job.goes_on()
    numbers = [int(line) for line in job.host.path("/srv/shared/pipeline.numbers").read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
    job.host.run(["kill", "-9", str(job.pid), *children(job.host, job.pid).split()], check=False)  # one ends another


SEGMENT = """
import ctypes, time
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
assert libc.shmat(libc.shmget(0x70686175, 8192, 0o1600), None, 0) != ctypes.c_void_p(-1).value
open("/srv/shared/attached", "a").write("x")
time.sleep(600)
"""


def test_system_v_memory_that_others_use_too_is_refused(mover: Mover, hosts: Hosts) -> None:
    """It could not be in two places."""
    users = [hosts.a.popen(["/usr/bin/python3", "-c", SEGMENT]) for _ in range(2)]
    attached = hosts.a.path("/srv/shared/attached")
    wait_until(lambda: attached.exists() and len(attached.read_text()) == 2, "both have attached it")
    migration = mover.try_to_move(users[0].pid, hosts.a)
    assert migration.outcome == "refused"
    assert "System V shared memory" in migration.reason
    assert "attached 2 times, 1 of them in the tree" in migration.reason
    assert hosts.a.run(["ipcrm", "-M", "0x70686175"]).returncode == 0
    for user in users:
        user.kill()
    assert segments(hosts.a) == []

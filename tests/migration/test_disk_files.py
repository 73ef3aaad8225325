"""Files on disks that the destination does not see are sent with the program that writes them (--ship missing)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.migrate import fault
from tests.subjects.programs import wait_until

from .conftest import Mover

WAYS = ["--ship", "missing", "--max-downtime", "5000", "--yes"]

# It knows what its files hold: a table that is written by pwrite(2), a ring that is written through a mapping, with a
# hole before it, and a log that only grows. Every turn it checks a part of them, by reading.
PROGRAM = """
import mmap, os, struct, time
TABLE, RING, HOLE = 1024, 64, 1 << 30
table = os.open("/srv/own/table", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
os.fchmod(table, 0o640)
os.fchown(table, 12, 34)
os.setxattr(table, "user.kind", b"table")
os.truncate(table, TABLE * 4096 + 77)
reader = os.open("/srv/own/table", os.O_RDONLY)
ring_file = os.open("/srv/own/ring", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
os.truncate(ring_file, HOLE + RING * 4096)
ring = mmap.mmap(ring_file, RING * 4096, offset=HOLE)
log = os.open("/srv/own/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
still = os.open("/srv/own/still", os.O_RDWR | os.O_CREAT, 0o600)
os.write(still, bytes(range(256)) * 4096)
held = {}
turn = 0
while True:
    turn += 1
    page = turn * 7919 % TABLE
    held[page] = turn
    os.pwrite(table, struct.pack("<Q", turn) * 512, page * 4096)
    struct.pack_into("<Q", ring, turn % RING * 4096, turn)
    if turn % 20 == 0:
        os.write(log, b"%d\\n" % turn)
        wanted = "".join(f"{one}\\n" for one in range(20, turn + 1, 20)).encode()
        with open("/srv/own/log", "rb") as file:
            assert file.read() == wanted, "log"
        assert os.fstat(log).st_size == len(wanted)
        for page, value in list(held.items())[-200:]:
            assert os.pread(reader, 4096, page * 4096) == struct.pack("<Q", value) * 512, (page, value)
        for back in range(min(RING, turn)):
            assert struct.unpack_from("<Q", ring, (turn - back) % RING * 4096)[0] == turn - back
        if turn % 200 == 0:
            for page, value in held.items():
                assert os.pread(reader, 4096, page * 4096) == struct.pack("<Q", value) * 512, (page, value)
            assert os.pread(still, 1 << 20, 0) == bytes(range(256)) * 4096
        with open("/srv/shared/turns.new", "w") as file:
            file.write(f"{turn} {os.uname().nodename}")
        os.rename("/srv/shared/turns.new", "/srv/shared/turns")
    time.sleep(0.001)
"""
FILES = ("log", "ring", "still", "table")


@pytest.fixture
def program(hosts: Hosts) -> Iterator[int]:
    """The pid of the program, on host a; wherever it is afterwards, it is ended, and all files removed."""
    started = hosts.a.popen(["/usr/bin/python3", "-c", PROGRAM])
    _goes_on(hosts.a, 0)
    yield started.pid
    (host,) = (one for one in (hosts.a, hosts.b) if one.alive(started.pid))
    host.run(["kill", "-9", str(started.pid)])
    for one in (hosts.a, hosts.b):
        one.run(["sh", "-c", "rm -f /srv/own/*"])
    hosts.a.run(["rm", "/srv/shared/turns"])


def _turns(host: Host) -> int:
    try:
        turns, name = host.path("/srv/shared/turns").read_text().split()
    except (FileNotFoundError, ValueError):
        return 0
    return int(turns) if name == host.run(["uname", "-n"]).stdout.strip() else 0


def _goes_on(host: Host, beyond: int) -> None:
    wait_until(lambda: _turns(host) > beyond + 300, f"it writes and checks on {host.spec.name}", 30.0)


def test_they_move_there_and_back(mover: Mover, hosts: Hosts, program: int) -> None:
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        before = _turns(source)
        migration = mover.try_to_move(program, source, [*WAYS, "--verify"])
        assert migration.outcome == "migrated", str(migration)
        _goes_on(destination, before)
        assert tuple(sorted(destination.run(["ls", "-A", "/srv/own"]).stdout.split())) == FILES
        table, ring = destination.path("/srv/own/table"), destination.path("/srv/own/ring").stat()
        status = table.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 12, 34)
        assert status.st_size == 1024 * 4096 + 77
        assert os.getxattr(table, "user.kind") == b"table"
        assert ring.st_blocks < 8192, "the hole is still one"
        left = source.path("/srv/own/still")
        assert left.stat().st_mtime_ns == destination.path("/srv/own/still").stat().st_mtime_ns


def test_what_stands_in_the_way(mover: Mover, hosts: Hosts, program: int) -> None:
    migration = mover.try_to_move(program, hosts.a, ["--ship", "none"])
    assert (migration.outcome, "--ship missing" in migration.reason) == ("refused", True), str(migration)
    hosts.b.run(["cp", "/bin/true", "/srv/own/table"])
    migration = mover.try_to_move(program, hosts.a, WAYS)
    assert (migration.outcome, "a file of that name is there" in migration.reason) == ("refused", True), str(migration)
    hosts.b.run(["rm", "/srv/own/table"])
    assert mover.try_to_move(program, hosts.a, WAYS).outcome == "migrated"
    _goes_on(hosts.b, 0)
    hosts.a.run(["sh", "-c", "echo changed >> /srv/own/log"])
    migration = mover.try_to_move(program, hosts.b, WAYS)
    assert (migration.outcome, "/srv/own/log" in migration.reason) == ("refused", True), str(migration)


def test_a_migration_that_is_undone_leaves_none(mover: Mover, hosts: Hosts, program: int) -> None:
    with fault(hosts.b, "destination before send READY: error"):
        migration = mover.try_to_move(program, hosts.a, WAYS)
    assert migration.outcome == "stayed", str(migration)
    assert hosts.b.run(["ls", "-A", "/srv/own"]).stdout == ""
    _goes_on(hosts.a, _turns(hosts.a))

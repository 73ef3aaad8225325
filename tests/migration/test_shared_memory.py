"""POSIX shared memory, and other files that are memory of one host, go with the program that uses them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, Hosts
from tests.subjects.programs import wait_until

from .conftest import Mover

PATIENT = ["--max-downtime", "5000"]

# A parent writes pages in turn, a child that maps the same object checks them; both write to a log beside it.
PROGRAM = """
import mmap, os, struct, time
PAGES = 512
fd = os.open("/dev/shm/phaul.ring", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
os.fchmod(fd, 0o640)
os.fchown(fd, 12, 34)
os.ftruncate(fd, PAGES * 4096 + 100)
ring = mmap.mmap(fd, PAGES * 4096)
os.close(fd)
log = os.open("/tmp/phaul.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
parent = os.getpid()
child = os.fork()
last = turn = 0
while True:
    if child:
        turn += 1
        struct.pack_into("<Q", ring, turn % PAGES * 4096 + 8, turn)
        struct.pack_into("<Q", ring, 0, turn)
        if turn % 200 == 0:
            os.write(log, b"%d\\n" % turn)
    elif os.getppid() != parent:
        break
    else:
        now, = struct.unpack_from("<Q", ring, 0)
        assert now >= last, (now, last)
        for at in range(max(1, now - 100), now):
            seen, = struct.unpack_from("<Q", ring, at % PAGES * 4096 + 8)
            assert seen >= at, (at, seen)
        last = now
        with open("/srv/shared/checked.new", "w") as file:
            file.write(f"{last} {os.uname().nodename}")
        os.rename("/srv/shared/checked.new", "/srv/shared/checked")
    time.sleep(0.002)
"""


@pytest.fixture
def program(hosts: Hosts) -> Iterator[int]:
    """The pid of the parent, on host a; wherever it is afterwards, it is ended, and its files removed."""
    started = hosts.a.popen(["/usr/bin/python3", "-c", PROGRAM])
    _goes_on(hosts.a, 0)
    yield started.pid
    (host,) = (one for one in (hosts.a, hosts.b) if one.alive(started.pid))
    host.run(["kill", "-9", str(started.pid)])
    wait_until(lambda: not _alone(host), "the child ends too")
    host.run(["rm", "/dev/shm/phaul.ring", "/tmp/phaul.log", "/srv/shared/checked"])


def _alone(host: Host) -> bool:
    """Whether the child runs without its parent."""
    return "phaul.ring" in host.run(["sh", "-c", "cat /proc/[0-9]*/cmdline"], check=False).stdout


def _checked(host: Host) -> int:
    try:
        return int(host.path("/srv/shared/checked").read_text().split()[0])
    except (FileNotFoundError, IndexError):
        return 0


def _goes_on(host: Host, beyond: int) -> None:
    wait_until(lambda: _checked(host) > beyond + 100, "the child checks what its parent writes")


def _files(host: Host) -> list[Path]:
    return [path for path in (host.path("/dev/shm/phaul.ring"), host.path("/tmp/phaul.log")) if path.exists()]


def test_posix_shared_memory_moves_there_and_back(mover: Mover, hosts: Hosts, program: int) -> None:
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        before = _checked(source)
        migration = mover.try_to_move(program, source, [*PATIENT, "--verify"])
        assert migration.outcome == "migrated", str(migration)
        _goes_on(destination, before)
        wait_until(lambda host=source: not _files(host), "the source's names are gone")  # type: ignore[misc]
        ring, log = _files(destination)
        status = ring.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 12, 34)
        assert status.st_size == 512 * 4096 + 100
        numbers = [int(line) for line in log.read_text().splitlines()]
        assert numbers == list(range(200, 200 * len(numbers) + 1, 200))
        assert "/dev/shm/phaul.ring\n" in destination.run(["cat", f"/proc/{program}/maps"]).stdout
        assert not [name for name in destination.run(["ls", "-A", "/dev/shm"]).stdout.split() if name.startswith(".")]


def test_memory_that_others_use_or_whose_name_is_taken_stays(mover: Mover, hosts: Hosts, program: int) -> None:
    reader = hosts.a.popen(["/usr/bin/tail", "-f", "/tmp/phaul.log"])
    wait_until(lambda: "phaul.log" in hosts.a.run(["ls", "-l", f"/proc/{reader.pid}/fd"]).stdout, "it is read")
    migration = mover.try_to_move(program, hosts.a)
    assert migration.outcome == "refused"
    assert f"pid {reader.pid} (tail) uses it too" in migration.reason
    reader.kill()
    hosts.b.run(["touch", "/dev/shm/phaul.ring"])
    migration = mover.try_to_move(program, hosts.a)
    assert migration.outcome == "refused"
    assert "a file of that name is on" in migration.reason
    before = _checked(hosts.a)
    _goes_on(hosts.a, before)
    hosts.b.run(["rm", "/dev/shm/phaul.ring"])

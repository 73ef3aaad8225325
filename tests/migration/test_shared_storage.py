"""Programs that use storage which both hosts see."""

from __future__ import annotations

from tests.hosts import Host
from tests.migration.conftest import Mover
from tests.subjects import jobs

PATIENT = ["--max-downtime", "5000"]
_LOCKER = """
import fcntl, os, struct, sys, time
posix, flock, ofd = (open(f"/srv/shared/locked.{name}", "w") for name in ("posix", "flock", "ofd"))
fcntl.lockf(posix, fcntl.LOCK_EX)
fcntl.flock(flock, fcntl.LOCK_EX)
fcntl.fcntl(ofd, 37, struct.pack("hhxxxxqqixxxx", fcntl.F_WRLCK, 0, 0, 0, 0))
count = 0
while True:
    count += 1
    with open("/srv/shared/locker.new", "w") as file:
        file.write(f"{count} ok")
    os.rename("/srv/shared/locker.new", "/srv/shared/locker.status")
    time.sleep(0.01)
"""
_TRY = """
import fcntl, sys
for name, lock in (("posix", fcntl.lockf), ("flock", fcntl.flock), ("ofd", fcntl.lockf)):
    try:
        lock(open(f"/srv/shared/locked.{name}", "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        continue
    print(name)
"""


def _free(host: Host) -> list[str]:
    """Which of the locks somebody else can have."""
    return host.run(["python3", "-c", _TRY]).stdout.split()


def test_locks_move_there_and_back(mover: Mover) -> None:
    hosts = mover.hosts
    job = jobs.start(hosts.a, "locker", ["python3", "-c", _LOCKER])
    try:
        for source in (hosts.a, hosts.b):
            migration = mover.try_to_move(job.pid, source, PATIENT)
            assert migration.outcome == "migrated", str(migration)
            job.goes_on()
            assert _free(hosts.a) == _free(hosts.b) == []
    finally:
        for host in (hosts.a, hosts.b):
            if host.alive(job.pid):
                host.kill(job.pid, 9)

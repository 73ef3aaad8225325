"""What a run of the tests owns on this machine, so that a run that was killed can be cleared away by the next.

A lease is a directory under /var/tmp/phaul-tests with a lock that its owner holds, and one cgroup in which everything
that the owner starts lives. A lease whose lock can be taken has lost its owner: its processes are killed through the
cgroup and its files removed. A lease that is kept (`python -m tests.hosts up`) has no owner and stays until `down`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts import cgroups

LEASES = Path("/var/tmp/phaul-tests")


@dataclass
class Lease:
    """One owner's directory, lock and cgroup."""

    name: str
    lock: int = -1
    cgroup: Path = field(init=False)
    """Outside any host: the cgroup2 directory of everything that belongs to this lease."""

    def __post_init__(self) -> None:
        try:
            self.cgroup = Path((self.directory / "cgroup").read_text())
        except FileNotFoundError:
            self.cgroup = cgroups.own_cgroup() / f"tests-{self.name}"

    @property
    def directory(self) -> Path:
        """Where the lease keeps its files."""
        return LEASES / self.name

    @property
    def kept(self) -> bool:
        """Whether it lives without an owner."""
        return (self.directory / "kept").exists()

    def make(self, *, keep: bool = False) -> None:
        """Take the lease; raises BlockingIOError when another process owns one of that name."""
        while self.lock < 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self.acquire()
        (self.directory / "cgroup").write_text(str(self.cgroup))
        if keep:
            (self.directory / "kept").touch()
        self.cgroup.mkdir(exist_ok=True)

    def acquire(self) -> None:
        """Take the lock; raises BlockingIOError when somebody has it, FileNotFoundError when the lease is gone."""
        path = self.directory / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino != os.fstat(lock).st_ino:  # swept between open and flock
                raise FileNotFoundError(path)
        except OSError:
            os.close(lock)
            raise
        self.lock = lock

    def release(self) -> None:
        """Kill everything in it and remove it; once more is no mistake."""
        cgroups.remove(self.cgroup)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.unlock()

    def unlock(self) -> None:
        """Let go of the lock only: what a kept lease's maker does."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def leases() -> list[Lease]:
    """All there are, dead or alive."""
    return [Lease(path.name) for path in sorted(LEASES.glob("*")) if path.is_dir()]


def alone() -> bool:
    """Whether at most one owner is at work on this machine, so that what is left over can only be its own."""
    return len([lease for lease in leases() if not lease.kept]) <= 1


def sweep() -> list[str]:
    """Clear away the leases whose owners died; their names."""
    gone = []
    for lease in leases():
        if lease.kept:
            continue
        try:
            lease.acquire()
        except (BlockingIOError, FileNotFoundError):
            continue
        lease.release()
        gone.append(lease.name)
    return gone

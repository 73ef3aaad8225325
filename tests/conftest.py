"""Fixtures of all tests: a place that belongs to this run, two hosts and a client, the auditor."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings

from tests.hosts import HostError, Hosts, cgroups, missing, up
from tests.hosts.audit import audit, audit_hosts, machine_scope, settled
from tests.hosts.lease import Lease, sweep
from tests.hosts.syscalls import CLONE_NEWIPC, CLONE_NEWNET, unshare

settings.register_profile("loaded machine", deadline=None)  # a test may wait for a processor for any time
settings.load_profile("loaded machine")

_NOT_JUDGED = ("/proc/", "/sys/fs/cgroup/", "/dev/shm/pym-", "/var/tmp/phaul-tests/")
"""Of files that this process has open: handles of processes and cgroups that are gone, multiprocessing's, a lease's."""


def pytest_sessionstart() -> None:
    """Subjects that are forked are to have no socket of pytest's plugins, which talk between its processes."""
    theirs = [number for number in _descriptors() if number > 2 and stat.S_ISSOCK(os.fstat(number).st_mode)]

    def close() -> None:
        while theirs:  # once: in children of children these numbers are others'
            os.close(theirs.pop())

    os.register_at_fork(after_in_child=close)


@dataclass
class Workplace:
    """Where this run works: a cgroup that it and all its children are in, its own network (loopback only) and IPC
    namespace. So ports, links and filters are nobody else's, and what a test leaves behind can be told apart."""

    lease: Lease
    before: set[str] = field(default_factory=set)
    """What the auditor saw at last."""

    def look(self) -> set[str]:
        """What the auditor sees now."""
        return audit(machine_scope(self.lease.cgroup)) | set(_open_files())


def _descriptors() -> list[int]:
    """Those of this process, without the listing's own."""
    return [number for number in map(int, os.listdir("/proc/self/fd")) if _is_open(number)]


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _open_files() -> Iterator[str]:
    """The files and directories that this process has open: every process that a later test forks has them too."""
    for number in (number for number in _descriptors() if number > 2):  # those are pytest's
        with suppress(OSError):  # closed meanwhile
            mode = os.stat(number).st_mode
            path = os.readlink(f"/proc/self/fd/{number}")
            if (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and not path.startswith(_NOT_JUDGED):
                yield f"descriptor {number} of this process is open: {path}"


@pytest.fixture(scope="session")
def workplace() -> Iterator[Workplace]:
    """This run's own place; tests that need it are skipped without root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    sweep()
    home = cgroups.own_cgroup()
    lease = Lease(f"session-{os.getpid()}")
    lease.make()
    cgroups.enter(lease.cgroup)
    unshare(CLONE_NEWNET | CLONE_NEWIPC)
    _loopback_up()
    yield Workplace(lease)
    cgroups.enter(home)
    lease.release()


def _loopback_up() -> None:
    """Set IFF_UP on lo of the new network namespace: netdevice(7)."""
    import fcntl
    import socket
    import struct

    siocsifflags, iff_up_running = 0x8914, 0x41
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, siocsifflags, struct.pack("16sh14x", b"lo", iff_up_running))


@pytest.fixture
def audited(workplace: Workplace) -> Iterator[None]:
    """Fail a test that leaves something behind, naming it. Autouse in kernel, migration and faults."""
    workplace.before = workplace.look()
    yield
    before = workplace.before
    left = settled(lambda: workplace.look() - before)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(sorted(left)), pytrace=False)


class StandingHosts:
    """The hosts that tests take turns with: made when first asked for, and again when beyond repair."""

    def __init__(self) -> None:
        self.name = f"run-{os.getpid()}"
        self.hosts: Hosts | None = None

    def get(self) -> Hosts:
        """They are up and clean."""
        if self.hosts is None:
            self.hosts = up(self.name)
        return self.hosts

    def clean(self) -> None:
        """Put them back; hosts that stay dirty, or do not answer any more, are removed."""
        try:
            hosts = self.get()
            hosts.reset()
            dirty = bool(audit_hosts(hosts))
        except (OSError, HostError):
            dirty = True
        if dirty:
            self.remove()

    def remove(self) -> None:
        """Remove them."""
        if self.hosts is not None:
            self.hosts.lease.release()
            self.hosts = None


@pytest.fixture(scope="session")
def standing_hosts(workplace: Workplace) -> Iterator[StandingHosts]:
    """What `hosts` hands out."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    standing = StandingHosts()
    yield standing
    standing.remove()


@pytest.fixture
def hosts(standing_hosts: StandingHosts) -> Iterator[Hosts]:
    """Two hosts and a client, clean; audited afterwards, and cleaned whatever the outcome."""
    hosts = standing_hosts.get()
    yield hosts
    try:
        left = settled(lambda: audit_hosts(hosts))
    finally:
        standing_hosts.clean()
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(sorted(left)), pytrace=False)


@pytest.fixture(scope="session")
def peers() -> Path:
    """The directory with other implementations to compare with: PHAUL_PEERS, or ../shared/peers."""
    directory = Path(os.environ.get("PHAUL_PEERS", Path(__file__).parents[2] / "shared" / "peers"))
    if not directory.is_dir():
        pytest.skip(f"no peers to compare with at {directory}: set PHAUL_PEERS")
    return directory

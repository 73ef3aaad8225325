"""Two hosts and a client on one machine: made, found again, removed.

    with two_hosts() as hosts:
        hosts.a.run(["hostname"])

They need root, iproute2 and openssh-server. Making takes about a second, removing a quarter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import cgroups
from tests.hosts.accounts import write_accounts
from tests.hosts.host import Host, HostError, virtual_environment
from tests.hosts.lease import Lease, sweep
from tests.hosts.rootfs import REPOSITORY
from tests.hosts.spec import HOSTS, PREFIX4, SERVICE4, SERVICE6

START_TIMEOUT = 20.0


@dataclass
class Hosts:
    """The three, and what they share."""

    a: Host
    b: Host
    client: Host
    lease: Lease

    service = SERVICE4
    """The IPv4 address that can move; a has it at first."""
    service6 = SERVICE6
    service_prefix = PREFIX4

    @property
    def shared(self) -> Path:
        """The directory that all of them see as /srv/shared, from outside."""
        return self.lease.directory / "shared"

    def __iter__(self) -> Iterator[Host]:
        return iter((self.a, self.b, self.client))

    def other(self, host: Host) -> Host:
        """b for a, a for b."""
        return self.b if host is self.a else self.a

    def reset(self) -> None:
        """Everything as it was at first, in about 50 ms: no programs, empty directories, addresses back."""
        for host in self:
            host.reset()
        for path in self.shared.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def missing() -> str | None:
    """Why hosts cannot be made here; None when they can."""
    if os.geteuid() != 0:
        return "test hosts need root"
    for program, package in (
        ("ip", "iproute2"),
        ("/usr/sbin/sshd", "openssh-server"),
        ("ssh-keygen", "openssh-client"),
    ):
        if shutil.which(program) is None:
            return f"test hosts need {package}: apt-get install {package}"
    return None


def _start(lease: Lease, process_1: str) -> Hosts:
    state = lease.directory
    (state / "shared").mkdir()
    write_accounts(state)
    for spec in HOSTS:
        (lease.cgroup / spec.name).mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from tests.hosts.holder import main; main(*sys.argv[1:])"
    )
    with (state / "holder.log").open("wb") as log:
        holder = subprocess.Popen(
            [virtual_environment() / "bin" / "python", "-S", "-E", "-B", "-c", code, state, lease.cgroup, process_1],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: cgroups.enter(lease.cgroup),
        )
    # An editable installation builds itself upon import: here and now, not on the hosts.
    subprocess.run([virtual_environment() / "bin" / "python", "-c", "import phaul_engine"], check=True)
    deadline = time.monotonic() + START_TIMEOUT
    while not all((state / spec.name / "up").exists() for spec in HOSTS):
        if holder.poll() is not None or time.monotonic() > deadline:
            raise HostError(
                f"the hosts did not start: {(state / 'holder.log').read_text().strip() or 'no reason given'}"
            )
        time.sleep(0.005)
    holder.returncode = 0  # it is ended through its cgroup, and nobody waits for it by this object
    return attach(lease.name)


def up(name: str, *, keep: bool = False, systemd: bool = False) -> Hosts:
    """Make the hosts of that name; those of a dead owner are cleared away first. With `systemd`, that is process 1 of a
    and b; such hosts cannot be reset.

    Raises HostError when they do not start, BlockingIOError when a living owner has some of that name.
    """
    reason = missing()
    if reason:
        raise HostError(reason)
    sweep()
    lease = Lease(name)
    lease.make(keep=keep)
    try:
        return _start(lease, "systemd" if systemd else "")
    except BaseException:
        lease.release()
        raise


def attach(name: str) -> Hosts:
    """The running hosts of that name; HostError when there are none."""
    lease = Lease(name)
    try:
        pids = json.loads((lease.directory / "ready.json").read_text())
    except FileNotFoundError:
        raise HostError(f"no hosts of the name {name!r} are up") from None
    made = [Host(spec, lease.directory, pids[spec.name], lease.cgroup / spec.name) for spec in HOSTS]
    return Hosts(made[0], made[1], made[2], lease)


def down(name: str) -> None:
    """Remove the hosts of that name, whoever made them; once more is no mistake."""
    lease = Lease(name)
    if lease.directory.exists():
        lease.release()


@contextmanager
def two_hosts(name: str | None = None, *, systemd: bool = False) -> Iterator[Hosts]:
    """Hosts for the length of a `with`; removed whatever happens, and by the next run if this one is killed."""
    name = name or f"run-{os.getpid()}"
    hosts = up(name, systemd=systemd)
    lease = hosts.lease
    try:
        yield hosts
    finally:
        lease.release()


def interactive_shell(host: Host) -> int:
    """A shell on the caller's terminal inside the host; its exit status."""
    command = ["nsenter", "-t", str(host.init_pid), "-a", "-w/", os.environ.get("SHELL", "/bin/bash")]
    environment = host.environment | {"TERM": os.environ.get("TERM", "dumb"), "PS1": f"{host.name}# "}
    enter = cgroups.enter
    return subprocess.call(command, env=environment, preexec_fn=lambda: enter(host.cgroup))

"""The auditor: what a test, or a migration, has left behind.

It looks at the processes of one cgroup, the network namespace it runs in, and the directories of phaul, and names
everything that should not be there: inside a host in a child of its process 1 (`Host.audit`), on the machine itself in
the tests' process, where only what belongs to this run of the tests is judged.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.hosts import cgroups, lease, netlink, rootfs

if TYPE_CHECKING:
    from tests.hosts.lab import Hosts

TCP_REPAIR = 19
SYS_PIDFD_GETFD = 438
_ENDED = re.compile(rb'"ended":[1-9]')
STATE_DIRECTORIES = ("/run/phaul", "/var/lib/phaul")
KEPT = ("/run/phaul/sleeps", "/run/phaul/seal")  # what is known of sleeping threads
SETTLE = 10.0
"""Seconds that agents and links have to go away after a test, on a machine that is busy with much else."""


@dataclass(frozen=True)
class Scope:
    """What to judge: the cgroup `top` with all below except sub-trees named tests-* (hosts, which are judged by
    themselves), without the processes in `spared`; directories in which every file counts, and those in which only
    names beginning with phaul do."""

    top: Path
    spared: frozenset[int] = frozenset()
    directories: tuple[str, ...] = ()
    shared_directories: tuple[str, ...] = ()


def _cgroups(top: Path) -> list[Path]:
    found = []
    for directory, names, _ in os.walk(top):
        names[:] = [name for name in names if not name.startswith("tests-")]
        found.append(Path(directory))
    return found


def _pids(groups: Iterable[Path]) -> list[int]:
    found: list[int] = []
    for group in groups:
        with suppress(OSError):  # removed meanwhile
            found += [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    return found


def _status(pid: int, tid: int) -> dict[str, str]:
    """The fields of /proc/PID/task/TID/status; empty once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/task/{tid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _check_cgroups(groups: list[Path], top: Path) -> Iterable[str]:
    for group in groups:
        try:
            frozen = group != top and (group / "cgroup.freeze").read_text().strip() == "1"
            count = len((group / "cgroup.procs").read_text().split())
        except FileNotFoundError:
            continue
        name = f"cgroup {group.relative_to(top)} ({count} processes)"
        if group.name.startswith("phaul-"):
            yield f"{name} is left"
        if frozen:
            yield f"{name} is frozen"


def _check_processes(pids: list[int], spared: frozenset[int]) -> Iterable[str]:
    for pid in pids:
        leader = _status(pid, pid)
        if not leader or leader["State"].startswith(("Z", "X")):
            continue
        name = f"process {pid} ({leader['Name']})"
        if pid not in spared:
            yield f"{name} still runs"
        tasks: list[str] = []
        with suppress(FileNotFoundError, ProcessLookupError):
            tasks = os.listdir(f"/proc/{pid}/task")
        for tid in tasks:
            status = _status(pid, int(tid))
            if status.get("TracerPid", "0") != "0":
                yield f"{name}: task {tid} is traced by {status['TracerPid']}"
            if status.get("State", "").startswith("t"):
                yield f"{name}: task {tid} is in a tracing stop"


def _tcp_inodes() -> set[str]:
    """The socket inodes of every TCP socket of this network namespace."""
    found = set()
    for name in ("tcp", "tcp6"):
        with suppress(FileNotFoundError):
            lines = Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]
            found |= {line.split()[9] for line in lines}
    return found - {"0"}


def _in_repair(pid: int, fd: int) -> bool:
    """Whether that TCP socket of that process is in repair mode, asked of a duplicate."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        duplicate = libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
        if duplicate < 0:
            return False
        with socket.socket(fileno=duplicate) as sock:
            return sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR) != 0
    except OSError:
        return False
    finally:
        os.close(pidfd)


def _check_repair(pids: list[int]) -> Iterable[str]:
    inodes = _tcp_inodes()
    for pid in pids if inodes else []:
        with suppress(FileNotFoundError, ProcessLookupError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    target = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if target.startswith("socket:[") and target[8:-1] in inodes and _in_repair(pid, int(fd)):
                        yield f"socket {fd} of process {pid} is in TCP repair"


def _check_network() -> Iterable[str]:
    """Everything beside lo and eth0; the caller subtracts what was there before."""
    links = netlink.links()
    for index, name in links.items():
        if name not in ("lo", "eth0"):
            yield f"link {name} is left"
        for text in netlink.tcx_programs(index):
            yield f"link {name} has TCX {text}"
    for index in netlink.ingress_qdiscs():
        yield f"link {links.get(index, index)} has an ingress or clsact qdisc"
        for text in netlink.filters(index):
            yield f"link {links.get(index, index)} has filter {text}"
    for table in netlink.nft_tables():
        yield f"nftables table {table} is left"
    for family in ("ip", "ip6"):
        with suppress(FileNotFoundError):
            for table in Path(f"/proc/self/net/{family}_tables_names").read_text().split():
                yield f"{family}tables table {table} is in use"
    for line in Path("/proc/self/net/packet").read_text().splitlines()[1:]:
        yield f"packet socket (protocol {line.split()[3]}, link {line.split()[4]}) is open"


def _is_history(path: Path) -> bool:
    """Whether it is the journal of a migration that has ended on this side, or what is known of sleeping threads: those
    are kept."""
    if str(path) in KEPT:
        return True
    return path.suffix in (".source", ".destination") and bool(_ENDED.search(path.read_bytes()))


def _check_files(scope: Scope) -> Iterable[str]:
    for directory in scope.directories:
        for path in sorted(Path(directory).glob("*")):
            if any(seen.is_relative_to(path) for seen in rootfs.needed()) or _is_history(path):
                continue
            said = f": {path.read_text(errors='replace')[-600:]}" if path.suffix == ".log" else ""
            yield f"file {path} is left{said}"
    for directory in scope.shared_directories:
        for path in sorted(Path(directory).glob("phaul*")):
            yield f"file {path} is left"


def audit(scope: Scope) -> set[str]:
    """Everything in `scope` that an idle host has not."""
    groups = _cgroups(scope.top)
    pids = [pid for pid in _pids(groups) if pid not in (0, os.getpid())]
    found = set(_check_cgroups(groups, scope.top))
    found |= set(_check_processes(pids, scope.spared))
    found |= set(_check_repair(pids))
    found |= set(_check_network())
    found |= set(_check_files(scope))
    return found


def settled(look: Callable[[], set[str]], timeout: float = SETTLE) -> set[str]:
    """What `look` still finds after at most `timeout` seconds; at once when that is nothing."""
    deadline = time.monotonic() + timeout
    pause = 0.01
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(pause * 2, 0.2)
    return found


def machine_scope(top: Path) -> Scope:
    """What this run of the tests may have left on the machine; files only where no other run can have made them."""
    shared = (*STATE_DIRECTORIES, "/tmp") if lease.alone() else ()
    return Scope(top, frozenset({os.getpid()}), (), shared)


def audit_hosts(hosts: Hosts) -> set[str]:
    """What is left on the hosts, and whether exactly one of them has the service address."""
    found = {line for host in hosts for line in host.audit()}
    for address in (f"{hosts.service}/{hosts.service_prefix}", f"{hosts.service6}/64"):
        holders = [host.name for host in hosts if address in host.addresses()]
        if len(holders) != 1:
            found.add(f"service address {address} is on {' and '.join(holders) or 'no host'}")
    return found


def inside() -> list[str]:
    """On a host, in a child of its process 1: what is left. Process 1 and the listening sshd belong there."""
    top = cgroups.unified_mount()
    spared = {1}
    for pid in _pids([top]):
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"[listener]" in Path(f"/proc/{pid}/cmdline").read_bytes():
                spared.add(pid)
    return sorted(audit(Scope(top, frozenset(spared), (*STATE_DIRECTORIES, "/tmp"))))

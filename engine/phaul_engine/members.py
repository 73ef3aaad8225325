"""The processes of a stopped tree during one pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .inquiry import standing
from .objects.base import Owner
from .proc.access import open_at, open_thread
from .proc.maps import Area
from .proc.stat import Stat, read_stat
from .proc.status import Status, Statuses, read_status
from .program import Results
from .target import Process, Thread


class Seen(NamedTuple):
    """What has been read of a stopped process before a pass: its stat, and the text of /proc/PID/maps."""

    stat: Stat
    maps: bytes


@dataclass
class Member:
    """A process of the tree during one pass."""

    process: Process
    stat: Stat
    status: Status
    owner: Owner
    pidfd: int
    number: int = 0  # of what it shares with nobody, in the images
    memory: int = 0  # of its address space
    files: int = 0  # of its descriptor table: that of another process if they share it
    fs: int = 0  # of its directories and umask, likewise
    areas: list[Area] = field(default_factory=list)
    inner_tids: dict[int, int] = field(default_factory=dict)
    names: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of threads that have more than one number
    level: int = 0  # how many pid namespaces there are above the tree's, as far as we see

    @property
    def numbers(self) -> tuple[int, ...]:
        """What it is called in the pid namespace of the tree, and in those below that it is in."""
        return self.status.ns_pid[self.level :]

    @property
    def nested(self) -> bool:
        """Whether it is in a pid namespace below the tree's."""
        return len(self.numbers) > 1

    @property
    def sid(self) -> int:
        """Its session, as the tree's pid namespace calls it."""
        return self.status.ns_sid[self.level]

    @property
    def pgid(self) -> int:
        """Its process group, likewise."""
        return self.status.ns_pgid[self.level]

    @property
    def pid(self) -> int:
        """Its number in our pid namespace."""
        return self.process.pid


@contextlib.contextmanager
def opened(process: Process, level: int | None, statuses: Statuses, seen: Seen | None = None) -> Iterator[Member]:
    """A process, with the descriptors that a pass needs of it. For `level` see there; None for the first of a tree,
    whose own pid namespace that is. `seen` is what is known of it in this stop."""
    stat, status = read_stat(process.proc) if seen is None else seen.stat, statuses.read(process.pid, process.proc)
    if level is None:
        level = len(status.ns_pid) - 1
    with contextlib.ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        root = net = pidfd = -1
        if not process.zombie:
            root = keep(open_at(process.proc, "root", os.O_PATH | os.O_DIRECTORY))
            net = keep(open_at(process.proc, "ns/net"))
            pidfd = keep(os.pidfd_open(process.pid))
        owner = Owner(process.pid, status.ns_pid[level], stat.comm, process.proc, root, net, start=stat.start)
        yield Member(process, stat, status, owner, pidfd, level=level)


def name_threads(member: Member, answers: dict[int, Results]) -> None:
    """Threads say what number they have in their own pid namespace; of dead ones, and of those that have several, /proc
    says so."""
    for thread in member.process.threads:
        if thread.tid == member.pid:
            member.inner_tids[thread.tid] = member.owner.inner_pid
            if member.nested:
                member.names[thread.tid] = member.numbers
        elif thread.zombie or member.nested:
            numbers = _read_name(member, thread)
            member.inner_tids[thread.tid] = numbers[0]
            if member.nested:
                member.names[thread.tid] = numbers
        else:
            asked = standing(thread is member.process.driver).tid
            member.inner_tids[thread.tid] = answers[thread.tid].answer(asked)


def read_name(member: Member, thread: Thread) -> int:
    """The number of a thread in the tree's pid namespace, as /proc says."""
    return member.owner.inner_pid if thread.tid == member.pid else _read_name(member, thread)[0]


def _read_name(member: Member, thread: Thread) -> tuple[int, ...]:
    directory = open_thread(member.process.proc, thread.tid)
    try:
        return read_status(directory).ns_pid[member.level :]
    finally:
        os.close(directory)

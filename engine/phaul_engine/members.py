"""The processes of a stopped tree during one pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from .inquiry import standing
from .objects.base import Owner
from .proc.access import open_at, open_thread
from .proc.maps import Area
from .proc.stat import Stat, read_stat
from .proc.status import Status, read_status
from .program import Results
from .target import Process, Thread


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

    @property
    def pid(self) -> int:
        """Its number in our pid namespace."""
        return self.process.pid


@contextlib.contextmanager
def opened(process: Process) -> Iterator[Member]:
    """A process, with the descriptors that a pass needs of it."""
    stat, status = read_stat(process.proc), read_status(process.proc)
    with contextlib.ExitStack() as stack:

        def keep(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        root = net = pidfd = -1
        if not process.zombie:
            root = keep(open_at(process.proc, "root", os.O_PATH | os.O_DIRECTORY))
            net = keep(open_at(process.proc, "ns/net"))
            pidfd = keep(os.pidfd_open(process.pid))
        owner = Owner(process.pid, status.inner_pid, stat.comm, process.proc, root, net)
        member = Member(process, stat, status, owner, pidfd)
        yield member


def name_threads(member: Member, answers: dict[int, Results]) -> None:
    """Threads say what number they have in their own pid namespace; of dead ones /proc says so."""
    for thread in member.process.threads:
        if thread.tid == member.pid:
            member.inner_tids[thread.tid] = member.owner.inner_pid
        elif not thread.zombie:
            asked = standing(thread is member.process.driver).tid
            member.inner_tids[thread.tid] = answers[thread.tid].answer(asked)
        else:
            member.inner_tids[thread.tid] = read_name(member, thread)


def read_name(member: Member, thread: Thread) -> int:
    """The number of a thread in its own pid namespace, as /proc says."""
    if thread.tid == member.pid:
        return member.owner.inner_pid
    directory = open_thread(member.process.proc, thread.tid)
    try:
        return read_status(directory).inner_pid
    finally:
        os.close(directory)

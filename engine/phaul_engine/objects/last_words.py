"""What the kernel would write in the name of a skeleton's threads if they died before the commit: nothing.

When a thread ends, the kernel marks the locks of its robust list as its owner's death and zeroes its tid word
(get_robust_list(2), set_tid_address(2); Linux kernel/futex/core.c). Where those stand in a file that the program at the
source maps as well, it would hear of a death that concerns only a copy. A process that maps no file for writing through
has nobody to tell.

A robust list begins in memory of the thread's own. Its head says "empty" until the commit is written; then what was
there is put back, while a frozen cgroup holds the task: by us, or by whoever finds the journal's entry. A tid word or a
head that itself stands in shared memory is told to the kernel late, in the last moment before the tasks are let go of.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from phaul_engine.cgroup import Hierarchy, Hold, HoldGoneError
from phaul_engine.images.pb import core_pb2, vma_pb2
from phaul_engine.syscalls import NR

from .address_space import Status

KIND = "robust-lists"

Ranges = tuple[tuple[int, int], ...]

_HEAD = struct.Struct("<QqQ")  # struct robust_list_head: list.next, futex_offset, list_op_pending


def written(vmas: Iterable[vma_pb2.vma_entry]) -> Ranges:
    """Where a process writes to files: start and end of each area."""
    return tuple((vma.start, vma.end) for vma in vmas if vma.status & Status.FILE_SHARED)


def within(address: int, ranges: Ranges) -> bool:
    """Whether an address is in one of them."""
    return any(start <= address < end for start, end in ranges)


class Head(NamedTuple):
    """A robust list's head as it is to be: the process (our number), its address, list.next and list_op_pending."""

    pid: int
    address: int
    next: int
    pending: int


@dataclass
class LastWords:
    """Those of one skeleton. `late` are calls that threads make in the last moment: (process, thread) by the numbers in
    the images, system call, arguments."""

    heads: list[Head] = field(default_factory=list)
    late: list[tuple[tuple[int, int], NR, list[int]]] = field(default_factory=list)

    def withhold(self, inner_pid: int, pid: int, ranges: Ranges, cores: dict[int, core_pb2.core_entry]) -> None:
        """Before a process's threads (by their tids in the images) get their addresses, all pages being in."""
        if not ranges:
            return
        with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
            for tid, core in cores.items():
                address, size = core.thread_core.futex_rla, core.thread_core.futex_rla_len
                if within(core.thread_info.clear_tid_addr, ranges):
                    self.late.append(((inner_pid, tid), NR.set_tid_address, [core.thread_info.clear_tid_addr]))
                if size and within(address, ranges):
                    self.late.append(((inner_pid, tid), NR.set_robust_list, [address, size]))
                elif size == _HEAD.size:
                    self._empty(pid, address, memory.fileno())

    def _empty(self, pid: int, address: int, memory: int) -> None:
        try:
            first, offset, pending = _HEAD.unpack(os.pread(memory, _HEAD.size, address))
        except (OSError, OverflowError, struct.error):  # no memory there: the kernel will find as little
            return
        if first != address or pending:
            self.heads.append(Head(pid, address, first, pending))
            os.pwrite(memory, _HEAD.pack(address, offset, 0), address)

    def speak(self, call: Callable[[tuple[int, int], NR, list[int]], int]) -> None:
        """The last moment has come: make the late calls. The tasks must be able to run them."""
        for thread, number, arguments in self.late:
            call(thread, number, arguments)
        self.late.clear()

    def give_back(self) -> None:
        """The commit is written and the tasks have not run yet: lists are what they were."""
        _write(self.heads)
        self.heads.clear()

    def entry(self, cgroup: str) -> dict[str, Any] | None:
        """The journal's entry for `redo`, None if there is nothing to do. `cgroup` holds the tree."""
        heads = [list(head) for head in self.heads]
        return {"kind": KIND, "data": {"cgroup": cgroup, "heads": heads}} if heads else None


def redo(data: dict[str, Any]) -> None:
    """Give back what an entry says, unless the tree has run since: then it was done."""
    with Hierarchy.find() as hierarchy:
        try:
            hold = Hold.open(hierarchy, data["cgroup"])
        except HoldGoneError:
            return
        try:
            if hold.frozen:
                members = hold.members()
                _write([head for head in (Head(*one) for one in data["heads"]) if head.pid in members])
        finally:
            hold.close()


def _write(heads: Iterable[Head]) -> None:
    for head in heads:
        with open(f"/proc/{head.pid}/mem", "r+b", buffering=0) as memory:
            _, offset, _ = _HEAD.unpack(os.pread(memory.fileno(), _HEAD.size, head.address))
            os.pwrite(memory.fileno(), _HEAD.pack(head.next, offset, head.pending), head.address)

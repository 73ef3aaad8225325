"""Userfaultfds of skeleton tasks, by which the first round's pages come in.

Where nothing is yet, UFFDIO_COPY (ioctl_userfaultfd(2)) brings a page in as it is; a write would have the kernel clear
one first, that is written over at once, and take a fault for each. Areas are registered for write protection, which is
never used, so faults of other kinds go on as ever. Not where the kernel would take a huge page for the write, which is
better still.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from . import calls
from .births import Births, Task
from .images.pb import vma_pb2
from .native import lib, new_error
from .objects.address_space import Status
from .program import Program
from .syscalls import NR

_USER_MODE_ONLY = 1  # userfaultfd(2), Linux 5.11: needs no privilege
_HUGE = 2 << 20  # bytes; a smaller area has no huge page
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_WANTED, _UNWANTED = 1 << 14, 1 << 15  # MADV_HUGEPAGE and MADV_NOHUGEPAGE in an image


class Filling:
    """Those of one skeleton, by the pids in its images. Each is ours to close, and nothing depends on it: whoever has
    none gets pages by being written to."""

    def __init__(self) -> None:
        self.descriptors: dict[int, int] = {}

    def begin(self, births: Births) -> None:
        """Once all areas are made. A kernel without them, or without WP_ASYNC, has tasks go without."""
        huge = huge_pages()
        for task in births.living:
            areas = [one for one in task.areas if one.status & Status.ANON_PRIVATE and not takes_huge(one, huge)]
            if areas and not task.heir_of:
                uffd = _make(births, task)
                if uffd < 0:
                    return
                self.descriptors[task.node.pid] = uffd
                if not _register(uffd, areas):
                    self.end()
                    return

    def end(self) -> None:
        """All that is to come comes by writes: nothing is registered any more."""
        for uffd in self.descriptors.values():
            os.close(uffd)
        self.descriptors.clear()


def huge_pages() -> str:
    """When this host takes huge pages: always, madvise or never."""
    with contextlib.suppress(OSError):
        return _HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]
    return "never"


def takes_huge(area: vma_pb2.vma_entry, huge: str) -> bool:
    """Whether the kernel may take a huge page when a page of an area is written to."""
    if huge == "never" or area.end - area.start < _HUGE:
        return False
    return not area.madv & _UNWANTED if huge == "always" else bool(area.madv & _WANTED)


def _make(births: Births, task: Task) -> int:
    """One of a task's address space, in our table and no longer in its own; -1 if there is none to be had."""
    program = Program()
    made = program.ask(NR.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
    number = births.run(task, program).answer(made)
    if number < 0:
        return -1
    pidfd = os.pidfd_open(task.pid)
    try:
        uffd = calls.pidfd_getfd(pidfd, number)
    finally:
        os.close(pidfd)
    program = Program()
    program.order(NR.close, number)
    births.run(task, program)
    return uffd


def _register(uffd: int, areas: list[vma_pb2.vma_entry]) -> bool:
    """Whether this kernel can. An area that cannot be is left out."""
    err = new_error()
    if lib.ph_uffd_enable(uffd, err) < 0:
        return False
    for area in areas:
        lib.ph_uffd_track(uffd, area.start, area.end, err)
    return True

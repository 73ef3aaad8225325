"""The address spaces of skeleton tasks: areas made, changed and given their last form."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Sequence

from . import vdso
from .births import Births, Task
from .images.pb import vma_pb2
from .kernel_code import KernelCode
from .memory.extents import PAGE_SIZE, Extents
from .objects import address_space, last_words
from .objects.address_space import Status
from .objects.base import Restoration
from .objects.description import open_again
from .program import Program
from .shared_memory import SharedMemory
from .syscalls import NR

_MADV_DONTNEED = 4
_INSTRUCTION = 64


class Spaces:
    """Gives the tasks of one skeleton their memory."""

    def __init__(self, births: Births, restoration: Restoration, shared: SharedMemory) -> None:
        self._births = births
        self._restoration = restoration
        self._shared = shared
        self._kernel_code = KernelCode(births, restoration)

    def make(self, task: Task) -> None:
        """Areas as in the images, where nothing was: writable, so that they can be filled."""
        mm = self._restoration.checkpoint.one("mm", task.node.pid)
        task.protected, task.heir_of = False, 0
        program = Program()
        address_space.unmap_all_but(program, [self._births.bounds])
        self._births.run(task, program)
        ours = [self._restoration.description(mm.exe_file_id)]
        exe = task.table.receive(lambda one: self._births.run(task, one), ours)
        program = Program()
        address_space.set_bounds(program, mm, exe[0])  # while nothing is mapped: the kernel wants the last exe unmapped
        task.table.close(program, exe)
        self._births.run(task, program)
        vmas = address_space.areas_of(mm)
        self._kernel_code.place(task, vmas)
        self._apply(task, address_space.changes([], vmas))
        self._know(task, vmas)

    def inherit(self, task: Task) -> None:
        """Make the areas of one that was just forked from a process whose memory is filled: where both have the same,
        pages stay shared until they are written. A program that executed another one since has nothing in common."""
        mm = self._restoration.checkpoint.one("mm", task.node.pid)
        parent = self._restoration.checkpoint.one("mm", task.heir_of)
        vmas = address_space.areas_of(mm)
        if parent.exe_file_id != mm.exe_file_id or vdso.special(task.areas) != vdso.special(vmas):
            self.make(task)
            return
        task.protected = False
        wanted: list[address_space.Change] = []
        for change in address_space.changes(task.areas, vmas):
            if change.old is not None and change.new is not None:
                wanted += [change._replace(new=None), change._replace(old=None)]
            else:
                wanted.append(change)
        if wanted:
            self._apply(task, wanted)
        self._know(task, vmas)

    def drop(self, task: Task, extents: Extents) -> None:
        """Make pages absent, in the areas that the task has."""
        program = Program()
        for start, pages, _ in extents:
            program.make_room(_INSTRUCTION)
            program.order(NR.madvise, start, pages * PAGE_SIZE, _MADV_DONTNEED, keep_errors=True)
        for part in program.parts:
            self._births.run(task, part)

    def protect(self, task: Task) -> None:
        """Give areas their final protection, if they have not got it yet. Later pages go through /proc/PID/mem."""
        if task.protected:
            return
        task.protected = True
        program = Program()
        address_space.protect(program, address_space.changes([], task.areas))
        if program.steps:
            self._births.run(task, program)

    def change(self, task: Task) -> None:
        """Follow what changed in the images."""
        mm = self._restoration.checkpoint.one("mm", task.node.pid)
        vmas = address_space.areas_of(mm)
        if task.areas == vmas:
            return
        wanted = address_space.changes(task.areas, vmas)
        vdso_moves = self._kernel_code.follow(task, vmas)
        if wanted:
            self._apply(task, wanted)
            program = Program()
            address_space.protect(program, wanted)
            self._births.run(task, program)
        if vdso_moves:
            self._kernel_code.place(task, vmas)
        self._know(task, vmas)

    def _know(self, task: Task, vmas: Iterable[vma_pb2.vma_entry]) -> None:
        """These are its areas from now on."""
        task.areas = list(vmas)
        self._restoration.tasks[task.node.pid].written = last_words.written(task.areas)

    def finish(self, task: Task, program: Program) -> None:
        """Bounds and locks, when everything is there and protected."""
        mm = self._restoration.checkpoint.one("mm", task.node.pid)
        address_space.set_bounds(program, mm, -1)
        address_space.set_last(program, mm.vmas)
        self._kernel_code.finish(task, program)

    def _apply(self, task: Task, wanted: Sequence[address_space.Change]) -> None:
        needed = {
            change.new.shmid: change.new
            for change in wanted
            if change.new is not None and not change.new.anonymous and not change.new.special
        }
        writing = {change.new.shmid for change in wanted if change.new is not None and change.new.writes_through}
        with contextlib.ExitStack() as stack:
            ours = [self._mapped_file(shmid, look.status, shmid in writing, stack) for shmid, look in needed.items()]
            numbers = task.table.receive(lambda program: self._births.run(task, program), ours)
        by_shmid = dict(zip(needed, numbers, strict=True))
        for start in range(0, len(wanted), 512):
            program = Program()
            address_space.apply_changes(program, wanted[start : start + 512], by_shmid.__getitem__)
            self._births.run(task, program)
        program = Program()
        task.table.close(program, numbers)
        self._births.run(task, program)

    def _mapped_file(self, shmid: int, status: int, writing: bool, stack: contextlib.ExitStack) -> int:
        """A descriptor to map; one that is only for this is closed by the stack.

        CRIU's images do not say that a file was opened for writing that is only mapped.
        """
        if status & Status.ANON_SHARED:
            return self._shared.descriptor(shmid, self._restoration.checkpoint)
        fd = self._restoration.description(shmid)
        if writing and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            fd = open_again(fd, os.O_RDWR)
            stack.callback(os.close, fd)
        return fd

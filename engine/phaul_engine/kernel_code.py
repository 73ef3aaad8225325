"""This kernel's vDSO in skeleton tasks, where programs that began on this kernel or on another look for it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from . import vdso
from .births import Births, Task
from .errors import RebuildError
from .images.pages import PAGE_SIZE
from .images.pb import vma_pb2
from .images.vma import Status
from .objects.base import Restoration
from .program import Program
from .syscalls import NR

_ARCH_MAP_VDSO_64 = 0x2003
_MADV_NORMAL = 0
_MREMAP_MOVE_FIXED = 3
_MAP_PRIVATE_ANONYMOUS_FIXED = 0x2 | 0x20 | 0x100000  # MAP_FIXED_NOREPLACE
_PROT_EXEC = 4
_AT_SYSINFO_EHDR = 33


class KernelCode:
    """Gives the tasks of one skeleton their vDSO."""

    def __init__(self, births: Births, restoration: Restoration) -> None:
        self._births = births
        self._restoration = restoration

    def place(self, task: Task, vmas: Sequence[vma_pb2.vma_entry]) -> None:
        """Make the areas of the vDSO, where nothing is, as the program knows them. Raises RebuildError if this kernel
        has another and the images do not hold the code of that one."""
        areas = vdso.special(vmas)
        task.vdso = 0
        task.vdso_elsewhere = None
        if not areas:
            return
        here = vdso.local()
        theirs = vdso.source_code(self._restoration.checkpoint)
        moves = None if here is None else vdso.plain(here, theirs, areas)
        if here is not None and moves is not None:
            self._put(task, here, moves, vmas)
        elif theirs is None:
            raise RebuildError(
                "the program comes from a kernel with another vDSO, and its images do not hold that",
                advice="restore it on a host with the same kernel",
            )
        else:
            self._redirect(task, here, theirs, vmas)

    def follow(self, task: Task, vmas: Sequence[vma_pb2.vma_entry]) -> bool:
        """Before areas change: take the vDSO away if the program moved it, or needs its place. Returns whether it has
        to be placed again afterwards."""
        old, new = vdso.special(task.areas), vdso.special(vmas)
        place = task.vdso_elsewhere
        if old == new and (place is None or not any(vma.start < place[1] and place[0] < vma.end for vma in vmas)):
            return False
        program = Program()
        for start, end in [(vma.start, vma.end) for vma in old] + ([place] if place else []):
            program.order(NR.munmap, start, end - start, label=f"unmap the vDSO at {start:x}")
        self._births.run(task, program)
        return True

    def finish(self, task: Task, program: Program) -> None:
        """What earlier moves left of other kernels' vDSOs leads to this one from now on.

        The program knows of the one it began with. Of one that a move put elsewhere, only code that was interrupted
        in it could know, and that was two moves ago: it goes.
        """
        here = vdso.local()
        if task.vdso_elsewhere is None:
            return
        mm = self._restoration.checkpoint.one("mm", task.node.pid)
        known = dict(zip(mm.mm_saved_auxv[::2], mm.mm_saved_auxv[1::2], strict=False)).get(_AT_SYSINFO_EHDR)
        mem = os.open(f"/proc/{task.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            for vma in mm.vmas:
                size = vma.end - vma.start
                if not (_may_be_code(vma) and vdso.is_redirected(head := os.pread(mem, 64, vma.start))):
                    continue
                if vma.start == known:
                    code = vdso.parse(os.pread(mem, size, vma.start))
                    target = None if here is None else here.code
                    os.pwrite(mem, vdso.redirected(code, vma.start, target, task.vdso), vma.start)
                else:
                    start = vma.start - vdso.data_pages(head) * PAGE_SIZE
                    program.order(NR.munmap, start, vma.end - start, label=f"unmap an old vDSO at {vma.start:x}")
        finally:
            os.close(mem)

    def _put(self, task: Task, here: vdso.Local, moves: Sequence[vdso.Move], vmas: Sequence[vma_pb2.vma_entry]) -> None:
        program = Program()
        start = moves[0].to - moves[0].offset
        whole = sum(move.size for move in moves) == here.size and all(move.to == start + move.offset for move in moves)
        if whole:
            program.order(NR.arch_prctl, _ARCH_MAP_VDSO_64, start, label=f"map the vDSO at {start:x}")
        else:
            start = self._find_place(here, moves[0].to, vmas)
            _map_at(program, start, here)
            for move in moves:
                args = (start + move.offset, move.size, move.size, _MREMAP_MOVE_FIXED, move.to)
                program.order(NR.mremap, *args, label=f"move the vDSO to {move.to:x}")
            program.order(NR.munmap, start, here.size, label="unmap the rest of the vDSO")
        self._births.run(task, program)
        code = [move.to for move in moves if move.offset == sum(here.data)]
        task.vdso = code[0] if code else 0

    def _redirect(
        self, task: Task, here: vdso.Local | None, theirs: vdso.Code, vmas: Sequence[vma_pb2.vma_entry]
    ) -> None:
        areas = vdso.special(vmas)
        code = [vma for vma in areas if vma.status & Status.VDSO]
        program = Program()
        for vma in areas:
            args = (vma.start, vma.end - vma.start, vma.prot, _MAP_PRIVATE_ANONYMOUS_FIXED, -1, 0)
            program.order(NR.mmap, *args, label=f"map {vma.start:x}-{vma.end:x} for another kernel's vDSO")
        if here is not None and code:
            start = self._find_place(here, code[0].start, vmas)
            _map_at(program, start, here)
            task.vdso = start + sum(here.data)
            task.vdso_elsewhere = (start, start + here.size)
        self._births.run(task, program)
        mem = os.open(f"/proc/{task.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            for vma in code:
                if vma.end - vma.start != len(theirs.data):
                    raise RebuildError(f"the program has unmapped a part of its vDSO at {vma.start:x}")
                zeros = sum((one.end - one.start) // PAGE_SIZE for one in areas if one.end == vma.start)
                target = None if here is None else here.code
                os.pwrite(mem, vdso.redirected(theirs, vma.start, target, task.vdso, zeros), vma.start)
        finally:
            os.close(mem)

    def _find_place(self, here: vdso.Local, near: int, vmas: Sequence[vma_pb2.vma_entry]) -> int:
        taken = [(vma.start, vma.end) for vma in vmas]
        return vdso.find_place(here.size, near, [*taken, self._births.bounds])


def _map_at(program: Program, start: int, here: vdso.Local) -> None:
    """The kernel takes the address for a wish: whether it was heard is asked at once."""
    program.order(NR.arch_prctl, _ARCH_MAP_VDSO_64, start, label=f"map the vDSO at {start:x}")
    program.order(NR.madvise, start, here.size, _MADV_NORMAL, label=f"find the vDSO at {start:x}")


def _may_be_code(vma: vma_pb2.vma_entry) -> bool:
    """Whether an area can be what a move left of a vDSO: small, private, nobody's file, and code."""
    anonymous = vma.status & Status.ANON_PRIVATE and not vma.status & (Status.VDSO | Status.VVAR)
    return bool(anonymous and vma.prot & _PROT_EXEC and vma.end - vma.start <= vdso.LARGEST)

"""Address spaces: the areas of a process and the bounds of its memory map (mm image).

Contents travel as pages (phaul_engine/memory); this is what they stand in. The destination's areas are made to equal
the source's by the difference between two images, so a first build, a change between rounds and the last check in the
freeze are one and the same code.
"""

from __future__ import annotations

import enum
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from phaul_engine.images.pb import mm_pb2, vma_pb2
from phaul_engine.memory.extents import PAGE_SIZE, Extent
from phaul_engine.memory.guards import MADV_GUARD_INSTALL
from phaul_engine.proc.maps import Area
from phaul_engine.proc.stat import Stat
from phaul_engine.program import Program
from phaul_engine.syscalls import NR

from . import unsupported
from .base import Collection, Owner

PROT_WRITE, PROT_EXEC = 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x1, 0x2, 0x10, 0x20
MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE, MAP_HUGETLB = 0x100, 0x2000, 0x4000, 0x40000
MAP_FIXED_NOREPLACE = 0x100000
MAP_TYPE, MAP_DROPPABLE = 0xF, 0x8
MLOCK_ONFAULT = 1
_SHM_RDONLY, _SHM_EXEC = 0o10000, 0o100000
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_TASK_TOP = 0x7FFFFFFFF000


class Status(enum.IntFlag):
    """What an area is, in CRIU's bits (criu/include/image.h)."""

    REGULAR = 1 << 0
    STACK = 1 << 1
    VSYSCALL = 1 << 2
    VDSO = 1 << 3
    HEAP = 1 << 5
    FILE_PRIVATE = 1 << 6
    FILE_SHARED = 1 << 7
    ANON_SHARED = 1 << 8
    ANON_PRIVATE = 1 << 9
    SYSVIPC = 1 << 10
    VVAR = 1 << 12
    MEMFD = 1 << 14
    GUARD = 1 << 16


# VmFlags (proc_pid_smaps(5)) to the advice that gives them (madvise(2)); images hold 1 << advice.
_ADVICE = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}
_MAP_FLAGS = {"gd": MAP_GROWSDOWN, "lo": MAP_LOCKED, "nr": MAP_NORESERVE, "ht": MAP_HUGETLB}
_CANNOT = {
    "io": ("a mapping of device memory", "its contents are the device's"),
    "pf": ("a mapping of device memory", "its contents are the device's"),
    "ss": ("a shadow stack", "control-flow enforcement state is not carried"),
    "um": ("watched by the program's own userfaultfd", "faults in flight cannot be carried"),
    "ui": ("watched by the program's own userfaultfd", "faults in flight cannot be carried"),
}


class Sources(NamedTuple):
    """Where the image ids of mapped files come from: `mapped(owner, area)` for a file or memfd (its description)."""

    mapped: Callable[[Owner, Area], int]


def collect_areas(
    owner: Owner, areas: Iterable[Area], sources: Sources, collection: Collection
) -> list[vma_pb2.vma_entry]:
    """Image entries of the areas (with their VmFlags) of a process."""
    entries: list[vma_pb2.vma_entry] = []
    for area in areas:
        entry = _collect_area(owner, area, sources, collection)
        if entry is None:
            continue
        if entries and entry.status & entries[-1].status & Status.VVAR and entries[-1].end == entry.start:
            entries[-1].end = entry.end  # the kernel's two areas of data for the vDSO are one in an image
        else:
            entries.append(entry)
    return entries


def guard_entries(extents: Iterable[Extent]) -> Iterator[vma_pb2.vma_entry]:
    """Guard pages, as images list them: behind all areas, each within one of those."""
    for start, pages, _ in extents:
        end = start + pages * PAGE_SIZE
        entry = vma_pb2.vma_entry(start=start, end=end, pgoff=0, shmid=0, prot=0, flags=0, fd=-1, madv=0)
        entry.status = Status.GUARD
        yield entry


def areas_of(mm: mm_pb2.mm_entry) -> list[vma_pb2.vma_entry]:
    """The areas of an image, without its guard pages."""
    return [vma for vma in mm.vmas if not vma.status & _GUARD]


def _collect_area(owner: Owner, area: Area, sources: Sources, collection: Collection) -> vma_pb2.vma_entry | None:
    where = f"area {area.start:x}-{area.end:x} of {owner}"
    status = _status(area)
    if status is None:
        unsupported.block_area(where, area.path, collection)
        return None
    special = bool(status & (Status.VDSO | Status.VVAR | Status.VSYSCALL))
    for flag, (kind, why) in _CANNOT.items():
        if flag in area.flags and not special:
            collection.block(where, kind, why)
            return None
    entry = vma_pb2.vma_entry(
        start=area.start, end=area.end, pgoff=area.offset, shmid=0, prot=area.prot, flags=_flags(area, status), fd=-1
    )
    entry.status = status
    entry.madv = sum(1 << advice for flag, advice in _ADVICE.items() if flag in area.flags and not special)
    if "lf" in area.flags and not special:
        entry.phaul_on_fault = True
    if "sl" in area.flags and not special:
        entry.phaul_sealed = True
    if status & (Status.FILE_PRIVATE | Status.FILE_SHARED):
        entry.shmid = sources.mapped(owner, area)
    elif status & Status.ANON_SHARED:
        entry.shmid = area.ino
    return entry


def _status(area: Area) -> Status | None:
    """What an area is; None if nothing here knows."""
    path = area.path
    if path == "[vsyscall]":
        return Status.VSYSCALL
    if path == "[vdso]":
        return Status.REGULAR | Status.VDSO | Status.ANON_PRIVATE
    if path.startswith("[vvar"):
        return Status.REGULAR | Status.VVAR | Status.ANON_PRIVATE
    if not area.is_file:
        return _anonymous_status(area)
    if path.startswith("/SYSV"):
        return Status.REGULAR | Status.ANON_SHARED | Status.SYSVIPC if area.shared else None
    if path.startswith(("anon_inode:", "socket:", "/[aio]")) or path == "/anon_hugepage (deleted)":
        return None
    if path == "/dev/zero (deleted)" or path.startswith("[anon_shmem:"):
        return Status.REGULAR | Status.ANON_SHARED if area.shared else None  # None: private copies of shared memory
    kind = Status.FILE_SHARED if area.shared else Status.FILE_PRIVATE
    return Status.REGULAR | kind | (Status.MEMFD if path.startswith("/memfd:") else Status(0))


def _anonymous_status(area: Area) -> Status | None:
    if area.shared or area.path == "[uprobes]":
        return None
    named = {"[heap]": Status.HEAP, "[stack]": Status.STACK}.get(area.path, Status(0))
    return Status.REGULAR | Status.ANON_PRIVATE | named


def _flags(area: Area, status: Status) -> int:
    flags = MAP_SHARED if area.shared else MAP_DROPPABLE if "dp" in area.flags else MAP_PRIVATE
    if not status & (Status.FILE_PRIVATE | Status.FILE_SHARED):
        flags |= MAP_ANONYMOUS
    return flags | sum(bit for flag, bit in _MAP_FLAGS.items() if flag in area.flags)


def collect_bounds(stat: Stat, exe_id: int, auxv: bytes) -> mm_pb2.mm_entry:
    """The memory map without its areas, and without what brk(0) says inside."""
    mm = mm_pb2.mm_entry(
        mm_start_code=stat.start_code,
        mm_end_code=stat.end_code,
        mm_start_data=stat.start_data,
        mm_end_data=stat.end_data,
        mm_start_stack=stat.start_stack,
        mm_start_brk=stat.start_brk,
        mm_arg_start=stat.arg_start,
        mm_arg_end=stat.arg_end,
        mm_env_start=stat.env_start,
        mm_env_end=stat.env_end,
        exe_file_id=exe_id,
    )
    mm.mm_saved_auxv.extend(_to_its_end(struct.unpack(f"<{len(auxv) // 8}Q", auxv[: len(auxv) // 8 * 8])))
    return mm


def _to_its_end(auxv: Sequence[int]) -> Sequence[int]:
    """Up to AT_NULL, which the kernel adds (prctl(2), PR_SET_MM_AUXV): CRIU takes no more than stands before it."""
    for at in range(0, len(auxv) - 1, 2):
        if auxv[at] == 0:
            return auxv[:at]
    return auxv


# as plain numbers: an IntFlag costs a microsecond an operation
_NAMED = int(Status.HEAP | Status.STACK)
_WITHOUT_OFFSET = int(Status.ANON_PRIVATE | Status.VDSO | Status.VVAR)
_SPECIAL = int(Status.VDSO | Status.VVAR | Status.VSYSCALL)
_ANONYMOUS = int(Status.ANON_PRIVATE)
_GUARD = int(Status.GUARD)


@dataclass(frozen=True)
class _Look:
    """All of an area but its bounds: two stretches that look alike and continue each other are one area."""

    base: int  # offset of address 0: of files and shared memory only
    shmid: int
    prot: int
    flags: int
    status: int
    madv: int

    @property
    def anonymous(self) -> bool:
        return bool(self.status & _ANONYMOUS)

    @property
    def special(self) -> bool:
        return bool(self.status & _SPECIAL)

    @property
    def writes_through(self) -> bool:
        """Whether what is written to it is written to a file, or to memory that others share."""
        return bool(self.flags & MAP_SHARED and self.prot & PROT_WRITE)

    def same_memory(self, other: _Look) -> bool:
        """Whether only protection and advice differ."""
        return (self.base, self.shmid, self.flags, self.status) == (other.base, other.shmid, other.flags, other.status)


def _look(vma: vma_pb2.vma_entry) -> _Look:
    status = vma.status & ~_NAMED
    base = 0 if status & _WITHOUT_OFFSET else vma.pgoff - vma.start
    return _Look(base, vma.shmid, vma.prot, vma.flags & ~MAP_LOCKED, status, vma.madv)


class Change(NamedTuple):
    """One stretch of addresses whose look changes; None is unmapped."""

    start: int
    end: int
    old: _Look | None
    new: _Look | None


def changes(old: Sequence[vma_pb2.vma_entry], new: Sequence[vma_pb2.vma_entry]) -> list[Change]:
    """What makes the areas `old` the areas `new`; both ascending."""
    return [change for change in _stretches(old, new) if change.old != change.new]


def made_anew(old: Sequence[vma_pb2.vma_entry], new: Sequence[vma_pb2.vma_entry]) -> list[tuple[int, int]]:
    """The stretches of `new` that hold nothing yet when the areas `old` have been made `new` (ascending)."""
    if old == new:
        return []
    return [
        (start, end)
        for start, end, before, after in changes(old, new)
        if after is not None and (before is None or not after.same_memory(before))
    ]


def _stretches(old: Sequence[vma_pb2.vma_entry], new: Sequence[vma_pb2.vma_entry]) -> Iterator[Change]:
    bounds = sorted({bound for vma in (*old, *new) for bound in (vma.start, vma.end)})
    before, after = iter([*old, None]), iter([*new, None])
    here, there = next(before), next(after)
    for start, end in itertools.pairwise(bounds):
        while here is not None and here.end <= start:
            here = next(before)
        while there is not None and there.end <= start:
            there = next(after)
        yield Change(
            start,
            end,
            _look(here) if here is not None and here.start <= start else None,
            _look(there) if there is not None and there.start <= start else None,
        )


def unmap_all_but(program: Program, kept: Sequence[tuple[int, int]]) -> None:
    """Leave nothing in an address space but the ranges `kept` (ascending)."""
    at = 0
    for start, end in (*kept, (_TASK_TOP, _TASK_TOP)):
        if start > at:
            program.order(NR.munmap, at, start - at, label=f"unmap {at:x}-{start:x}")
        at = end


def apply_changes(program: Program, wanted: Sequence[Change], descriptor: Callable[[int], int]) -> None:
    """Make areas as `wanted` says. `descriptor` gives the task's descriptor for a shmid.

    Private areas are made writable, so that they can be filled; `protect` gives them what they are to have. Areas of
    the vDSO are `KernelCode`'s.
    """
    for start, end, before, after in wanted:
        old = None if before is None or before.special else before
        new = None if after is None or after.special else after
        if old is not None and (new is None or not new.same_memory(old)):
            program.order(NR.munmap, start, end - start, label=f"unmap {start:x}-{end:x}")
        if new is not None and (old is None or not new.same_memory(old)):
            _map(program, start, end, new, descriptor)


def _map(program: Program, start: int, end: int, look: _Look, descriptor: Callable[[int], int]) -> None:
    flags = (look.flags & ~MAP_GROWSDOWN & ~MAP_LOCKED) | MAP_FIXED_NOREPLACE
    if look.flags & MAP_GROWSDOWN:
        flags |= MAP_GROWSDOWN
    prot = look.prot if look.flags & MAP_SHARED else look.prot | PROT_WRITE
    if look.flags & MAP_ANONYMOUS and not look.status & Status.ANON_SHARED:
        fd, offset = -1, 0
    else:
        fd, offset = descriptor(look.shmid), look.base + start
        flags &= ~MAP_ANONYMOUS
    if look.status & Status.SYSVIPC:
        how = (0 if prot & PROT_WRITE else _SHM_RDONLY) | (_SHM_EXEC if prot & PROT_EXEC else 0)
        program.order(NR.shmat, look.shmid, start, how, label=f"attach shared memory {look.shmid} at {start:x}")
        return
    args = (start, end - start, prot, flags, fd, offset)
    program.order(NR.mmap, *args, label=f"map {start:x}-{end:x}")


def protect(program: Program, wanted: Sequence[Change]) -> None:
    """Give areas their protection and advice, once they are filled."""
    for start, end, old, new in wanted:
        if new is None or new.special:
            continue
        made = old if old is not None and new.same_memory(old) else None
        prot = made.prot if made else (new.prot if new.flags & MAP_SHARED else new.prot | PROT_WRITE)
        if new.prot != prot:
            program.order(NR.mprotect, start, end - start, new.prot, label=f"protect {start:x}-{end:x}")
        for advice in range(32):
            if new.madv & ~(made.madv if made else 0) & 1 << advice:
                program.order(NR.madvise, start, end - start, advice, label=f"advise {start:x}-{end:x} {advice}")


def set_last(program: Program, vmas: Sequence[vma_pb2.vma_entry]) -> None:
    """Install guard pages, which drops what is beneath them, and lock what was locked in memory (mlock(2)): last, when
    everything is there. An area with pages that cannot be there (guards, PROT_NONE, beyond the end of a file) can be
    locked, and the call that fetches its pages fails nevertheless. Seals (mseal(2)) come after that: nothing about such
    an area changes any more."""
    for vma in vmas:
        if vma.status & _GUARD:
            args = (vma.start, vma.end - vma.start, MADV_GUARD_INSTALL)
            program.order(NR.madvise, *args, label=f"install guard pages at {vma.start:x}")
    for vma in vmas:
        if vma.flags & MAP_LOCKED:
            size, label = vma.end - vma.start, f"lock {vma.start:x}-{vma.end:x}"
            program.order(NR.mlock2, vma.start, size, MLOCK_ONFAULT, label=label)
            if not vma.phaul_on_fault:
                program.order(NR.mlock2, vma.start, size, 0, keep_errors=True, label=label)
    for vma in vmas:
        if vma.phaul_sealed:
            program.order(NR.mseal, vma.start, vma.end - vma.start, 0, label=f"seal {vma.start:x}-{vma.end:x}")


def set_bounds(program: Program, mm: mm_pb2.mm_entry, exe: int) -> None:
    """Give the memory map its bounds, auxiliary vector and, unless `exe` is -1, executable (prctl(2) PR_SET_MM_MAP)."""
    auxv = program.data(struct.pack(f"<{len(mm.mm_saved_auxv)}Q", *mm.mm_saved_auxv))
    bounds = (
        *(mm.mm_start_code, mm.mm_end_code, mm.mm_start_data, mm.mm_end_data, mm.mm_start_brk, mm.mm_brk),
        *(mm.mm_start_stack, mm.mm_arg_start, mm.mm_arg_end, mm.mm_env_start, mm.mm_env_end),
    )
    request = program.data(struct.pack("<11QQII", *bounds, 0, auxv.size, exe & 0xFFFFFFFF))
    program.store(request.at(88), auxv)
    program.order(NR.prctl, _PR_SET_MM, _PR_SET_MM_MAP, request, request.size, 0, label="set the bounds of memory")

"""Hostile address spaces and memory."""

from __future__ import annotations

from typing import Any

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.vma import Status

from tests.kernel.hostile.breaking import (
    HUGE32,
    HUGE64,
    KERNEL_HALF,
    KIND,
    MISPLACED,
    OFFSET,
    UNKNOWN,
    Break,
    area,
    areas,
    child,
    grow,
    mm,
    root,
)

MEMORY: dict[str, tuple[str, Break]] = {
    "area in the kernel's half": (
        MISPLACED,
        lambda c: (setattr(mm(c).vmas[-2], "start", KERNEL_HALF), setattr(mm(c).vmas[-2], "end", KERNEL_HALF + 4096)),
    ),
    "area across the end of the program's half": (MISPLACED, lambda c: setattr(mm(c).vmas[-2], "end", 0x800000001000)),
    "area at half a page": (MISPLACED, lambda c: setattr(areas(c)[0], "start", areas(c)[0].start + 7)),
    "area upside down": (MISPLACED, lambda c: setattr(areas(c)[0], "end", areas(c)[0].start - 4096)),
    "empty area": (MISPLACED, lambda c: setattr(areas(c)[0], "end", areas(c)[0].start)),
    "areas that overlap": (MISPLACED, lambda c: grow(c, mm(c).vmas[0], mm(c).vmas[2].end - mm(c).vmas[0].start)),
    "areas out of order": (MISPLACED, lambda c: mm(c).vmas.append(mm(c).vmas[0])),
    "area of no kind": (KIND, lambda c: setattr(areas(c)[0], "status", int(Status.REGULAR))),
    "area of two kinds": (
        KIND,
        lambda c: setattr(areas(c)[0], "status", int(Status.ANON_PRIVATE | Status.ANON_SHARED)),
    ),
    "area of device memory": (
        KIND,
        lambda c: setattr(areas(c)[0], "status", int(Status.ANON_PRIVATE | Status.AIO_RING)),
    ),
    "private area that is shared": (KIND, lambda c: setattr(areas(c)[0], "flags", 0x21)),
    "anonymous area of a file": (KIND, lambda c: setattr(areas(c)[0], "flags", 0x02)),
    "file that is anonymous": (KIND, lambda c: setattr(area(c, Status.FILE_PRIVATE), "flags", 0x22)),
    "protection that there is not": ("with protection 0xff", lambda c: setattr(areas(c)[0], "prot", 0xFF)),
    "odd offset": (OFFSET, lambda c: setattr(area(c, Status.FILE_PRIVATE), "pgoff", 17)),
    "offset that wraps": (OFFSET, lambda c: setattr(area(c, Status.FILE_PRIVATE), "pgoff", HUGE64 - 4095)),
    "file that is not there": (
        "refers to file 4000000",
        lambda c: setattr(area(c, Status.FILE_PRIVATE), "shmid", UNKNOWN),
    ),
    "memory file that is none": (
        "no MEMFD of that id",
        lambda c: setattr(area(c, Status.FILE_PRIVATE), "status", area(c, Status.FILE_PRIVATE).status | Status.MEMFD),
    ),
    "shared memory that is not there": (
        "pagemap-shmem-4000000.img: is missing",
        lambda c: setattr(area(c, Status.ANON_SHARED), "shmid", UNKNOWN),
    ),
    "segment that is not there": (
        "System V shared memory 4000000",
        lambda c: setattr(area(c, Status.SYSVIPC), "shmid", UNKNOWN),
    ),
    "segment of 16 exabytes": ("has System V shared memory", lambda c: setattr(segment(c), "size", HUGE64)),
    "segment of 4 exabytes": ("cannot be made again here", lambda c: setattr(segment(c), "size", 1 << 62)),
    "segment -1": ("has System V shared memory", lambda c: setattr(segment(c).desc, "id", HUGE32)),
    "offset of 8 exabytes in shared memory": (
        "cannot be made again here",
        lambda c: setattr(area(c, Status.ANON_SHARED), "pgoff", 1 << 62),
    ),
    "areas that leave no room": (
        "leave no room",
        lambda c: (setattr(mm(c), "vmas", None) if False else None, everything(c)),
    ),
    "pages outside of the areas": (
        "not within the areas",
        lambda c: setattr(biggest(c), "end", biggest(c).start + 4096),
    ),
    "guard pages in the kernel's half": ("has guard pages", lambda c: guard(c, KERNEL_HALF, KERNEL_HALF + 4096)),
    "guard pages where nothing is": ("guard pages|lacks", lambda c: guard(c, 0x10000, 0x11000)),
    "advice that there is not": ("advise", lambda c: setattr(areas(c)[1], "madv", 1 << 31)),
    "huge pages that are not here": (
        "map |cannot",
        lambda c: (setattr(areas(c)[1], "flags", areas(c)[1].flags | 0x40000),),
    ),
    "auxiliary vector without end": ("auxiliary vector of", lambda c: mm(c).mm_saved_auxv.extend(range(1000))),
    "heap in the kernel's half": ("the bounds of memory", lambda c: setattr(mm(c), "mm_start_brk", KERNEL_HALF)),
    "code upside down": ("the bounds of memory", lambda c: setattr(mm(c), "mm_end_code", 1)),
    "dumpable as 7": ("is dumpable as 7", lambda c: setattr(mm(c), "dumpable", 7)),
    "executable that is not there": ("refers to file 4000000", lambda c: setattr(mm(c), "exe_file_id", UNKNOWN)),
    "executable that is a directory": (
        "the bounds of memory",
        lambda c: setattr(mm(c), "exe_file_id", c.one("fs", root(c).pid).cwd_id),
    ),
    "vDSO that is none": ("vDSO cannot be read", lambda c: setattr(c.one("inventory"), "phaul_vdso", b"nonsense")),
    "vDSO of a hundred kilobytes": (
        "a vDSO of 100000 bytes",
        lambda c: setattr(c.one("inventory"), "phaul_vdso", bytes(100_000)),
    ),
    "vDSO whose headers lie beyond it": ("vDSO cannot be read", lambda c: vdso_with(c, 32, HUGE64)),
    "vDSO with 65535 headers": ("vDSO cannot be read", lambda c: vdso_with(c, 54, 0xFFFFFFFF)),
    "clock of 500 billion years": ("has a clock at", lambda c: setattr(c.one("timens", 0).monotonic, "tv_sec", HUGE64)),
    "clock with a billion nanoseconds": (
        "has a clock at",
        lambda c: setattr(c.one("timens", 0).boottime, "tv_nsec", 10**9),
    ),
}


def segment(c: Checkpoint) -> Any:
    (ident,) = c.idents("ipcns-shm")
    return c.records("ipcns-shm", ident)[0].message


def biggest(c: Checkpoint) -> Any:
    return area(c, Status.HEAP)


def everything(c: Checkpoint) -> None:
    """Private memory without gaps, from the first area to the last."""
    for process in (root(c), child(c)):
        vmas = c.one("mm", process.pid).vmas
        at = 0x10000
        for one in list(vmas):
            if one.start > at and not one.status & Status.VSYSCALL:
                hole = vmas.add(start=at, end=one.start, pgoff=0, shmid=0, prot=3, flags=0x4022, fd=-1)
                hole.status = Status.REGULAR | Status.ANON_PRIVATE
            at = one.end if not one.status & Status.VSYSCALL else at
        ordered = sorted(vmas, key=lambda vma: int(vma.start))
        del vmas[:]
        vmas.extend(ordered)


def guard(c: Checkpoint, start: int, end: int) -> None:
    one = mm(c).vmas.add(start=start, end=end, pgoff=0, shmid=0, prot=0, flags=0, fd=-1)
    one.status = Status.GUARD


def vdso_with(c: Checkpoint, offset: int, value: int) -> None:
    text = bytearray(c.one("inventory").phaul_vdso)
    size = 8 if value > HUGE32 else 4
    text[offset : offset + size] = value.to_bytes(size, "little")
    c.one("inventory").phaul_vdso = bytes(text)

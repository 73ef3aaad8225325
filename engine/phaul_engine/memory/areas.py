"""What is done with the contents of each area of an address space."""

from __future__ import annotations

import enum
import itertools
import os
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import NamedTuple

from phaul_engine.native import lib
from phaul_engine.proc.access import open_at
from phaul_engine.proc.maps import Area

_HUGE = "/anon_hugepage (deleted)"


class Care(enum.Enum):
    """What an area's contents need."""

    ANONYMOUS = "anonymous"  # private: tracked and sent, absent is zero
    PRIVATE_FILE = "private file"  # only private copies are sent; anonymous huge pages are of a file too, an empty one
    SHARED_MEMORY = "shared memory"  # sent once for all that map it, by inode
    SHARED_FILE = "shared file"  # the file's business; never written through a mapping
    SPECIAL = "special"  # the kernel's own: vdso, vvar, vsyscall


@cache
def _shm_device() -> int:
    """The device number of the kernel's own mount of shmem: memfd, shared anonymous and SysV memory."""
    fd = os.memfd_create("device")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def care_of(area: Area, memory_devices: Collection[int] = ()) -> Care:
    """What to do with an area. `memory_devices` are the device numbers of tmpfs mounts, whose files are memory."""
    if area.special:
        return Care.SPECIAL
    if not area.shared:
        return Care.PRIVATE_FILE if area.is_file else Care.ANONYMOUS
    memory = area.dev == _shm_device() or area.dev in memory_devices or area.path == _HUGE
    return Care.SHARED_MEMORY if memory else Care.SHARED_FILE


class Mapping(NamedTuple):
    """One mapping of a shared object: offset `offset` of it is at `start`."""

    start: int
    size: int
    offset: int


def open_shared(proc: int, area: Area) -> int:
    """A descriptor of the object that a shared area maps, by /proc/PID/map_files (CAP_CHECKPOINT_RESTORE or
    CAP_SYS_ADMIN; read-write where that is allowed). The caller closes it."""
    name = f"map_files/{area.start:x}-{area.end:x}"
    try:
        return open_at(proc, name, os.O_RDWR)
    except PermissionError:
        return open_at(proc, name, os.O_RDONLY)


def described(now: Iterable[Area], known: Sequence[Area]) -> list[Area]:
    """What of a process's areas is as they were when they were `known` (both ascending): the images say nothing of the
    rest, so that no page of it can be sent yet. Shared areas are whole, or left out."""
    found: list[Area] = []
    index = 0
    for area in now:
        while index < len(known) and known[index].end <= area.start:
            index += 1
        for other in itertools.islice(known, index, None):
            if other.start >= area.end:
                break
            start, end = max(area.start, other.start), min(area.end, other.end)
            whole = (start, end) == (area.start, area.end)
            if _origin(area) == _origin(other) and (whole or not area.shared):
                offset = area.offset + start - area.start if area.is_file else area.offset
                found.append(area._replace(start=start, end=end, offset=offset))
    return found


def _origin(area: Area) -> tuple[bool, int, int, int]:
    return area.shared, area.dev, area.ino, area.offset - area.start if area.is_file else 0


class Range(NamedTuple):
    """A stretch of private memory of one kind; `origin` tells one file's (and place in it) from another's."""

    start: int
    end: int
    flags: int
    origin: tuple[int, int, int]


def private_ranges(areas: Iterable[Area]) -> list[Range]:
    """The private memory of `areas` (ascending), neighbours of one kind joined."""
    ranges: list[Range] = []
    for area in areas:
        care = care_of(area)
        if care is Care.ANONYMOUS:
            new = Range(area.start, area.end, 0, (0, 0, 0))
        elif care is Care.PRIVATE_FILE:
            new = Range(area.start, area.end, lib.PH_RANGE_FILE, (area.dev, area.ino, area.offset - area.start))
        else:
            continue
        last = ranges[-1] if ranges else None
        if last and last.end == new.start and last[2:] == new[2:]:
            ranges[-1] = last._replace(end=new.end)
        else:
            ranges.append(new)
    return ranges


def within(ranges: Sequence[Range], stretches: Iterable[tuple[int, int]]) -> list[Range]:
    """The parts of `ranges` that lie in stretches of addresses; both ascending."""
    found: list[Range] = []
    index = 0
    for start, end in stretches:
        while index < len(ranges) and ranges[index].end <= start:
            index += 1
        for one in itertools.islice(ranges, index, None):
            if one.start >= end:
                break
            found.append(one._replace(start=max(one.start, start), end=min(one.end, end)))
    return found

"""Guard pages: pages of an area that fault when they are touched (madvise(2), MADV_GUARD_INSTALL, Linux 6.13).

They stand in page tables alone, so no area shows them; PAGEMAP_SCAN does since Linux 6.15.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
from collections.abc import Iterable

from phaul_engine.native import check, failure, lib, new_error
from phaul_engine.proc.access import open_at
from phaul_engine.proc.maps import Area

from .extents import PAGE_SIZE, Extents, Kind

MADV_GUARD_INSTALL = 102
_NOT_SHOWN = (errno.EINVAL, errno.ENOTTY)


@functools.cache
def installable() -> bool:
    """Whether this kernel has guard pages, tried on a page of our own."""
    libc = ctypes.CDLL(None)
    with mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE) as page:
        room = ctypes.c_char.from_buffer(page)
        works = libc.madvise(ctypes.c_void_p(ctypes.addressof(room)), ctypes.c_size_t(PAGE_SIZE), MADV_GUARD_INSTALL)
        del room
    return bool(works == 0)


@functools.cache
def visible() -> bool:
    """Whether this kernel tells where guard pages are."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        err = new_error()
        if lib.ph_scan_guards(pagemap.fileno(), Extents.whole(PAGE_SIZE, 2 * PAGE_SIZE).handle, Extents().handle, err):
            if err.code in _NOT_SHOWN:
                return False
            raise failure(err)
    return True


def find(pagemap: int, where: Extents, found: Extents) -> None:
    """Append the guard pages within `where` to `found`; `pagemap` is a descriptor of /proc/PID/pagemap."""
    if visible() and len(where):
        err = new_error()
        check(lib.ph_scan_guards(pagemap, where.handle, found.handle, err), err)


def of_process(proc: int, areas: Iterable[Area], known: Extents | None = None) -> Extents:
    """All guard pages of a process. With `known`, only those pages are looked at: it must hold all that were one at
    the last look and all that changed since."""
    found = Extents()
    if not visible():
        return found
    where = known
    if where is not None and not len(where):
        return found
    if where is None:
        where = Extents()
        for area in areas:
            if not area.special:
                where.add(area.start, area.size // PAGE_SIZE)
    pagemap = open_at(proc, "pagemap")
    with open(pagemap, "rb", buffering=0):
        find(pagemap, where, found)
    found.unite()
    return found


class Log:
    """Where the guard pages of processes were and may be, by pid, so that the pass in a freeze need not walk all page
    tables."""

    def __init__(self) -> None:
        self._known: dict[int, Extents] = {}  # by the last look
        self._new: dict[int, Extents] = {}  # among what changed since
        self._told: set[int] = set()  # whose last scan in the freeze is in that

    def know(self, pid: int, found: Extents) -> None:
        """All guard pages of a process, as they are after a scan: the next one tells what changes from now on."""
        self._known[pid], self._new[pid] = found, Extents()

    def note(self, pid: int, changed: Extents, *, last: bool) -> None:
        """Which of the pages that a scan found changed are guard pages. `last`: the process stands, and nothing will
        change any more."""
        self._new.setdefault(pid, Extents()).append(changed, Kind.DATA)
        if last:
            self._told.add(pid)

    def find(self, pid: int, proc: int, areas: Iterable[Area], *, survey: bool) -> Extents:
        """All guard pages of a process. In a survey, and where scans have not told all, everywhere."""
        known, new = self._known.get(pid), self._new.pop(pid, None)
        where = None
        if not survey and pid in self._told and known is not None and new is not None:
            where = Extents(known)
            where.append(new, Kind.DATA)
            where.unite()
        self._told.discard(pid)
        self._known[pid] = of_process(proc, areas, where)
        return self._known[pid]

    def released(self) -> None:
        """The processes run again: no scan has told all."""
        self._told.clear()

    def forget(self, pid: int) -> None:
        """There is no such process any more."""
        self._known.pop(pid, None)
        self._new.pop(pid, None)
        self._told.discard(pid)

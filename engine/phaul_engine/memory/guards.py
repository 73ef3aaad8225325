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

from .extents import PAGE_SIZE, Extents

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

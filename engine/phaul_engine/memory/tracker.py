"""Which pages of a process changed since the last look.

Two backends, chosen by what a probe finds (`available`): userfaultfd WP_ASYNC with PAGEMAP_SCAN (Linux >= 6.7), and
soft-dirty bits with /proc/PID/clear_refs (CONFIG_MEM_SOFT_DIRTY), for which the process has to stand still between the
reading of the bits and their clearing: `needs_stop`.

What neither sees: writes by device (O_DIRECT reads into pinned pages, RDMA, io_uring's fixed buffers), and writes to
shared memory that do not go through a tracked mapping (`SharedMemory` compares hashes for those).
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

from phaul_engine.native import check, failure, ffi, lib, new_error
from phaul_engine.proc.access import open_at
from phaul_engine.proc.maps import Area, read_maps, read_smaps

from . import guards
from .areas import Mapping, Range, private_ranges, within
from .extents import PAGE_SIZE, Extents, Kind

_BATCH = 262144  # extents in one list: 4 MiB
_REPAIRS = 1000  # times one scan registers areas again before it gives up


class Backend(enum.IntFlag):
    """Ways to find changed pages."""

    WP_ASYNC = lib.PH_TRACK_WP_ASYNC
    SOFT_DIRTY = lib.PH_TRACK_SOFT_DIRTY


def available() -> Backend:
    """Which backends work on this kernel, tried on a page of our own. WP_ASYNC is the better one."""
    return Backend(lib.ph_tracker_probe())


class Tracker:
    """One process's private memory, and its mappings of shared memory.

    `proc` is an O_PATH descriptor of /proc/PID. With `uffd`, a userfaultfd that was made inside the process and
    taken with pidfd_getfd(2) (the tracker owns it from then on), the backend is WP_ASYNC, else soft-dirty.
    When the tracker is closed or dies, the process runs on untracked.
    """

    def __init__(self, proc: int, uffd: int | None = None) -> None:
        self.backend = Backend.SOFT_DIRTY if uffd is None else Backend.WP_ASYNC
        self.ranges: list[Range] = []
        self._proc = os.dup(proc)
        self._uffd = -1 if uffd is None else uffd
        self._clear_refs = -1
        self._pagemap = -1
        self._native = _native([])
        self._registered: set[tuple[int, int]] = set()
        self._droppable: set[tuple[int, ...]] = set()  # areas whose contents the kernel may forget, and so may we
        self._copies = Extents()  # private copies of pages of files, as of the last scan
        self._written: dict[
            Mapping, Extents
        ] = {}  # what soft-dirty bits of shared memory said, before they were cleared
        try:
            self._pagemap = open_at(proc, "pagemap")
            if uffd is None:
                self._clear_refs = open_at(proc, "clear_refs", os.O_WRONLY)
            else:
                err = new_error()
                check(lib.ph_uffd_enable(uffd, err), err)
        except BaseException:
            self.close()
            raise

    @property
    def needs_stop(self) -> bool:
        """Whether the process must be stopped during every clearing scan but the first."""
        return self.backend is Backend.SOFT_DIRTY

    def track(self, areas: Sequence[Area]) -> None:
        """Follow exactly the private memory in `areas` (ascending), area by area."""
        new = private_ranges(area for area in areas if area[:2] not in self._droppable)
        if self.backend is Backend.WP_ASYNC:
            wanted = {(one.start, one.end) for one in new}
            for start, end in sorted(wanted - self._registered):
                if not self._register(start, end, areas):
                    self._droppable = {area[:2] for area in read_smaps(self._proc) if "dp" in area.flags}
                    return self.track(areas)
            self._registered = wanted
        self._set_ranges(new)

    def track_mapping(self, mapping: Mapping) -> bool:
        """Follow a mapping of shared memory too. False if that is impossible: it maps a read-only descriptor, so
        that nothing is written through it."""
        if self.backend is Backend.SOFT_DIRTY:
            self._written.setdefault(mapping, Extents())
            return True
        err = new_error()
        if lib.ph_uffd_track(self._uffd, mapping.start, mapping.start + mapping.size, err) == 0:
            return True
        if err.code == errno.EPERM:
            return False
        raise failure(err)

    def forget_mapping(self, mapping: Mapping) -> None:
        """The mapping is no more."""
        self._written.pop(mapping, None)

    def scan(
        self,
        *,
        clear: bool,
        first: bool = False,
        again: bool = False,
        anew: Iterable[tuple[int, int]] = (),
        limit: int = _BATCH,
    ) -> Iterator[Extents]:
        """What changed in the tracked private memory since the last clearing scan, in lists of about `limit` extents.

        `first`: everything that is there (always so for an area tracked since the last scan, with WP_ASYNC). `again`:
        likewise, for areas tracked before: the next scan reports once more what changed before this one. Of the
        stretches in `anew` everything that is there is reported too, and nothing else. With `clear` the next scan
        reports what changes from now on; the last scan, in the freeze, need not clear. The iterator must be run to its
        end.
        """
        soft = self.backend is Backend.SOFT_DIRTY
        everything = again or (soft and first)
        flags = (lib.PH_SCAN_ALL if everything else 0) | (lib.PH_SCAN_CLEAR if clear else 0)
        if soft and first:
            self._clear_bits()
        whole = Extents()
        for start, end in () if everything else anew:
            whole.add(start, (end - start) // PAGE_SIZE)
        whole.unite()
        for extents in self._scan(flags, limit):
            if len(whole):
                extents.unite()
                extents.exclude(whole)
            if len(extents):
                yield extents
        if len(whole):
            yield from self._present(whole, limit)
        if soft and clear and not first:
            self._clear_bits()

    def _scan(self, flags: int, limit: int) -> Iterator[Extents]:
        """One pass over all ranges; what is not registered any more is meanwhile."""
        copies = Extents()
        if self.backend is Backend.WP_ASYNC:
            reverted, err = Extents(), new_error()
            check(lib.ph_scan_reverted(self._pagemap, self._copies.handle, copies.handle, reverted.handle, err), err)
            yield reverted
        scan, repairs, more = self._new_scan(flags, limit), 0, 1
        while more:
            extents, err = Extents(), new_error()
            more = lib.ph_scan_private(scan, self._native, len(self._native), extents.handle, err)
            if more < 0:
                repairs += 1
                if err.code != errno.EPERM or repairs > _REPAIRS:
                    raise failure(err)
                self._repair(scan.index)
            copies.append(extents, Kind.PRIVATE)
            yield extents
        copies.unite()
        self._copies = copies

    def _present(self, stretches: Extents, limit: int) -> Iterator[Extents]:
        """All that is there in `stretches`."""
        native = _native(within(self.ranges, ((start, start + pages * PAGE_SIZE) for start, pages, _ in stretches)))
        scan, more = self._new_scan(lib.PH_SCAN_ALL, limit), 1
        while more:
            extents, err = Extents(), new_error()
            more = check(lib.ph_scan_private(scan, native, len(native), extents.handle, err), err)
            if len(extents):
                yield extents

    def _new_scan(self, flags: int, limit: int) -> Any:
        how = {"pagemap": self._pagemap, "backend": self.backend, "flags": flags, "limit": limit}
        return ffi.new("struct ph_scan *", how)

    def find_guards(self, where: Extents, found: Extents) -> None:
        """Append the guard pages within `where` to `found`."""
        guards.find(self._pagemap, where, found)

    def scan_mapping(self, mapping: Mapping, data: Extents, into: Extents, *, clear: bool) -> None:
        """Append what was written through one mapping to `into`, in offsets; of `data`, what the object holds.

        Soft-dirty bits are those of the whole process, so clearing is left to `scan`: with `clear`, what is reported
        was written before the last clearing scan.
        """
        written = self._written.get(mapping)
        if written is not None:
            into.append(written, Kind.DATA)
            if clear:
                written.clear()
                return
        self._scan_mapping(mapping, data, into, lib.PH_SCAN_CLEAR if clear else 0)

    def close(self) -> None:
        """Let go of the process; with WP_ASYNC that ends the tracking of all its areas."""
        for fd in (self._uffd, self._pagemap, self._clear_refs, self._proc):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = self._clear_refs = self._proc = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _set_ranges(self, ranges: list[Range]) -> None:
        self.ranges = ranges
        self._native = _native(ranges)

    def _scan_mapping(self, mapping: Mapping, data: Extents, into: Extents, flags: int) -> None:
        scan = ffi.new("struct ph_scan *", {"pagemap": self._pagemap, "backend": self.backend, "flags": flags})
        err = new_error()
        check(lib.ph_scan_mapping(scan, *mapping, data.handle, into.handle, err), err)

    def _clear_bits(self) -> None:
        for mapping, written in self._written.items():
            everywhere = Extents.whole(mapping.offset, mapping.offset + mapping.size)
            self._scan_mapping(mapping, everywhere, written, 0)
            written.unite()
        err = new_error()
        check(lib.ph_clear_soft_dirty(self._clear_refs, err), err)

    def _register(self, start: int, end: int, areas: Sequence[Area]) -> bool:
        """Register a stretch; area by area, for neighbours may be refused together. False if there is an area of
        droppable memory in it that nobody knew of."""
        err = new_error()
        if lib.ph_uffd_track(self._uffd, start, end, err) == 0:
            return True
        for area in areas:
            low, high = max(area.start, start), min(area.end, end)
            if low < high and lib.ph_uffd_track(self._uffd, low, high, err) < 0 and err.code != errno.ENOENT:
                if err.code == errno.EINVAL and area[:2] not in self._droppable and self._is_droppable(area):
                    return False
                raise failure(err)
        return True

    def _is_droppable(self, area: Area) -> bool:
        """MAP_DROPPABLE of mmap(2), which userfaultfd refuses."""
        return any(one[:2] == area[:2] and "dp" in one.flags for one in read_smaps(self._proc))

    def _repair(self, index: int) -> None:
        """Register anew what is mapped now where range `index` met memory that is not registered: an area was
        replaced. What is not there any more is left out; the next round's `track` sees to it."""
        broken = self.ranges[index]
        pieces: list[Range] = []
        err = new_error()
        for area in read_maps(self._proc):
            low, high = max(area.start, broken.start), min(area.end, broken.end)
            if low < high and lib.ph_uffd_track(self._uffd, low, high, err) == 0:
                pieces.append(broken._replace(start=low, end=high))
        self._registered.discard((broken.start, broken.end))
        self._set_ranges([*self.ranges[:index], *pieces, *self.ranges[index + 1 :]])


def _native(ranges: Sequence[Range]) -> Any:
    """As `struct ph_range[]`."""
    return ffi.new("struct ph_range[]", [(one.start, one.end, one.flags, 0) for one in ranges])

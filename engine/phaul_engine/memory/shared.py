"""Memory that processes share: memfd, tmpfs files, shared anonymous and SysV memory.

It is sent once, by inode, whoever maps it. What was written is the union over all tracked mappings. Writes that no
mapping sees (write(2), a mapping outside the tree) are found by comparing hashes: the object is added to the source as
`hashed`, and sent with `compare`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from phaul_engine.native import check, lib, new_error

from .areas import Mapping
from .extents import Extents, Kind
from .tracker import Tracker


class SharedMemory:
    """One shared object. `fd` is any descriptor of it, which stays the caller's.

    Holes are always reported (as DROP): the source knows which pages it has sent. `lost` is true from when a
    mapping went away, with what was written through it: then everything has to be compared, by who sets it back.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._mappings: list[tuple[Tracker, Mapping]] = []
        self.lost = False

    def follow(self, mappings: Iterable[tuple[Tracker, Mapping]]) -> None:
        """These are its mappings now. New ones are registered; those that cannot be written through are left out."""
        now = list(mappings)
        there = {(id(tracker), mapping) for tracker, mapping in now}
        known = {(id(tracker), mapping) for tracker, mapping in self._mappings}
        for tracker, mapping in self._mappings:
            if (id(tracker), mapping) not in there:
                tracker.forget_mapping(mapping)
                self.lost = True
        self._mappings = [
            (tracker, mapping)
            for tracker, mapping in now
            if (id(tracker), mapping) in known or tracker.track_mapping(mapping)
        ]

    @property
    def mapped(self) -> bool:
        """Whether it can be written through a mapping of the tree."""
        return bool(self._mappings)

    def everything(self) -> Extents:
        """All data and holes: for the first round, or to be compared."""
        extents = Extents()
        err = new_error()
        check(lib.ph_scan_descriptor(self._fd, os.fstat(self._fd).st_size, extents.handle, err), err)
        return extents

    def scan(self, *, clear: bool, first: bool = False) -> Extents:
        """What was written through any mapping since the last clearing scan, and all holes. `first`: all data."""
        held = self.everything()
        found = Extents()
        for tracker, mapping in self._mappings:
            tracker.scan_mapping(mapping, held, found, clear=clear)
        if first:
            return held
        found.append(held, Kind.DROP)
        found.unite()
        return found

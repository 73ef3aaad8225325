"""Shared anonymous memory and System V segments: objects that several areas, of one process or more, show."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Mapping

from . import calls
from .errors import IMPOSSIBLE, ImageError, cannot_make
from .images.checkpoint import Checkpoint
from .images.pb import ipc_shm_pb2
from .namespaces.base import NewNamespace
from .objects import places, sysv_shm
from .objects.address_space import Status


class SharedMemory:
    """The destination's objects, by the id that areas in the images have. `namespaces` are those of the tree's own."""

    def __init__(self, namespaces: Mapping[tuple[str, int], NewNamespace]) -> None:
        self._namespaces = namespaces
        self._made: dict[int, tuple[Callable[[], None], int]] = {}
        self._segments: list[int] = []

    def descriptor(self, shmid: int, checkpoint: Checkpoint) -> int:
        """Our descriptor of an object, made now if it was not yet."""
        if shmid not in self._made:
            segment = sysv_shm.entry_of(checkpoint, shmid)
            try:
                if segment is None:
                    self._made[shmid] = _make(_extent(shmid, checkpoint))
                else:
                    number, entry = segment
                    self._made[shmid] = self._make_segment(entry, self._namespaces.get(("ipc", number)))
            except IMPOSSIBLE as error:
                raise cannot_make(f"shared memory {shmid}", error) from error
        return self._made[shmid][1]

    def descriptors(self) -> dict[int, int]:
        """All objects made so far: id -> our descriptor."""
        return {shmid: fd for shmid, (_, fd) in self._made.items()}

    def discard(self) -> None:
        """The tree will not run here: segments go with their last user."""
        for ident in self._segments:
            with contextlib.suppress(OSError):  # gone already
                calls.shm_remove(ident)

    def close(self) -> None:
        """Let go of all; what the tree maps lives on."""
        for unmap, fd in self._made.values():
            os.close(fd)
            unmap()
        self._made.clear()

    def _make_segment(
        self, entry: ipc_shm_pb2.ipc_shm_entry, place: NewNamespace | None
    ) -> tuple[Callable[[], None], int]:
        """The same as `_make` for a System V segment, of a namespace of the tree's own, which has it, or of ours."""
        if place is None:
            sysv_shm.create(entry)
            self._segments.append(entry.desc.id)
            address = calls.shm_attach(entry.desc.id)
        else:
            address = places.inside({"ipc": place.descriptor}, lambda: calls.shm_attach(entry.desc.id))
        return lambda: calls.shm_detach(address), _open_mapped(address)


def _extent(shmid: int, checkpoint: Checkpoint) -> int:
    """How large an object must be for all areas that show it."""
    ends: list[int] = [
        vma.pgoff + vma.end - vma.start
        for ident in checkpoint.idents("mm")
        for vma in checkpoint.one("mm", ident).vmas
        if vma.status & Status.ANON_SHARED and vma.shmid == shmid
    ]
    if not ends:
        raise ImageError(f"no area shows shared memory {shmid}")
    return max(ends)


def _make(size: int) -> tuple[Callable[[], None], int]:
    """A mapping of ours (what unmaps it) and, by the kernel's link to it, a descriptor: no memfd, which would show
    another name."""
    area = mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    start = ctypes.c_char.from_buffer(area)
    address = ctypes.addressof(start)
    del start  # a live view would keep the mapping from being closed
    return area.close, _open_mapped(address)


def _open_mapped(address: int) -> int:
    with open("/proc/self/maps") as maps:
        bounds = next(line.split()[0] for line in maps if int(line.split("-")[0], 16) <= address < _end(line))
    return os.open(f"/proc/self/map_files/{bounds}", os.O_RDWR)


def _end(line: str) -> int:
    return int(line.split()[0].split("-")[1], 16)

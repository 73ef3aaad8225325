"""Fifos: pipes that are opened by name (fifo(7)). The name is a file entry of its own in the image."""

from __future__ import annotations

import os
import stat
from typing import ClassVar

from phaul_engine.images.pb import fdinfo_pb2, fifo_pb2

from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import open_again, settle_status
from .pipe import (
    Rebuilt,
    close_all,
    collect_content,
    data_records,
    fill,
    is_fifo,
    other_end_is_elsewhere,
)
from .regular_file import collect_named, open_named, remaps

_MASK = 0xFFFFFFFF
_NAME_IDS = 1 << 29  # ids of the entries that hold the names, above all that descriptions reach


@descriptor_kind
class Fifo(DescriptorKind):
    """A reader that has not seen a writer yet is opened without one: it gets no hang-up. All others are opened while
    the engine holds both ends, so that no opening waits or is refused."""

    name = "fifo"
    types: ClassVar = (fdinfo_pb2.FIFO,)
    settled: ClassVar = ("regf_id",)

    def claims(self, descriptor: Descriptor) -> bool:
        return is_fifo(descriptor) and descriptor.link.startswith("/")

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        pipe_id = descriptor.status.st_ino & _MASK
        named = collect_named(descriptor, _NAME_IDS + file_id, collection)
        collection.checkpoint.put("files", None, named)
        entry = fifo_pb2.fifo_entry(id=file_id, pipe_id=pipe_id, regf_id=named.id)
        result = fdinfo_pb2.file_entry(type=fdinfo_pb2.FIFO, id=file_id, fifo=entry)
        collection.scratch.setdefault(self.name, {}).setdefault(pipe_id, []).append((descriptor, result))
        return result

    def finish(self, collection: Collection) -> None:
        for pipe_id, found in collection.scratch.pop(self.name, {}).items():
            ends = [descriptor for descriptor, _ in found]
            missing = other_end_is_elsewhere(ends)
            if missing == "reading":
                collection.block(
                    ends[0],
                    f"the fifo {ends[0].link}",
                    "its reading end is in a program that stays",
                    "move that program too, or close it",
                )
                continue
            for _, entry in found:
                entry.fifo.wait_writer = missing == "writing"
            collect_content("fifo-data", pipe_id, ends, collection)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        named = restoration.entry(entry.fifo.regf_id)
        if entry.fifo.wait_writer:
            return open_named(named, restoration, os.O_NONBLOCK, fits=_is_fifo)
        pipes = _pipes(restoration)
        pipe_id = entry.fifo.pipe_id
        if pipe_id not in pipes and named.id not in remaps(restoration):
            pipes[pipe_id] = _both(_open_both(named, restoration))
        fd = open_named(named, restoration, os.O_NONBLOCK, fits=_is_fifo)
        if pipe_id not in pipes:
            pipes[pipe_id] = _both(open_again(fd, os.O_RDWR))
        return fd

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        named = restoration.entry(entry.fifo.regf_id)
        record = data_records("fifo-data", restoration).get(entry.fifo.pipe_id)
        pipe = _pipes(restoration).get(entry.fifo.pipe_id)
        if record is not None and pipe is not None:
            fill(pipe, *record)
        settle_status(fd, named.reg.flags, named.reg.fown, restoration)

    def release(self, restoration: Restoration) -> None:
        close_all(restoration.scratch.pop(self.name, {}).values())

    def discard(self, restoration: Restoration) -> None:
        self.release(restoration)


def _pipes(restoration: Restoration) -> dict[int, Rebuilt]:
    pipes: dict[int, Rebuilt] = restoration.scratch.setdefault(Fifo.name, {})
    return pipes


def _open_both(named: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
    again = fdinfo_pb2.file_entry()
    again.CopyFrom(named)
    again.reg.flags = os.O_RDWR
    return open_named(again, restoration, os.O_NONBLOCK, fits=_is_fifo)


def _is_fifo(status: os.stat_result) -> bool:
    return stat.S_ISFIFO(status.st_mode)


def _both(fd: int) -> Rebuilt:
    """One descriptor that is both ends: opening a fifo for both never waits on Linux."""
    return Rebuilt(fd, fd)

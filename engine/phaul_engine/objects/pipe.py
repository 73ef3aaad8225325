"""Pipes: ends, capacity, packet mode and what is in them (pipe(7)).

The content is copied with tee(2) and stays where it is. In packet mode every read of the copy gives one packet, whose
sizes go into the image beside the bytes.

A container's standard descriptors may be pipes to its runtime's monitor, which does not move: the runtime at the
destination, which has started the container there (`catching`), has made others, and the tree gets those.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import termios
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from phaul_engine import calls, catching
from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.pb import fdinfo_pb2, pipe_data_pb2, pipe_pb2

from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import open_again, settle_status, signal_owner, status_flags

MONITORED = "monitored pipes"
"""The option that tells of pipes to the monitor of a container's runtime: for each its inode, and which of the standard
descriptors it was at first."""

_F_SETPIPE_SZ = 1031
_F_GETPIPE_SZ = 1032
_O_LARGEFILE = 0o100000
_MAX_CAPACITY = 1 << 31
_PACKETS = os.O_DIRECT
_MASK = 0xFFFFFFFF  # pipe ids have 32 bits in the image


def reads(flags: int) -> bool:
    """Whether a description with these flags is a reading end."""
    return flags & os.O_ACCMODE != os.O_WRONLY


def writes(flags: int) -> bool:
    """Whether a description with these flags is a writing end."""
    return flags & os.O_ACCMODE != os.O_RDONLY


def collect_content(kind: str, pipe_id: int, ends: list[Descriptor], collection: Collection) -> None:
    """Put capacity and content of a pipe or fifo into image `kind`. A survey leaves the content out."""
    entry = pipe_data_pb2.pipe_data_entry(pipe_id=pipe_id, bytes=0, size=fcntl.fcntl(ends[0].own, _F_GETPIPE_SZ))
    content = b""
    reader = next((end for end in ends if reads(end.info.flags)), None)
    if reader is not None and not collection.survey:  # without a reader nobody will ever see what is in it
        pieces = _copy(reader.own, entry.size)
        content = b"".join(pieces)
        entry.bytes = len(content)
        if len(pieces) > 1 or any(end.info.flags & _PACKETS for end in ends if writes(end.info.flags)):
            entry.phaul_packets.extend(len(piece) for piece in pieces)
    collection.checkpoint.put(kind, None, entry, content)


def _copy(reader: int, capacity: int) -> list[bytes]:
    """The content of a pipe, in the pieces that reads give."""
    if fcntl.ioctl(reader, termios.FIONREAD, bytes(4)) == bytes(4):
        return []
    mine, other = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.fcntl(mine, _F_SETPIPE_SZ, capacity)
        try:
            left = calls.tee(reader, other, capacity)
        except BlockingIOError:  # somebody outside has read it meanwhile
            return []
        pieces = []
        while left:
            pieces.append(os.read(mine, left))
            left -= len(pieces[-1])
        return pieces
    finally:
        os.close(mine)
        os.close(other)


def other_end_is_elsewhere(ends: list[Descriptor]) -> str:
    """Which end, "reading" or "writing", is open only outside of the tree; empty if none is.

    The kernel reports a hang-up (POLLHUP) to readers without a writer and an error (POLLERR) to writers without a
    reader. Duplicates of an end in the tree count as that end, so this is asked only where the tree lacks one.
    """
    if not any(writes(end.info.flags) for end in ends):
        return "" if _poll(ends[0].own) & select.POLLHUP else "writing"
    if not any(reads(end.info.flags) for end in ends):
        return "" if _poll(ends[0].own) & select.POLLERR else "reading"
    return ""


def in_flight(collection: Collection) -> None:
    """Note that descriptors wait in a queue of the tree: a survey does not look at them."""
    collection.scratch["in flight"] = True


def waits(collection: Collection) -> bool:
    """Whether what seems to be outside of the tree may wait in a queue. The pass in the freeze looks at all."""
    return collection.survey and "in flight" in collection.scratch


def _poll(fd: int, wanted: int = 0) -> int:
    poll = select.poll()
    poll.register(fd, wanted)
    return sum(event for _, event in poll.poll(0))


@dataclass
class Rebuilt:
    """A pipe at the destination: both ends, held until the tree runs. Of one to a monitor we have one end, the other is
    -1."""

    reader: int
    writer: int
    reader_given: bool = False
    writer_given: bool = False
    filled: bool = False


def fill(pipe: Rebuilt, entry: pipe_data_pb2.pipe_data_entry, content: bytes) -> None:
    """Give a new pipe its capacity and content, once. Nothing here waits."""
    if pipe.filled:
        return
    pipe.filled = True
    if entry.size > _MAX_CAPACITY or entry.bytes != len(content):
        raise ImageError(f"pipe {entry.pipe_id} has an impossible size")
    packets = list(entry.phaul_packets)
    if packets and sum(packets) != len(content):
        raise ImageError(f"the packets in pipe {entry.pipe_id} do not add up")
    if entry.size and fcntl.fcntl(pipe.writer, _F_GETPIPE_SZ) != entry.size:
        try:
            fcntl.fcntl(pipe.writer, _F_SETPIPE_SZ, entry.size)
        except OSError as error:
            raise RebuildError(
                f"cannot make a pipe of {entry.size} bytes: {error.strerror}",
                advice="raise fs.pipe-max-size and fs.pipe-user-pages-soft on the destination",
            ) from error
    if not content:
        return
    before = fcntl.fcntl(pipe.writer, fcntl.F_GETFL)
    fcntl.fcntl(pipe.writer, fcntl.F_SETFL, before | os.O_NONBLOCK | (_PACKETS if packets else 0))
    try:
        _write(pipe.writer, content, packets)
    finally:
        fcntl.fcntl(pipe.writer, fcntl.F_SETFL, before)


def _write(writer: int, content: bytes, packets: list[int]) -> None:
    start = 0
    for size in packets or [len(content)]:
        if os.write(writer, content[start : start + size]) != size:
            raise RebuildError("a pipe holds less here than at the source")
        start += size


def close_all(pipes: Iterable[Rebuilt]) -> None:
    """Close the engine's ends: from now on only the tree's keep the pipes open."""
    for pipe in pipes:
        for fd in {pipe.reader, pipe.writer} - {-1}:
            os.close(fd)


@descriptor_kind
class Pipe(DescriptorKind):
    """Both ends are made together; descriptions that were opened through /proc are opened so again."""

    name = "pipe"
    types: ClassVar = (fdinfo_pb2.PIPE,)
    settled: ClassVar = ("fown",)

    def claims(self, descriptor: Descriptor) -> bool:
        return descriptor.link.startswith("pipe:[") and not descriptor.info.flags & os.O_PATH

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        pipe_id = descriptor.status.st_ino & _MASK
        collection.scratch.setdefault(self.name, {}).setdefault(pipe_id, []).append(descriptor)
        entry = pipe_pb2.pipe_entry(
            id=file_id,
            pipe_id=pipe_id,
            flags=status_flags(descriptor),
            fown=signal_owner(descriptor, collection),
        )
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.PIPE, id=file_id, pipe=entry)

    def finish(self, collection: Collection) -> None:
        for pipe_id, ends in collection.scratch.pop(self.name, {}).items():
            if pipe_id in _monitored(collection.options):
                _refuse_unread(ends, collection)
                continue
            missing = other_end_is_elsewhere(ends)
            if missing and not waits(collection):
                collection.block(
                    ends[0],
                    f"a pipe ({ends[0].link})",
                    f"its {missing} end is in a program that stays",
                    "move that program too, or start this one with the descriptor on a file or socket",
                )
                continue
            collect_content("pipes-data", pipe_id, ends, collection)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        pipe = _pipe(entry.pipe.pipe_id, restoration)
        flags = entry.pipe.flags
        if not flags & _O_LARGEFILE:  # made by pipe(2): whatever open(2) makes has this flag
            if flags & os.O_ACCMODE == os.O_RDONLY and pipe.reader >= 0 and not pipe.reader_given:
                pipe.reader_given = True
                return fcntl.fcntl(pipe.reader, fcntl.F_DUPFD_CLOEXEC, 0)
            if flags & os.O_ACCMODE == os.O_WRONLY and pipe.writer >= 0 and not pipe.writer_given:
                pipe.writer_given = True
                return fcntl.fcntl(pipe.writer, fcntl.F_DUPFD_CLOEXEC, 0)
        return open_again(max(pipe.reader, pipe.writer), flags & os.O_ACCMODE | os.O_NONBLOCK)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        record = _data(restoration).get(entry.pipe.pipe_id)
        if record is not None:
            fill(_pipe(entry.pipe.pipe_id, restoration), *record)
        settle_status(fd, entry.pipe.flags, entry.pipe.fown, restoration)

    def release(self, restoration: Restoration) -> None:
        close_all(restoration.scratch.pop(self.name, {}).values())
        caught = restoration.options.get(catching.PIPES, {})
        while caught:
            os.close(caught.popitem()[1])

    def discard(self, restoration: Restoration) -> None:
        self.release(restoration)


def _pipe(pipe_id: int, restoration: Restoration) -> Rebuilt:
    pipes: dict[int, Rebuilt] = restoration.scratch.setdefault(Pipe.name, {})
    if pipe_id not in pipes:
        number = _monitored(restoration.options).get(pipe_id)
        pipes[pipe_id] = Rebuilt(*os.pipe2(os.O_CLOEXEC)) if number is None else _of_monitor(number, restoration)
    return pipes[pipe_id]


def _monitored(options: Mapping[str, Any]) -> dict[int, int]:
    """What `MONITORED` says: standard descriptors, by pipe id."""
    return {int(inode) & _MASK: int(number) for inode, number in options.get(MONITORED, ())}


def _refuse_unread(ends: list[Descriptor], collection: Collection) -> None:
    """What the monitor has written and nobody has read stays in the pipe."""
    reader = next((end for end in ends if reads(end.info.flags)), None)
    if reader is not None and not writes(reader.info.flags) and _poll(reader.own, select.POLLIN) & select.POLLIN:
        why, advice = "it would be lost", "try again when the program has read it"
        collection.block(reader, "a pipe from the container's monitor with unread input", why, advice, passing=True)


def _of_monitor(number: int, restoration: Restoration) -> Rebuilt:
    """What the runtime has made here."""
    fd = restoration.options.get(catching.PIPES, {}).get(number)
    if fd is None:
        what = f"the runtime has given the container no pipe here for its standard descriptor {number}"
        raise RebuildError(what, advice="create it there with the same options")
    own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    return Rebuilt(own, -1) if number == 0 else Rebuilt(-1, own)


def _data(restoration: Restoration) -> dict[int, tuple[pipe_data_pb2.pipe_data_entry, bytes]]:
    return data_records("pipes-data", restoration)


def data_records(kind: str, restoration: Restoration) -> dict[int, tuple[pipe_data_pb2.pipe_data_entry, bytes]]:
    """Capacities and contents in an image, by pipe id."""
    found: dict[int, tuple[pipe_data_pb2.pipe_data_entry, bytes]] | None = restoration.cache.get(kind)
    if found is None:
        records = restoration.checkpoint.records(kind)
        found = restoration.cache[kind] = {
            record.message.pipe_id: (record.message, record.payload) for record in records
        }
    return found


def is_fifo(descriptor: Descriptor) -> bool:
    """Whether it is a pipe or a fifo, and not only a place in the file system."""
    return stat.S_ISFIFO(descriptor.status.st_mode) and not descriptor.info.flags & os.O_PATH

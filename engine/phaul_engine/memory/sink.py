"""The page sink: puts what a page source sends in place, or into image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from phaul_engine.native import ffi, lib, new_error

from .extents import Kind, Place
from .stream import Channel, milliseconds, stream_failure
from .threads import StreamThreads, called, released


@dataclass(frozen=True)
class SinkStatistics:
    """Since the sink was made; complete as of the last round that ended. The ns_ are summed over all streams."""

    pages_data: int = 0
    pages_dropped: int = 0
    bytes_wire: int = 0
    ns_receive: int = 0
    ns_decode: int = 0
    ns_write: int = 0


class Record(NamedTuple):
    """A run of pages in an image file: contents at `offset` there, or, as DROP, known to be zero."""

    start: int
    offset: int
    pages: int
    kind: Kind


class PageSink(StreamThreads):
    """A native thread for each channel (which are the sink's from then on), in the order of their streams.

    Nothing is applied until its round is allowed, so that areas can be changed between rounds. Pages that the program
    dropped are written as zeros into a process: no system call drops another process's pages. They cost memory
    there until the program drops or unmaps them again, at most as much as was sent before.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        err = new_error()
        handles = released(channels)
        self._handle: Any = lib.ph_sink_new(handles, len(handles), err)
        if not self._handle:
            raise stream_failure(err)

    def add(self, number: int, place: Place) -> None:
        """Where an object's pages go. Areas must be writable, or place.fd be the process's /proc/PID/mem."""
        called(lib.ph_sink_add, self._handle, number, place.native())

    def fill(self, number: int, uffd: int) -> None:
        """Bring pages of a process where there are none yet in by this userfaultfd of it, whose areas are registered
        (it is duplicated); -1 ends that. Saves the kernel to clear what is written over at once."""
        called(lib.ph_sink_fill, self._handle, number, uffd)

    def add_image(self, number: int, fd: int) -> None:
        """Append an object's pages to the image file `fd`."""
        called(lib.ph_sink_add_image, self._handle, number, fd)

    def remove(self, number: int) -> None:
        """Forget an object."""
        called(lib.ph_sink_remove, self._handle, number)

    def guard(self, start: int, end: int) -> None:
        """Refuse pages for these addresses of any process: there is memory of the engine's own."""
        lib.ph_sink_guard(self._handle, start, end)

    def allow(self, number: int) -> None:
        """Rounds up to `number` may be applied."""
        lib.ph_sink_allow(self._handle, number)

    def wait(self, number: int, timeout: float | None) -> None:
        """Block, without the GIL, until all of round `number` is in place."""
        called(lib.ph_sink_wait, self._handle, number, milliseconds(timeout))

    def fileno(self) -> int:
        """An eventfd: readable when a round is complete or a stream has failed."""
        return int(lib.ph_sink_fd(self._handle))

    def statistics(self) -> SinkStatistics:
        """What was done so far."""
        native = ffi.new("struct ph_sink_stats *")
        lib.ph_sink_stats(self._handle, native)
        return SinkStatistics(*(getattr(native, one.name) for one in fields(SinkStatistics)))

    def records(self, number: int) -> Iterator[Record]:
        """What stands in an image object's file, in its order."""
        count = lib.ph_sink_records(self._handle, number, ffi.NULL, 0)
        native = ffi.new("struct ph_record[]", count)
        lib.ph_sink_records(self._handle, number, native, count)
        for one in native:
            yield Record(one.start, one.offset, one.nr_pages, Kind(one.kind))

    def close(self) -> None:
        """End the threads and close the streams."""
        handle, self._handle = self._handle, ffi.NULL
        if handle:
            lib.ph_sink_free(handle)

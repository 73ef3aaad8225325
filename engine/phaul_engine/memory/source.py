"""The page source: sends what extents name, over as many streams as there are channels."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from phaul_engine.native import ffi, lib, new_error

from .extents import Extents, Place
from .stream import Channel, milliseconds, stream_failure
from .threads import StreamThreads, called, released


class Codec(enum.IntEnum):
    """How contents travel. AUTO compresses what takes less time so, by what is measured all along."""

    RAW = lib.PH_CODEC_RAW
    ZSTD = lib.PH_CODEC_ZSTD
    AUTO = lib.PH_CODEC_AUTO


@dataclass(frozen=True)
class SourceStatistics:
    """Since the source was made; complete as of the last round that ended. The ns_ are summed over all streams."""

    pages_data: int = 0
    pages_zero: int = 0
    pages_dropped: int = 0
    pages_unchanged: int = 0
    pages_gone: int = 0
    bytes_raw: int = 0
    bytes_wire: int = 0
    ns_read: int = 0
    ns_encode: int = 0
    ns_send: int = 0
    ns_throttled: int = 0

    def __sub__(self, earlier: SourceStatistics) -> SourceStatistics:
        """What happened since `earlier`."""
        return SourceStatistics(*(getattr(self, one.name) - getattr(earlier, one.name) for one in fields(self)))


class PageSource(StreamThreads):
    """A native thread for each channel (which are the source's from then on).

    Rounds are numbered from 0. In each: `send` any number of times, `end`, then `wait` or `over`. Objects are added,
    removed and forgotten between rounds.
    """

    def __init__(
        self, channels: Sequence[Channel], *, codec: Codec = Codec.AUTO, level: int = 1, checksum: bool = False
    ) -> None:
        err = new_error()
        handles = released(channels)
        flags = lib.PH_SOURCE_CHECKSUM if checksum else 0
        self._handle: Any = lib.ph_source_new(handles, len(handles), codec, level, flags, err)
        if not self._handle:
            raise stream_failure(err)

    def add(self, number: int, place: Place, *, hashed: bool = False) -> None:
        """Make an object known. `hashed` keeps 8 bytes for every page sent, so that `compare` works."""
        flags = lib.PH_OBJECT_HASHED if hashed else 0
        called(lib.ph_source_add, self._handle, number, place.native(), flags)

    def remove(self, number: int) -> None:
        """Forget an object."""
        called(lib.ph_source_remove, self._handle, number)

    def forget(self, number: int, start: int, end: int) -> None:
        """The destination made [start, end) of an object anew: nothing was sent there."""
        called(lib.ph_source_forget, self._handle, number, start, end)

    def set_bandwidth(self, bytes_per_second: int) -> None:
        """Limit all streams together; 0 is no limit. Takes effect at once."""
        lib.ph_source_set_bandwidth(self._handle, bytes_per_second)

    def send(self, number: int, extents: Extents, *, compare: bool = False, timeout: float | None = None) -> None:
        """Send what `extents` names, in the current round; the list is empty afterwards. `compare` sends only pages
        that differ from what was sent last. Returns at once unless a million extents wait already."""
        flags = lib.PH_SEND_COMPARE if compare else 0
        called(lib.ph_source_send, self._handle, number, extents.handle, flags, milliseconds(timeout))

    def end(self, number: int) -> None:
        """End round `number`: each stream gets its mark behind everything sent."""
        called(lib.ph_source_end, self._handle, number)

    def wait(self, number: int, timeout: float | None) -> None:
        """Block, without the GIL, until all streams have sent their mark of round `number`."""
        called(lib.ph_source_wait, self._handle, number, milliseconds(timeout))

    def fileno(self) -> int:
        """An eventfd: readable when a round has ended or a stream has failed."""
        return int(lib.ph_source_fd(self._handle))

    def statistics(self) -> SourceStatistics:
        """What was done so far."""
        native = ffi.new("struct ph_source_stats *")
        lib.ph_source_stats(self._handle, native)
        return SourceStatistics(*(getattr(native, one.name) for one in fields(SourceStatistics)))

    def close(self) -> None:
        """End the threads and close the streams; what waits is not sent."""
        handle, self._handle = self._handle, ffi.NULL
        if handle:
            lib.ph_source_free(handle)

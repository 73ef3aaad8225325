"""What the page source and the page sink are alike in: native threads, one a stream, that are waited for by rounds."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Sequence
from typing import Any, Self

from phaul_engine.native import ffi, new_error

from .stream import Channel, DeadlineError, readable, stream_failure


class StreamThreads(abc.ABC):
    """A native object with a thread for each stream. `_handle` is NULL once it is closed."""

    _handle: Any

    @abc.abstractmethod
    def wait(self, number: int, timeout: float | None) -> None:
        """Block, without the GIL, until round `number` is over on all streams."""

    @abc.abstractmethod
    def fileno(self) -> int:
        """An eventfd: readable when a round is over or a stream has failed."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the threads and close the streams."""

    async def over(self, number: int) -> None:
        """`wait` in the running loop."""
        while True:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fileno())
            try:
                return self.wait(number, 0)
            except DeadlineError:
                await readable(self.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def released(channels: Sequence[Channel]) -> Any:
    """The native channels, which are no longer the callers'."""
    return ffi.new("struct ph_channel *[]", [channel.release() for channel in channels])


def called(function: Any, *arguments: Any) -> None:
    """Call a native function that takes an error last, and raise what it says."""
    err = new_error()
    if function(*arguments, err) < 0:
        raise stream_failure(err)

"""All descriptors of a process in one call (native/include/ph_proc.h): duplicates, and what /proc tells of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

from phaul_engine.native import failure, ffi, lib, new_error

from .access import open_at

_ROOM = 1 << 14  # bytes for texts, at first
_EACH = 256  # and for each descriptor: most texts have a hundred


class Look(NamedTuple):
    """`own` is our duplicate, which the caller closes, and `text` that of its fdinfo. -errno, and an empty text, where
    there is no such descriptor (any more)."""

    own: int
    text: str


def look_at(proc: int, pidfd: int, numbers: Sequence[int]) -> list[Look]:
    """Look at these descriptors of the process with this /proc directory. One that is closed meanwhile has no text."""
    native, size = ffi.new("struct ph_descriptor[]", len(numbers)), _ROOM + _EACH * len(numbers)
    for one, number in zip(native, numbers, strict=True):
        one.number = number
    directory = open_at(proc, "fdinfo", os.O_PATH)
    try:
        while True:
            room, err = ffi.new("char[]", size), new_error()
            if lib.ph_look_at_descriptors(pidfd, directory, native, len(numbers), room, size, err) == 0:
                break
            if err.code != errno.ENOBUFS:
                raise failure(err)
            size *= 4
    finally:
        os.close(directory)
    texts = bytes(ffi.buffer(room, max((one.at + max(one.size, 0) for one in native), default=0)))
    return [Look(one.own, _text(texts, one.at, one.size)) for one in native]


def _text(texts: bytes, at: int, size: int) -> str:
    return texts[at : at + max(size, 0)].decode("utf-8", "surrogateescape")

"""Frames of the page stream as bytes (engine/native/src/frame.h), with whatever in them."""

from __future__ import annotations

import ctypes
import ctypes.util
import struct
from collections.abc import Sequence

HEADER = struct.Struct("<IBBHQIIIIQ")
EXTENT = struct.Struct("<QII")
MAGIC = 0x52464850
PAGE_SIZE = 4096
CHUNK = 1 << 20
OBJECT = 5

Extents = Sequence[tuple[int, int, int]]  # start, pages, kind: 0 contents, 1 dropped


def frame(
    extents: Extents,
    payload: bytes = b"",
    *,
    magic: int = MAGIC,
    kind: int = 1,
    codec: int = 0,
    flags: int = 0,
    number: int = 0,
    count: int | None = None,
    raw: int | None = None,
    wire: int | None = None,
    checksum: int = 0,
    owner: int = OBJECT,
) -> bytes:
    """A frame's bytes; what is None is as it should be."""
    count = len(extents) if count is None else count
    raw = len(payload) if raw is None else raw
    wire = len(payload) if wire is None else wire
    header = HEADER.pack(magic, kind, codec, flags, owner, number, count, raw, wire, checksum)
    return header + b"".join(EXTENT.pack(*extent) for extent in extents) + payload


def mark(number: int) -> bytes:
    """The end of a round."""
    return frame([], kind=2, number=number)


def compress(content: bytes, level: int = 1) -> bytes:
    """A zstd frame (the library that the engine links to)."""
    zstd = ctypes.CDLL(ctypes.util.find_library("zstd") or "libzstd.so.1")
    zstd.ZSTD_compressBound.restype = zstd.ZSTD_compress.restype = ctypes.c_size_t
    room = ctypes.create_string_buffer(zstd.ZSTD_compressBound(ctypes.c_size_t(len(content))))
    size = zstd.ZSTD_compress(room, ctypes.c_size_t(len(room)), content, ctypes.c_size_t(len(content)), level)
    assert size <= len(room)
    return room.raw[:size]

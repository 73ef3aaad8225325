"""Writes the first inputs of the native fuzzers, which are binary, from what the tests say in words:
python -m tests.fuzz.seeds. What fuzzing finds besides is kept beside them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from tests.page_frames import EXTENT, HEADER, PAGE_SIZE, compress, frame, mark

CORPUS = Path(__file__).with_name("corpus")
_PAGE = bytes(range(256)) * (PAGE_SIZE // 256)
_IMAGE = 6  # the object that is one, in sink.c


def sink() -> Iterable[bytes]:
    """Streams of frames."""
    good = frame([(0, 1, 0)], _PAGE)
    yield good + mark(0)
    yield frame([(0, 1, 0), (PAGE_SIZE, 3, 1)], _PAGE, number=1) + mark(1)
    yield frame([(PAGE_SIZE, 2, 0)], compress(_PAGE * 2), codec=1, raw=2 * PAGE_SIZE) + mark(0)
    yield frame([(0, 1, 0)], _PAGE, owner=_IMAGE) + frame([(PAGE_SIZE, 1, 1)], owner=_IMAGE) + mark(9)
    yield frame([(1 << 62, 1, 0)], _PAGE)
    yield frame([(0, 1, 0)], _PAGE, flags=1)
    yield mark(0) + mark(0xFFFFFFFF)
    yield good[:-1]
    yield good[: HEADER.size + EXTENT.size // 2]


def channel() -> Iterable[bytes]:
    """Hellos and messages, as `channel.c` reads them: each piece behind its length."""
    hello = b"PHAUL\0\0\1" + struct.pack("4B32s", 1, 0, 0, 0, b"i" * 32)
    pages = b"PHAUL\0\0\1" + struct.pack("4B32s", 2, 1, 3, 0, b"i" * 32)
    message = struct.pack("<I", 5) + b"hello"
    yield _pieces(hello + message + message, 255)
    yield _pieces(pages + message, 7)
    yield _pieces(hello + struct.pack("<I", 0) + message, 3)
    yield _pieces(hello + struct.pack("<I", 300) + bytes(300), 255)
    yield _pieces(hello + struct.pack("<I", (64 << 20) + 1), 255)
    yield b"\0" + _pieces(hello, 200)


def extents() -> Iterable[bytes]:
    """Operations: what, from where, how many."""
    yield bytes((0, 1, 3, 0, 4, 1, 2, 2, 1, 3, 0, 0))
    yield bytes((0, 9, 1, 4, 9, 1, 0, 8, 1, 3, 0, 0))
    yield bytes((2, 0, 255, 0, 5, 5, 3, 0, 0, 0, 200, 15, 3, 0, 0))


def _pieces(content: bytes, size: int) -> bytes:
    cut = (content[at : at + size] for at in range(0, len(content), size))
    return b"".join(bytes([len(piece)]) + piece for piece in cut)


def main() -> None:
    """Write all of them."""
    for make in (sink, channel, extents):
        directory = CORPUS / make.__name__
        directory.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(make()):
            (directory / f"seed-{number}").write_bytes(content)


if __name__ == "__main__":
    main()

"""What regular files hold: runs of data between holes, and which blocks of a large file have changed.

A small file is sent whole whenever it was touched. Of a large one the source remembers a hash of each block as it was
sent, and sends those whose hash is another; block and hash are of one reading, so what was sent is what is remembered.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator

from .wire import Outbox

SMALL = 1 << 18  # bytes of a file that is sent whole
BLOCK = 1 << 16
_DIGEST = 16  # bytes of a hash


def runs(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data: begin and end. All of it, where the file system does not tell."""
    position = 0
    while position < size:
        try:
            begin = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            if error.errno != errno.EINVAL:
                raise
            begin, end = position, size
        begin, end = min(begin, size), min(end, size)
        if begin < end:
            yield begin, end
        position = max(end, position + 1)


def whole(fd: int, size: int) -> tuple[list[list[int]], bytes]:
    """Runs of a small file, as offset and length, and what they hold."""
    found: list[list[int]] = []
    parts: list[bytes] = []
    for begin, end in runs(fd, size):
        part = os.pread(fd, end - begin, begin)
        found.append([begin, len(part)])
        parts.append(part)
    return found, b"".join(parts)


class Blocks:
    """A large file as the destination has it: the hash of each block with data, by number."""

    def __init__(self) -> None:
        self._hashes: dict[int, bytes] = {}
        self._known = False

    def learn(self, fd: int, size: int) -> None:
        """The destination has the same as this file."""
        for number, _ in _blocks(runs(fd, size)):
            self._hashes[number] = _hash(os.pread(fd, BLOCK, number * BLOCK))
        self._known = True

    def send(self, fd: int, path: str, size: int, outbox: Outbox, *, fresh: bool, tree: int) -> None:
        """Send what is other than there; `fresh` if nothing is there."""
        outbox.put(op="put", tree=tree, path=path, size=size)
        seen: set[int] = set()
        end = 0
        for number, ranges in _blocks(runs(fd, size)):
            if not fresh and not self._known and end < number:  # somebody else has sent something, perhaps here
                _hole(path, end, number, outbox, tree)
            end = number + 1
            seen.add(number)
            self._block(fd, path, number, ranges, outbox, tree)
        last = -(-size // BLOCK)
        if not fresh and not self._known and end < last:
            _hole(path, end, last, outbox, tree)
        for number in self._hashes.keys() - seen:
            del self._hashes[number]
            if number * BLOCK < size:
                _hole(path, number, number + 1, outbox, tree)
        self._known = True

    def _block(self, fd: int, path: str, number: int, ranges: list[tuple[int, int]], outbox: Outbox, tree: int) -> None:
        """Holes in it stay, or become, holes there."""
        begin = number * BLOCK
        block = os.pread(fd, BLOCK, begin)
        digest = _hash(block)
        if self._hashes.get(number) == digest:
            return
        self._hashes[number] = digest
        if ranges[0][0] > begin or len(ranges) > 1 or ranges[-1][1] < begin + len(block):
            _hole(path, number, number + 1, outbox, tree)
        for first, last in ranges:
            outbox.put(block[first - begin : last - begin], op="data", tree=tree, path=path, offset=first)


def _hash(block: bytes) -> bytes:
    return hashlib.sha256(block).digest()[:_DIGEST]


def _blocks(found: Iterable[tuple[int, int]]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Each block that has data, with where that is."""
    number, ranges = -1, list[tuple[int, int]]()
    for begin, end in found:
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            if block != number and ranges:
                yield number, ranges
                ranges = []
            number = block
            ranges.append((max(begin, block * BLOCK), min(end, (block + 1) * BLOCK)))
    if ranges:
        yield number, ranges


def _hole(path: str, first: int, end: int, outbox: Outbox, tree: int) -> None:
    """There is nothing in these blocks."""
    outbox.put(op="hole", tree=tree, path=path, offset=first * BLOCK, length=(end - first) * BLOCK)

"""What regular files hold: runs of data between holes, and which blocks of a large file have changed.

A small file is sent whole whenever it was touched. Of a large one the source remembers a hash of each block as it was
sent, and sends those whose hash is another; block and hash are of one reading, so what was sent is what is remembered.
"""

from __future__ import annotations

import collections
import errno
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, TypeAlias

from .wire import Outbox

SMALL = 1 << 18  # bytes of a file that is sent whole
BLOCK = 1 << 16
_DIGEST = 16  # bytes of a hash
_SPAN = 16  # blocks that are read at once
_BRIEF = 1 << 22  # bytes that are hashed before another thread has begun
_AHEAD = 32  # spans that are read before those before them were sent
_Extent: TypeAlias = tuple[int, list[tuple[int, int]]]
"""The number of a block, and where in the file it has data."""


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
        for block in self._changed(fd, size):
            self._hashes[block.number] = block.digest
        self._known = True

    def send(self, fd: int, path: str, size: int, outbox: Outbox, *, fresh: bool, tree: int) -> None:
        """Send what is other than there; `fresh` if nothing is there."""
        outbox.put(op="put", tree=tree, path=path, size=size)
        seen: set[int] = set()
        end = 0
        for block in self._changed(fd, size):
            number = block.number
            if not fresh and not self._known and end < number:  # somebody else has sent something, perhaps here
                _hole(path, end, number, outbox, tree)
            end = number + 1
            seen.add(number)
            if block.content:
                self._hashes[number] = block.digest
                block.send(path, outbox, tree)
        last = -(-size // BLOCK)
        if not fresh and not self._known and end < last:
            _hole(path, end, last, outbox, tree)
        for number in self._hashes.keys() - seen:
            del self._hashes[number]
            if number * BLOCK < size:
                _hole(path, number, number + 1, outbox, tree)
        self._known = True

    def _changed(self, fd: int, size: int) -> Iterator[_Block]:
        """All blocks with data, in order; those that have changed with what they hold. Those of a file that takes long
        are read and hashed by several threads, a little ahead."""
        spans = _spans(_blocks(runs(fd, size)))
        if size <= _BRIEF:
            for span in spans:
                yield from self._read(fd, span)
            return
        waiting: collections.deque[Future[list[_Block]]] = collections.deque()
        pool = _pool()
        try:
            for span in spans:
                waiting.append(pool.submit(self._read, fd, span))
                if len(waiting) > _AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            wait(waiting)  # they read the descriptor

    def _read(self, fd: int, span: list[_Extent]) -> list[_Block]:
        begin = span[0][0] * BLOCK
        content = memoryview(os.pread(fd, len(span) * BLOCK, begin))
        found = []
        for number, ranges in span:
            block = content[number * BLOCK - begin :][:BLOCK]
            digest = hashlib.sha256(block).digest()[:_DIGEST]
            same = self._hashes.get(number) == digest
            found.append(_Block(number, ranges, digest, b"" if same else block))
        return found


class _Block(NamedTuple):
    """A block of a file; it has no content if it is known."""

    number: int
    ranges: list[tuple[int, int]]
    digest: bytes
    content: bytes | memoryview

    def send(self, path: str, outbox: Outbox, tree: int) -> None:
        """Holes in it stay, or become, holes there."""
        begin = self.number * BLOCK
        if self.ranges[0][0] > begin or len(self.ranges) > 1 or self.ranges[-1][1] < begin + len(self.content):
            _hole(path, self.number, self.number + 1, outbox, tree)
        for first, last in self.ranges:
            outbox.put(self.content[first - begin : last - begin], op="data", tree=tree, path=path, offset=first)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "phaul-hash")


def _spans(found: Iterable[_Extent]) -> Iterator[list[_Extent]]:
    """Blocks that follow each other, some at a time."""
    span: list[_Extent] = []
    for one in found:
        if span and (len(span) == _SPAN or one[0] != span[-1][0] + 1):
            yield span
            span = []
        span.append(one)
    if span:
        yield span


def _blocks(found: Iterable[tuple[int, int]]) -> Iterator[_Extent]:
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

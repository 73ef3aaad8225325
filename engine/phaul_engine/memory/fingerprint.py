"""Hashes of a whole tree's memory, to be compared between two hosts that hold the same.

A page is hashed in C (XXH64). What is compared, and sent, is one digest for each run of at most 1 MiB: a difference is
named by its object and addresses.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import NamedTuple

from phaul_engine.errors import EngineError

from .extents import PAGE_SIZE, Extents, Place
from .files import hash_pages

_RUN = 256  # pages
_DIGEST = 16  # bytes
_HASH = 8
_ENTRY = struct.Struct(f"<QQI{_DIGEST}s")


class Print(NamedTuple):
    """One run of pages of an object (see objects.py), and what they hold."""

    number: int
    start: int
    pages: int
    digest: bytes


def fingerprint(number: int, place: Place, extents: Extents) -> list[Print]:
    """Of all pages that `extents` names in an object."""
    hashes = memoryview(hash_pages(place, extents))
    prints: list[Print] = []
    position = 0
    for start, pages, _ in extents:
        for first in range(0, pages, _RUN):
            count = min(_RUN, pages - first)
            piece = hashes[position : position + count * _HASH]
            digest = hashlib.blake2b(piece, digest_size=_DIGEST).digest()
            prints.append(Print(number, start + first * PAGE_SIZE, count, digest))
            position += count * _HASH
    return prints


def pack(prints: Iterable[Print]) -> bytes:
    """As bytes, for the other host."""
    return b"".join(_ENTRY.pack(*one) for one in prints)


def unpack(data: bytes) -> list[Print]:
    """The opposite of `pack`; EngineError for anything else."""
    if len(data) % _ENTRY.size:
        raise EngineError("fingerprints of memory end within one")
    prints = [Print(*fields) for fields in _ENTRY.iter_unpack(data)]
    if any(not 0 < one.pages <= _RUN or one.start % PAGE_SIZE for one in prints):
        raise EngineError("fingerprints are of impossible runs of memory")
    return prints


def differences(prints: Iterable[Print], places: dict[int, Place]) -> list[str]:
    """What of `prints` is not so here, in words. `places` says where each object is here."""
    by_object: dict[int, list[Print]] = {}
    for one in prints:
        by_object.setdefault(one.number, []).append(one)
    found: list[str] = []
    for number, expected in by_object.items():
        if number not in places:
            found.append(f"object {number:#x} is not here")
            continue
        extents = Extents()
        for one in expected:
            extents.add(one.start, one.pages)
        hashes = memoryview(hash_pages(places[number], extents))  # in the order of the runs, however they grew together
        position = 0
        for one in expected:
            size = one.pages * _HASH
            digest = hashlib.blake2b(hashes[position : position + size], digest_size=_DIGEST).digest()
            position += size
            if digest != one.digest:
                end = one.start + one.pages * PAGE_SIZE
                found.append(f"object {number:#x}: {one.start:#x}-{end:#x}")
    return found

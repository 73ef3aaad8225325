"""Fingerprints of memory: what is the same compares as the same, and a difference is named."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from phaul_engine.errors import EngineError
from phaul_engine.memory.extents import PAGE_SIZE, Extents, Place
from phaul_engine.memory.fingerprint import differences, fingerprint, pack, unpack

PAGES = 600


@pytest.fixture
def places() -> Iterator[tuple[Place, Place]]:
    """Two objects of the same random contents."""
    content = os.urandom(PAGES * PAGE_SIZE)
    fds = [os.memfd_create("object") for _ in range(2)]
    for fd in fds:
        os.pwrite(fd, content, 0)
    yield Place(0, fds[0]), Place(0, fds[1])
    for fd in fds:
        os.close(fd)


def test_equal_memory_has_no_differences(places: tuple[Place, Place]) -> None:
    prints = fingerprint(7, places[0], Extents.whole(0, PAGES * PAGE_SIZE))
    assert sum(one.pages for one in prints) == PAGES
    assert differences(unpack(pack(prints)), {7: places[1]}) == []


def test_one_byte_is_found_and_named(places: tuple[Place, Place]) -> None:
    prints = fingerprint(7, places[0], Extents.whole(0, PAGES * PAGE_SIZE))
    byte = os.pread(places[1].fd, 1, 300 * PAGE_SIZE + 5)
    os.pwrite(places[1].fd, bytes([byte[0] ^ 1]), 300 * PAGE_SIZE + 5)
    assert differences(prints, {7: places[1]}) == ["object 0x7: 0x100000-0x200000"]
    assert differences(prints, {}) == ["object 0x7 is not here"]


def test_what_is_no_list_of_prints_is_refused(places: tuple[Place, Place]) -> None:
    prints = fingerprint(7, places[0], Extents.whole(0, PAGE_SIZE))
    with pytest.raises(EngineError, match="end within one"):
        unpack(pack(prints)[:-1])

"""Which areas can be followed: those that the images know of."""

from __future__ import annotations

from phaul_engine.memory.areas import described
from phaul_engine.proc.maps import Area

HEAP = Area(0x10000, 0x20000, 3, False, 0, 0, 0, "[heap]")
FILE = Area(0x30000, 0x34000, 1, False, 0x5000, 7, 99, "/lib/libc.so")
RING = Area(0x40000, 0x48000, 3, True, 0, 1, 5, "/dev/zero (deleted)")


def test_what_is_the_same_is_whole() -> None:
    assert described([HEAP, FILE, RING], [HEAP, FILE, RING]) == [HEAP, FILE, RING]
    protected = HEAP._replace(prot=0)
    assert described([protected], [HEAP]) == [protected]


def test_what_has_grown_since_is_not_followed_yet() -> None:
    assert described([HEAP._replace(end=0x28000)], [HEAP]) == [HEAP]
    assert described([RING._replace(end=0x50000)], [RING]) == []


def test_what_has_shrunk_or_split_since_is_what_is_left() -> None:
    parts = [HEAP._replace(end=0x14000), HEAP._replace(start=0x18000)]
    assert described(parts, [HEAP]) == parts
    tail = FILE._replace(start=0x32000, offset=0x7000)
    assert described([tail], [FILE]) == [tail]
    assert described([HEAP], [parts[0], parts[1]]) == parts


def test_what_lies_there_now_instead_is_not_followed() -> None:
    assert described([FILE._replace(ino=100)], [FILE]) == []
    assert described([FILE._replace(offset=0)], [FILE]) == []
    assert described([HEAP._replace(start=0x30000, end=0x34000)], [FILE]) == []
    assert described([RING._replace(shared=False)], [RING]) == []

"""/proc/PID/uid_map and gid_map: which ids stand for which in a task's user namespace (user_namespaces(7))."""

from __future__ import annotations

from typing import TypeAlias

from .access import read_text

OVERFLOW = 65534
"""Whoever has no number (/proc/sys/kernel/overflowuid)."""


IdMap: TypeAlias = tuple[tuple[int, int, int], ...]
"""The first number in the namespace, the first in the reader's, how many."""


def read_id_map(proc: int, name: str) -> IdMap:
    """The map `name` of a task."""
    extents = []
    for line in read_text(proc, name).splitlines():
        first, lower, count = map(int, line.split())
        extents.append((first, lower, count))
    return tuple(extents)


def inside(extents: IdMap, number: int) -> int:
    """A number of the reader's as the namespace has it; the overflow id if it is not in it."""
    for first, lower, count in extents:
        if lower <= number < lower + count:
            return first + number - lower
    return OVERFLOW


def outside(extents: IdMap, number: int) -> int:
    """The opposite."""
    return inside(tuple((lower, first, count) for first, lower, count in extents), number)

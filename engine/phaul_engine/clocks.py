"""CLOCK_MONOTONIC and CLOCK_BOOTTIME of a tree: what they show inside its time namespace (time_namespaces(7))."""

from __future__ import annotations

import functools
import os
import time
from typing import NamedTuple

from .proc.access import open_process, read_text

_SECOND = 1_000_000_000


class Clocks(NamedTuple):
    """Nanoseconds."""

    monotonic: int
    boottime: int

    def minus(self, other: Clocks) -> Clocks:
        """How far ahead of `other`."""
        return Clocks(self.monotonic - other.monotonic, self.boottime - other.boottime)


def offsets(proc: int) -> Clocks:
    """The offsets of a process's time namespace against the machine's own clocks."""
    found = {}
    for line in read_text(proc, "timens_offsets").splitlines():
        name, seconds, nanoseconds = line.split()
        found[name] = int(seconds) * _SECOND + int(nanoseconds)
    return Clocks(found.get("monotonic", 0), found.get("boottime", 0))


def own_clocks() -> Clocks:
    """The clocks as we see them now."""
    return Clocks(time.clock_gettime_ns(time.CLOCK_MONOTONIC), time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def machine_clocks() -> Clocks:
    """The machine's own clocks, whatever our own time namespace shows."""
    return own_clocks().minus(_own_offsets())


@functools.cache
def _own_offsets() -> Clocks:
    """Those of our own time namespace, which we never leave."""
    proc = open_process(os.getpid())
    try:
        return offsets(proc)
    finally:
        os.close(proc)


def tree_clocks(proc: int) -> Clocks:
    """The clocks as the process with this /proc directory sees them now."""
    machine, theirs = machine_clocks(), offsets(proc)
    return Clocks(machine.monotonic + theirs.monotonic, machine.boottime + theirs.boottime)

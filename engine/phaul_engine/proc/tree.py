"""The processes below a process, and their threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from phaul_engine.errors import EngineError, GoneError

from .access import list_numbers, open_process, read_bytes
from .stat import parse_stat


@dataclass(frozen=True)
class Process:
    """One process of a tree, numbers of the reader's pid namespace, `start` in clock ticks after boot.

    A zombie is here too (`dead`), with no threads but itself.
    """

    pid: int
    ppid: int
    pgrp: int
    session: int
    start: int
    comm: str
    dead: bool
    threads: tuple[int, ...]
    children: tuple[Process, ...]

    def __iter__(self) -> Iterator[Process]:
        """It and all below it, a parent before its children."""
        yield self
        for child in self.children:
            yield from child

    @property
    def identity(self) -> tuple[int, int]:
        """What names this process and no later one of the same pid."""
        return self.pid, self.start


def threads(proc: int) -> tuple[int, ...]:
    """The thread ids of a process, ascending."""
    return tuple(list_numbers(proc, "task"))


def children(proc: int) -> tuple[int, ...]:
    """The children of all threads of a process, ascending.

    The kernel's list is only reliable while parent and children are stopped (proc_tid_children(5)): one that is being
    born or reaped may be missed. Who needs certainty asks again after stopping what it found.
    """
    found: set[int] = set()
    for tid in threads(proc):
        try:
            found.update(int(pid) for pid in read_bytes(proc, f"task/{tid}/children").split())
        except GoneError:  # a thread that ended meanwhile; its children went to another thread
            continue
    return tuple(sorted(found))


def read_tree(pid: int) -> Process:
    """The tree under `pid`. Raises GoneError if `pid` itself is not there; a child that vanishes is left out."""
    proc = open_process(pid)
    try:
        stat = parse_stat(read_bytes(proc, "stat"))
        below = []
        for child in children(proc):
            try:
                below.append(read_tree(child))
            except GoneError:
                continue
        return Process(
            pid=pid,
            ppid=stat.ppid,
            pgrp=stat.pgrp,
            session=stat.session,
            start=stat.start,
            comm=stat.comm,
            dead=stat.dead,
            threads=threads(proc),
            children=tuple(below),
        )
    finally:
        os.close(proc)


def start_time(proc: int) -> int:
    """Start time of a process, in clock ticks after boot."""
    return parse_stat(read_bytes(proc, "stat")).start


def open_verified(pid: int, start: int) -> int:
    """An O_PATH descriptor of the process directory of `pid`, if that is still the process that began at `start`."""
    proc = open_process(pid)
    try:
        if start_time(proc) == start:
            return proc
    except EngineError:
        os.close(proc)
        raise
    os.close(proc)
    raise GoneError(f"pid {pid} is another process now")

"""File locks as /proc/locks and the `lock:` lines of fdinfo show them (proc_locks(5), fs/locks.c)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from phaul_engine.errors import EngineError


@dataclass(frozen=True)
class FileLock:
    """One lock.

    `kind` is POSIX (fcntl), FLOCK, OFDLCK (open file description lock), LEASE, DELEG or ACCESS; `access` is READ,
    WRITE or UNLCK. `pid` is the owner in the reader's pid namespace, -1 for OFDLCK. `start` and `end` are the first
    and last byte; `end` is -1 for "to the end of the file". `waiting` marks a request that is blocked by the lock
    before it in /proc/locks.
    """

    kind: str
    mandatory: bool
    access: str
    pid: int
    dev: int
    ino: int
    start: int
    end: int
    waiting: bool = False


def parse_lock(line: str) -> FileLock:
    """One line, without fdinfo's `lock:` prefix: `1: POSIX  ADVISORY  WRITE 812 fe:00:2146533 0 EOF`."""
    words = line.split()
    try:
        waiting = words[1] == "->"
        kind, mode, access, pid, where, start, end = words[2 if waiting else 1 :]
        major, minor, ino = where.split(":")
        return FileLock(
            kind=kind,
            mandatory=mode == "MANDATORY",
            access=access,
            pid=int(pid),
            dev=os.makedev(int(major, 16), int(minor, 16)),
            ino=int(ino),
            start=int(start),
            end=-1 if end == "EOF" else int(end),
            waiting=waiting,
        )
    except (ValueError, IndexError) as error:
        raise EngineError(f"a file lock in an unknown form: {line!r}") from error


def read_locks() -> list[FileLock]:
    """All locks that /proc/locks shows, of every process."""
    with open("/proc/locks", encoding="ascii") as file:
        return [parse_lock(line) for line in file]

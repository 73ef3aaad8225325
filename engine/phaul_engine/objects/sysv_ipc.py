"""System V semaphores and message queues (sysvipc(7)): found as far as the kernel tells, and then a blocker.

They belong to an IPC namespace, and no process is said to use one. What can be known: which process was the last to
operate on each semaphore (semctl(2), GETPID), to send to a queue and to receive from it (/proc/sysvipc/msg). If one of
those is of the tree, the tree works with the object. A set or queue that the tree has asked for (semget, msgget), but
that others were the last to use, or nobody, is not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from phaul_engine import calls

from .base import Collection, Owner

_SETS, _QUEUES = Path("/proc/sysvipc/sem"), Path("/proc/sysvipc/msg")
_ADVICE = "let the program remove it, or end it and start it there"


def judge(owners: Mapping[int, Owner], collection: Collection) -> None:
    """Put into the blockers what the processes of the tree (`owners`, by our pids) are known to use."""
    for ident, key, pids in (*_semaphores(), *_queues()):
        owner = next((owners[pid] for pid in pids if pid in owners), None)
        if owner is not None:
            why = "such objects belong to this host, not to a process, and are not carried"
            collection.block(owner, f"a user of System V {ident} (key {key & 0xFFFFFFFF:#x})", why, _ADVICE)


def _semaphores() -> Iterator[tuple[str, int, list[int]]]:
    """Each set: what it is, its key, and who was the last to operate on each of its semaphores."""
    for key, ident, _, count, *_ in _rows(_SETS):
        with suppress(OSError):  # it was removed meanwhile
            yield f"semaphore set {ident}", key, [calls.semaphore_user(ident, number) for number in range(count)]


def _queues() -> Iterator[tuple[str, int, list[int]]]:
    """Each queue: what it is, its key, and who was the last to send and to receive."""
    for key, ident, _, _, _, sender, receiver, *_ in _rows(_QUEUES):
        yield f"message queue {ident}", key, [sender, receiver]


def _rows(path: Path) -> Iterator[Sequence[int]]:
    """The lines of a table; permissions, the third column, are octal, and not read as such. Without such objects in
    the kernel there is no table."""
    with suppress(FileNotFoundError):
        for line in path.read_text().splitlines()[1:]:
            yield [int(word) for word in line.split()]

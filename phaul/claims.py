"""Which unfinished migrations work on a process, so that no second one does, nor a dump.

What a journal's row lists, everything below it, and everything in the cgroup that the migration made, is that
migration's until its row has ended. Who wants to move processes looks and makes its own row under one lock
(`exclusively`): of two that begin at the same moment, one is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from phaul_engine.cgroup import path_of
from phaul_engine.errors import EngineError, GoneError
from phaul_engine.proc.access import open_process
from phaul_engine.proc.stat import read_stat
from phaul_engine.proc.tree import read_tree

from phaul.errors import JournalError, RefusedError
from phaul.events import Finding
from phaul.journal import Row, Store, Task
from phaul.migration import Role


@dataclass(frozen=True)
class Claim:
    """A process that an unfinished migration works on; `row` is that migration's."""

    pid: int
    row: Row

    def __str__(self) -> str:
        doing = f"is being moved{f' to {self.row.peer}' if self.row.peer else ''}"
        if self.row.role is Role.DESTINATION:
            doing = "has just arrived here, or is about to,"
        return f"pid {self.pid} {doing} by migration {self.row.migration} ({self.row.state})"

    @property
    def advice(self) -> str:
        """What to do about it."""
        name = self.row.migration
        if self.row.owned:
            return f"wait for it (phaul status {name}), or call it off where it was started"
        return f"nobody works on it any more: phaul resolve {name}"

    @property
    def finding(self) -> Finding:
        """For a preflight."""
        return Finding("blocker", "claimed", str(self), self.advice)


def find(store: Store, root: int) -> list[Claim]:
    """The migrations that work on a part of the tree under `root`, or on a tree that it is part of. Each is named with
    one process of it."""
    try:
        tree = [process.pid for process in read_tree(root)]
    except GoneError:
        return []
    above = _ancestors(root)
    claims = []
    for row in _unfinished(store):
        pid = _listed([*tree, *above], row) or _held(tree, row)
        if pid:
            claims.append(Claim(pid, row))
    return claims


def refuse(store: Store, root: int) -> None:
    """RefusedError if another migration works on a part of that tree, or on a tree that it is part of."""
    for claim in find(store, root):
        raise RefusedError(str(claim), advice=claim.advice)


@contextlib.contextmanager
def exclusively(store: Store) -> Iterator[None]:
    """Between `refuse` and the making of a row nobody else makes one."""
    store.prepare()
    lock = os.open(store.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _unfinished(store: Store) -> Iterator[Row]:
    """A row that cannot be read says nothing about whose it is: `phaul status` complains of it."""
    for name, role in store.names():
        with contextlib.suppress(JournalError):
            journal = store.open(name, role)
            if journal is not None:
                with journal:
                    if not journal.row.ended and journal.row.same_boot:
                        yield journal.row


def _listed(pids: Iterable[int], row: Row) -> int:
    """A process that the row lists, 0 if none. What has arrived is nobody's any more but for its cgroup."""
    if row.role is Role.DESTINATION:
        return 0
    listed = set(row.tasks)
    for pid in pids:
        with contextlib.suppress(GoneError):
            if Task.of(pid) in listed:
                return pid
    return 0


def _held(pids: Iterable[int], row: Row) -> int:
    """A process in the cgroup that the row made, 0 if none."""
    for pid in pids if row.cgroup else ():
        with contextlib.suppress(EngineError):
            if path_of(pid) == row.cgroup:
                return pid
    return 0


def _ancestors(pid: int) -> list[int]:
    """The processes above one, the nearest first."""
    found: list[int] = []
    while pid > 1:
        try:
            proc = open_process(pid)
        except GoneError:
            break
        try:
            pid = read_stat(proc).ppid
        finally:
            os.close(proc)
        if pid > 0:
            found.append(pid)
    return found

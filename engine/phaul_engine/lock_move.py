"""Exclusive file locks of a tree on the move.

What a program writes to is on storage that both hosts see, so the copy at the destination can take an exclusive lock
only after the frozen copy has given it up; and if the tree stays, it must have all of them again before it runs.

A POSIX lock belongs to a descriptor table: only a task that has it can drop the lock, so that is done while programs
still run inside; and to take it again the tree is seized while it is frozen, and thawed only then. The others belong to
open file descriptions: a duplicate of ours does for them.

Where somebody waits for such a lock, he would get it in between: that is a blocker.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import calls
from .cgroup import Hold
from .errors import EngineError, GoneError, TargetError
from .gadgets import find_gadgets
from .images.pb import file_lock_pb2
from .objects import file_locks, mounted
from .objects.base import Collection
from .proc.access import open_process
from .proc.locks import FileLock, read_locks
from .program import Program
from .target import Tracer, Tree, Visit, stop_tree

KIND = "file-locks"  # of the deed in a journal; only the last one counts

Note = Callable[[dict[str, Any]], None]

_STOP_MS = 5000
_PAUSE = 0.02  # seconds between tries
_MOVING = (file_locks.FLOCK, file_locks.OFD)


class Mark(NamedTuple):
    """One lock as a journal has it; `pid` is a number of our pid namespace."""

    pid: int
    fd: int
    inode: int
    flag: int
    start: int
    length: int

    @property
    def entry(self) -> file_lock_pb2.file_lock_entry:
        """As an image has it."""
        lock = file_lock_pb2.file_lock_entry(flag=self.flag, type=fcntl.F_WRLCK, pid=self.pid, fd=self.fd)
        lock.start, lock.len = self.start, self.length
        return lock


def waiters(collection: Collection) -> None:
    """Put into the blockers who waits for an exclusive lock of the tree, but for those that it has dropped by now. On a
    file system that comes along nobody else can."""
    ours = {
        (lock.dev, lock.ino)
        for descriptor in collection.descriptors.values()
        for lock in descriptor.info.locks
        if (collection.survey or not is_posix(lock)) and not mounted.comes_along(lock.dev, collection)
    }
    if not ours:  # the kernel takes milliseconds to show all locks
        return
    for lock in read_locks():
        if lock.waiting and (lock.dev, lock.ino) in ours and lock.pid not in collection.inner_pids:
            where = next(one for one in collection.descriptors.values() if _holds(one.info.locks, lock))
            collection.block(
                where,
                "a file under a lock that somebody waits for",
                f"pid {lock.pid} would get it while the program moves",
                "end that process, or try again when it waits no more",
                passing=True,
            )


def _holds(locks: Iterable[FileLock], other: FileLock) -> bool:
    return any((lock.dev, lock.ino) == (other.dev, other.ino) for lock in locks)


class Surrender:
    """What a tree gives up in the freeze. `note` gets the deed to write down, before anything is done."""

    def __init__(self, root: int, note: Note) -> None:
        self._root = root
        self._note = note
        self._given: list[Mark] = []

    def _write_down(self, marks: list[Mark]) -> None:
        self._given += marks
        self._note({"kind": KIND, "data": {"root": self._root, "locks": [list(mark) for mark in self._given]}})

    def from_inside(self, tree: Tree, visit: Visit, shown: Iterable[tuple[int, FileLock]]) -> None:
        """Have the process of a visit drop its POSIX locks, of those that its descriptors show."""
        marks = _posix_marks(visit.process.pid, shown)
        if not marks:
            return
        self._write_down(marks)
        program = Program()
        file_locks.drop(program, (mark.entry for mark in marks))
        for part in program.parts:
            tree.ask([visit._replace(programs={visit.process.driver.tid: part})])

    def from_outside(self, collection: Collection) -> None:
        """Drop the locks of open file descriptions; the tree is frozen."""
        held = [
            (descriptor, lock)
            for descriptor in collection.descriptors.values()
            for lock in descriptor.info.locks
            if file_locks.kind_of(lock) in _MOVING and lock.access == "WRITE"
        ]
        marks = [_mark(one.owner.pid, one.fd, one.status.st_ino, lock) for one, lock in held]
        if marks:
            self._write_down(marks)
        for (descriptor, _), mark in zip(held, marks, strict=True):
            file_locks.set_from_outside(descriptor.own, mark.entry, fcntl.F_UNLCK)


def _mark(pid: int, fd: int, inode: int, lock: FileLock) -> Mark:
    length = 0 if lock.end < 0 else lock.end - lock.start + 1
    return Mark(pid, fd, inode, file_locks.kind_of(lock), lock.start, length)


def _posix_marks(pid: int, shown: Iterable[tuple[int, FileLock]]) -> list[Mark]:
    """The exclusive POSIX locks of a process, each at one of its descriptors.

    Not by /proc/locks, which stops the whole machine's locking for each read: 10 ms (locks_start, fs/locks.c, and
    percpu_down_write).
    """
    found: dict[tuple[int, int, int, int], Mark] = {}
    for fd, lock in shown:
        if is_posix(lock):
            found.setdefault((lock.dev, lock.ino, lock.start, lock.end), _mark(pid, fd, lock.ino, lock))
    return list(found.values())


def is_posix(lock: FileLock) -> bool:
    """Whether it is one that only its process can drop, and must."""
    return (lock.kind, lock.access) == ("POSIX", "WRITE")


def thaw(hold: Hold, deeds: Iterable[dict[str, Any]], patience: float) -> str:
    """Thaw a tree, which nobody traces, with the locks that it has given up. Returns what could not be had again, empty
    if nothing: a copy at the destination may still have a lock, so it is tried for `patience` seconds."""
    last = next(reversed(list(deeds)), None)
    marks = [Mark(*fields) for fields in last["locks"]] if last is not None else []
    if not marks:
        hold.thaw()
        return ""
    deadline = time.monotonic() + patience
    problems = [_retry(functools.partial(_take_outside, mark), deadline) for mark in marks if mark.flag in _MOVING]
    inside = [mark for mark in marks if mark.flag not in _MOVING]
    if inside and last is not None:
        try:
            with Tracer() as tracer, stop_tree(tracer, last["root"], timeout_ms=_STOP_MS) as tree:
                hold.thaw()
                problems += [_retry(functools.partial(_take_inside, tree, mark), deadline) for mark in inside]
        except EngineError as error:
            problems.append(f"the program could not be stopped to take its locks again: {error}")
    hold.thaw()
    return "; ".join(filter(None, problems))


def _retry(take: Callable[[], None], deadline: float) -> str:
    while True:
        try:
            take()
        except GoneError:
            return ""
        except (EngineError, OSError) as error:
            if time.monotonic() < deadline:
                time.sleep(_PAUSE)
                continue
            return f"a file lock is lost: {error}"
        return ""


def _take_outside(mark: Mark) -> None:
    with contextlib.suppress(ProcessLookupError), contextlib.ExitStack() as stack:
        pidfd = os.pidfd_open(mark.pid)
        stack.callback(os.close, pidfd)
        own = calls.pidfd_getfd(pidfd, mark.fd)
        stack.callback(os.close, own)
        if os.fstat(own).st_ino != mark.inode:
            return
        try:
            file_locks.set_from_outside(own, mark.entry, fcntl.F_WRLCK)
        except OSError as error:
            raise TargetError(f"fd {mark.fd} of pid {mark.pid}: {error.strerror}") from error


def _take_inside(tree: Tree, mark: Mark) -> None:
    process = tree.processes.get(mark.pid)
    if process is None or process.zombie:
        return
    proc = open_process(mark.pid)
    try:
        if os.stat(f"fd/{mark.fd}", dir_fd=proc).st_ino != mark.inode:
            return
    finally:
        os.close(proc)
    if process.driver.state is None:
        tree.read_states()
    program, areas = Program(), process.areas()
    file_locks.take(program, [mark.entry])
    try:
        tree.ask([Visit(process, find_gadgets(process.pid, areas), areas, {process.driver.tid: program})])
    except TargetError as error:
        raise TargetError(f"fd {mark.fd} of pid {mark.pid}: {error}") from error

"""Exclusive file locks are given up for the destination, and taken again where the tree stays."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phaul_engine import cgroup, lock_move
from phaul_engine.cgroup import Hierarchy, Hold
from phaul_engine.collect import Collector
from phaul_engine.lock_move import Surrender
from phaul_engine.proc.access import open_process
from phaul_engine.proc.fdinfo import read
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.test_tree import Subject, subject

_LOCKS = """
for number in (50, 51, 52, 53):
    fd = os.open(f"{sys.argv[1]}/{number}", os.O_RDWR | os.O_CREAT)
    os.dup2(fd, number)
    os.close(fd)
fcntl.lockf(50, fcntl.LOCK_EX, 10, 5)
fcntl.lockf(50, fcntl.LOCK_SH, 0, 100)
fcntl.flock(51, fcntl.LOCK_EX)
os.dup2(51, 54)
fcntl.fcntl(52, 37, struct.pack("hhxxxxqqixxxx", fcntl.F_WRLCK, 0, 3, 4, 0))
def lock():
    fcntl.lockf(53, fcntl.LOCK_EX)
threading.Thread(target=lock).start()
while "WRITE" not in open("/proc/self/fdinfo/53").read(): time.sleep(0.01)
ready()
passed()
"""
_FDS = (50, 51, 52, 53, 54)
_WAITER = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.flock(file, fcntl.LOCK_EX)"


def _locks(pid: int) -> dict[int, list[tuple[str, str, int, int]]]:
    proc = open_process(pid)
    try:
        return {fd: sorted((one.kind, one.access, one.start, one.end) for one in read(proc, fd).locks) for fd in _FDS}
    finally:
        os.close(proc)


@contextlib.contextmanager
def _held(made: Subject) -> Iterator[Hold]:
    """The program in a cgroup of its own."""
    with Hierarchy.find() as hierarchy:
        hold = Hold.create(hierarchy, cgroup.path_of(made.root), f"phaul-locks-{made.root}")
        try:
            hold.gather(lambda: [made.root])
            yield hold
        finally:
            hold.thaw()
            hold.disband()
            hold.close()


def _freeze(made: Subject, hold: Hold) -> list[dict[str, Any]]:
    """Freeze it as a migration does; the deeds that are written down. Its images have all of its locks."""
    deeds: list[dict[str, Any]] = []
    with Tracer() as tracer, Collector() as collector, stop_tree(tracer, made.root, timeout_ms=2000) as tree:
        surrender = Surrender(made.root, deeds.append)
        collection = collector.collect(tree, survey=False, hold=lambda: _stop(hold), surrender=surrender)
        assert [str(one) for one in collection.blockers] == []
        kinds = [record.message.flag for record in collection.checkpoint.records("filelocks")]
        assert sorted(kinds) == [1, 1, 1, 2, 1024]
    assert {deed["kind"] for deed in deeds} == {lock_move.KIND}
    return [deed["data"] for deed in deeds]


def _stop(hold: Hold) -> None:
    hold.freeze(5)


def _free(path: Path, fds: tuple[int, ...]) -> None:
    """Everybody can have these locks."""
    for fd in fds:
        with (path / str(fd)).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (path / str(fd)).open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)


def test_locks_are_free_for_the_destination_and_come_back(tmp_path: Path) -> None:
    with subject(tmp_path, _LOCKS) as made:
        made.wait_for("ready")
        before = _locks(made.root)
        with _held(made) as hold:
            deeds = _freeze(made, hold)
            _free(tmp_path, (50, 51, 52, 53))
            shared = {fd: [one for one in locks if one[1] == "READ"] for fd, locks in before.items()}
            assert _locks(made.root) == shared
            assert hold.frozen
            assert lock_move.thaw(hold, deeds, 1.0) == ""
            assert _locks(made.root) == before
            assert lock_move.thaw(hold, [*deeds, {"locks": []}], 0.0) == ""  # undone before: nothing is done again


@pytest.mark.parametrize("fd", [51, 53])
def test_a_lock_that_was_lost_is_named(tmp_path: Path, fd: int) -> None:
    with subject(tmp_path, _LOCKS) as made:
        made.wait_for("ready")
        before = _locks(made.root)
        with _held(made) as hold, (tmp_path / str(fd)).open("r+") as thief:
            deeds = _freeze(made, hold)
            (fcntl.flock if fd == 51 else fcntl.lockf)(thief, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lost = lock_move.thaw(hold, deeds, 0.0)
            assert lost.startswith(f"a file lock is lost: fd {fd} of pid {made.root}")
            assert {one: locks for one, locks in _locks(made.root).items() if locks != before[one]}.keys() <= {fd, 54}


def test_who_waits_for_a_lock_is_a_blocker(tmp_path: Path) -> None:
    with subject(tmp_path, _LOCKS) as made, Tracer() as tracer, Collector() as collector:
        made.wait_for("ready")
        waiter = subprocess.Popen([sys.executable, "-c", _WAITER, tmp_path / "51"])
        try:
            while f"-> FLOCK  ADVISORY  WRITE {waiter.pid}" not in Path("/proc/locks").read_text():
                assert waiter.poll() is None
            with stop_tree(tracer, made.root, timeout_ms=2000) as tree:
                (blocker,) = collector.collect(tree, survey=True).blockers
            assert f"pid {waiter.pid} would get it" in str(blocker)
        finally:
            waiter.kill()
            waiter.wait()

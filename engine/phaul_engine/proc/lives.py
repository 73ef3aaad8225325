"""Processes as journals name them: by number and begin, so that none is taken for a later one of its number."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from phaul_engine.errors import GoneError

from .access import open_process
from .stat import read_stat


def tasks(pids: Iterable[int]) -> list[list[int]]:
    """Processes for a journal: each with when it began, so that it is not taken for a later one of its number."""
    found = []
    for pid in pids:
        with contextlib.ExitStack() as stack:
            proc = open_process(pid)
            stack.callback(os.close, proc)
            found.append([pid, read_stat(proc).start])
    return found


def any_lives(tasks: Iterable[tuple[int, int]]) -> bool:
    """Whether any of these processes (`tasks`) lives still."""
    return any(_lives(pid, start) for pid, start in tasks)


def _lives(pid: int, start: int) -> bool:
    try:
        proc = open_process(pid)
    except GoneError:
        return False
    try:
        stat = read_stat(proc)
        return not stat.dead and stat.start == start
    except GoneError:
        return False
    finally:
        os.close(proc)

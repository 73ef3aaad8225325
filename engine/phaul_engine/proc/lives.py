"""Processes as journals name them: by number and begin, so that none is taken for a later one of its number."""

from __future__ import annotations

from collections.abc import Iterable

from phaul_engine.errors import GoneError

from .stat import stat_of


def tasks(pids: Iterable[int]) -> list[list[int]]:
    """Processes for a journal: each with when it began, so that it is not taken for a later one of its number."""
    return [[pid, stat_of(pid).start] for pid in pids]


def any_lives(tasks: Iterable[tuple[int, int]]) -> bool:
    """Whether any of these processes (`tasks`) lives still."""
    return any(_lives(pid, start) for pid, start in tasks)


def _lives(pid: int, start: int) -> bool:
    try:
        stat = stat_of(pid)
    except GoneError:
        return False
    return not stat.dead and stat.start == start

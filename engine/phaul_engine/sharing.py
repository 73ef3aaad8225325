"""What processes of a tree share: which have one descriptor table, and which one set of directories."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping

from . import calls, plan


class Sharing:
    """Who shares objects of a kind (`calls.KCMP_FILES`, ...), over several looks: what two processes do not share at
    one they never will, since that is decided at birth; only what they do share may end."""

    def __init__(self, what: int) -> None:
        self._what = what
        self._known: dict[int, int] = {}  # the object of each process, by the number of the process

    def numbers(self, processes: Mapping[int, int]) -> dict[int, int]:
        """The number of each process's object, by pid. `processes` are the numbers of the processes themselves, each
        of one for good: an object has that of the first that holds it."""
        found = self._as_before(processes) or numbers(processes, self._what)
        self._known = {number: found[pid] for pid, number in processes.items()}
        return found

    def _as_before(self, processes: Mapping[int, int]) -> dict[int, int] | None:
        """As at the last look; None if it is not so."""
        groups: dict[int, list[int]] = {}
        for pid, number in processes.items():
            if number not in self._known:
                return None
            groups.setdefault(self._known[number], []).append(pid)
        found = {}
        for first, *others in groups.values():
            if any(calls.kcmp(first, other, self._what) != 0 for other in others):
                return None
            lowest = min(processes[pid] for pid in (first, *others))
            found.update(dict.fromkeys((first, *others), lowest))
        return found


def numbers(processes: Mapping[int, int], what: int) -> dict[int, int]:
    """As `Sharing.numbers`, by comparing all."""

    def compare(left: int, right: int) -> int:
        return (0, -1, 1)[calls.kcmp(left, right, what)]

    order = sorted(processes, key=functools.cmp_to_key(compare)) if len(processes) > 1 else list(processes)
    found: dict[int, int] = {}
    group: list[int] = []
    for pid, following in itertools.zip_longest(order, order[1:]):
        group.append(pid)
        if following is None or compare(pid, following) != 0:
            found.update(dict.fromkeys(group, min(processes[one] for one in group)))
            group = []
    return found


def apart(steps: Iterable[plan.Step]) -> list[tuple[plan.Node, plan.Node]]:
    """Who shares a table with whom without being its child: a table is shared at birth, or never."""
    holders: dict[tuple[int, int], plan.Node] = {}
    found = []
    for step in steps:
        if not isinstance(step, plan.Birth) or step.child.exit_code is not None:
            continue
        child, parent = step.child, step.parent
        for kind in plan.SHAREABLE:
            key = (kind, child.tables[kind])
            first = holders.setdefault(key, child)
            if first is not child and (parent is None or parent.tables[kind] != child.tables[kind]):
                found.append((child, first))
    return found

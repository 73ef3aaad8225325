"""What processes of a tree share: which have one descriptor table, and which one set of directories."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping

from . import calls, plan


def numbers(processes: Mapping[int, int], what: int) -> dict[int, int]:
    """The number of each process's object of a kind (`calls.KCMP_FILES`, ...), by pid.

    `processes` are the numbers of the processes themselves: an object has that of the first that holds it.
    """

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

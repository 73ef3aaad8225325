"""What tasks are called in pid namespaces below that of their tree's first process (pid_namespaces(7)).

Images call every task what it is called in the pid namespace of the first process, which sees all of them. One that is
in a namespace below has a number in each on the way down to its own, and knows itself by the last. CRIU has no such
trees, so these numbers are fields of ours in pstree.img; a namespace below has a file pidns-N.img, which names the one
above it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .errors import ImageError
from .images.checkpoint import Checkpoint

TREE = 0
"""What stands for the pid namespace of the first process."""
_FIRST = 300  # the kernel gives no lower one again (RESERVED_PIDS)
_DEEPEST = 32  # MAX_PID_NS_LEVEL (include/linux/pid_namespace.h)


@dataclass(frozen=True)
class Name:
    """A task's numbers, from that in the tree's pid namespace to that in its own; `way` are these namespaces."""

    numbers: tuple[int, ...]
    way: tuple[int, ...] = (TREE,)

    @property
    def space(self) -> int:
        """Its own pid namespace."""
        return self.way[-1]

    def seen(self, space: int) -> int:
        """What it is called in a pid namespace, 0 if it is not there."""
        return self.numbers[self.way.index(space)] if space in self.way else 0


class Numbering:
    """All names in a checkpoint. ImageError if they contradict each other."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        found = ((ident, checkpoint.one("pidns", ident)) for ident in checkpoint.idents("pidns"))
        self._parents = {
            ident: int(entry.phaul_parent)
            for ident, entry in found
            if isinstance(ident, int) and entry.HasField("phaul_parent")
        }
        self._names: dict[int, Name] = {}
        self._numbers: set[int] = set()
        for record in checkpoint.records("pstree"):
            entry = record.message
            self._numbers.update((entry.pid, entry.pgid, entry.sid, *entry.threads))
            for one in entry.phaul_numbers:
                self._add(Name((one.number, *one.below), self.way(one.pid_ns)))

    def _add(self, name: Name) -> None:
        number = name.numbers[0]
        if len(name.way) != len(name.numbers) or self._names.setdefault(number, name) != name:
            raise ImageError(f"pstree.img calls task {number} {name.numbers[1:]} in pid namespace {name.space}")

    def name(self, number: int) -> Name:
        """Of a task, by its number in the images."""
        return self._names.get(number) or Name((number,))

    def way(self, space: int) -> tuple[int, ...]:
        """The pid namespaces on the way from the tree's down to one."""
        way = [space]
        while way[-1] != TREE:
            if way[-1] not in self._parents or len(way) > _DEEPEST:
                raise ImageError(f"pid namespace {space} of the images is not below that of the first process")
            way.append(self._parents[way[-1]])
        return tuple(reversed(way))

    def unused(self, way: tuple[int, ...], is_taken: Callable[[int], bool]) -> Name:
        """A name for one more task in a pid namespace. `is_taken` says so of numbers in the tree's."""
        numbers = [_lowest(lambda number: number in self._numbers or is_taken(number))]
        for space in way[1:]:
            taken = {name.seen(space) for name in self._names.values()}
            numbers.append(_lowest(taken.__contains__))
        return Name(tuple(numbers), way)


def _lowest(is_taken: Callable[[int], bool]) -> int:
    number = _FIRST
    while is_taken(number):
        number += 1
    return number

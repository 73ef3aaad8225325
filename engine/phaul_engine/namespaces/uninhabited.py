"""User namespaces that no process of a tree is in, though others of the tree belong to them, or are below them, at the
source (user_namespaces(7)): bubblewrap makes such a one, and goes on into another.

What one is like, only /proc of a process in it tells. So a process of ours is in each as long as we look at the tree.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping

from phaul_engine.objects import places
from phaul_engine.objects.base import Owner
from phaul_engine.proc.access import open_at, open_process

from . import lineage
from .inside import Worker
from .lineage import Standing


class Uninhabited:
    """Those of one tree. `number` gives a number to a namespace: kind, device, inode; `outside` is that of the user
    namespace that the engine is in."""

    def __init__(self, number: Callable[[str, int, int], int], outside: int) -> None:
        self._number = number
        self._outside = outside
        self._looked: set[tuple[str, int]] = set()
        self._cleanup = contextlib.ExitStack()
        self.owners: dict[int, Owner] = {}
        self.standings: dict[int, Standing] = {}

    def close(self) -> None:
        """End our processes."""
        self._cleanup.close()

    def find(
        self, found: Mapping[tuple[str, int], int], users: Callable[[], Mapping[tuple[int, int], int]], home: int
    ) -> None:
        """Look whom namespaces belong to; `found` has a process in each. `users` are the user namespaces that are
        known, by device and inode, `home` that of the tree."""
        for (name, number), proc in found.items():
            if (name, number) in self._looked or (name, number) == ("user", home):
                continue
            self._looked.add((name, number))
            with contextlib.ExitStack() as stack:
                way, end = self._way_up(name, proc, users(), stack)
                if end in {home, *users().values()} - ({self._outside} - {home}):
                    for fd in reversed(way):
                        self._occupy(fd, users)

    def _way_up(
        self, name: str, proc: int, users: Mapping[tuple[int, int], int], stack: contextlib.ExitStack
    ) -> tuple[list[int], int]:
        """The user namespaces above one that are not known, as descriptors, and the number of the first that is."""
        way: list[int] = []
        fd = open_at(proc, f"ns/{name}")
        stack.callback(os.close, fd)
        ask = lineage.parent if name == "user" else places.owner_of
        while True:
            try:
                fd = ask(fd)
            except PermissionError:  # it is outside of ours
                return [], 0
            stack.callback(os.close, fd)
            status = os.fstat(fd)
            known = users.get((status.st_dev, status.st_ino))
            if known is not None:
                return way, known
            way.append(fd)
            ask = lineage.parent

    def _occupy(self, fd: int, users: Callable[[], Mapping[tuple[int, int], int]]) -> None:
        """Put a process of ours into one. Those above have been seen to."""
        status = os.fstat(fd)
        number = self._number("user", status.st_dev, status.st_ino)
        worker = self._cleanup.enter_context(Worker({"user": fd}))
        proc = open_process(worker.pid)
        self._cleanup.callback(os.close, proc)
        self.owners[number] = Owner(worker.pid, 0, "phaul", proc, -1, -1)
        self.standings[number] = lineage.standing("user", proc, users())

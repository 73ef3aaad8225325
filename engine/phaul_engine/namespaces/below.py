"""User namespaces below that of a tree's first process, at the destination (user_namespaces(7)).

Each is made by a process of ours in the one above it, as the user who had made it, and its maps are written from there:
who is in it may not. A task is born above, where it may do what its tree may: memory, root and working directory are
made there. Then, before it has threads, since a process of several may not, it goes in, with the ids that it is to
have: some have no number inside, or may not be set there. What belongs to such a namespace is made by a process that is
in it, and joined by tasks from above.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from phaul_engine.cgroup import Hierarchy
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import userns_pb2
from phaul_engine.user_ids import below

from . import user, user_making
from .inside import Descriptor, InsideError, Worker

_HINT = "look at user.max_user_namespaces (sysctl) here"


class Below:
    """Those of one skeleton. `of_tree` tells the descriptor of the user namespace of its first process, None if that is
    the engine's. Descriptors that it gives out are open until it is closed."""

    def __init__(self, checkpoint: Callable[[], Checkpoint], of_tree: Callable[[], int | None]) -> None:
        self._checkpoint = checkpoint
        self._of_tree = of_tree
        self._made: dict[int, tuple[int, userns_pb2.userns_entry]] = {}
        self._cleanup = contextlib.ExitStack()

    def close(self) -> None:
        """Close what is ours."""
        self._cleanup.close()

    def contains(self, number: int) -> bool:
        """Whether that is the number of one of them."""
        return number in below(self._checkpoint())

    def owner(self, number: int) -> int:
        """To which of them another namespace belongs, 0 if to none."""
        return next((one for one, entry in below(self._checkpoint()).items() if number in entry.phaul_owns), 0)

    def way(self, number: int) -> list[int]:
        """One of them, and those above it; nothing for the tree's."""
        found, way = below(self._checkpoint()), []
        while number in found:
            way.append(number)
            number = found[number].phaul_parent
        return way

    def descriptor(self, number: int) -> int:
        """Of one of them, which is made if it is not there."""
        if number not in self._made:
            entry = below(self._checkpoint())[number]
            maps = user.ids(self._checkpoint(), number)
            arguments = entry.phaul_owner, maps.uid_map, maps.gid_map, maps.deny_groups
            with self._worker(entry.phaul_parent) as worker:
                try:
                    made: Descriptor = worker.call(user_making.make, *arguments)
                except InsideError as error:
                    what = f"cannot make the user namespace number {number} of the images: {error}"
                    raise RebuildError(what, advice=_HINT) from error
            self._cleanup.callback(os.close, made.fd)
            self._made[number] = made.fd, entry
        return self._made[number][0]

    def make(self, name: str, flag: int, owner: int, cgroup: str = "") -> int:
        """A new namespace of a kind, empty, which belongs to one of them; of cgroups, `cgroup` is its root."""
        with self._worker(owner) as worker:
            try:
                if cgroup:
                    with Hierarchy.find() as hierarchy:
                        hierarchy.put(worker.pid, cgroup)
                made: Descriptor = worker.call(user_making.make_belonging, name, flag)
            except InsideError as error:
                what = f"cannot make a {name} namespace that belongs to user namespace {owner} of the images: {error}"
                raise RebuildError(what) from error
        self._cleanup.callback(os.close, made.fd)
        return made.fd

    def follow(self) -> None:
        """Later images: maps can be written once."""
        later = below(self._checkpoint())
        for number, (_, entry) in self._made.items():
            now = later.get(number, entry)
            if (now.uid_map, now.gid_map, now.phaul_deny_setgroups) != (
                entry.uid_map,
                entry.gid_map,
                entry.phaul_deny_setgroups,
            ):
                raise RebuildError("the maps of a user namespace were written while the tree was moved", advice="again")

    def _worker(self, number: int) -> Worker:
        """A process in one of them, or in the tree's, or, if the tree has none, where we are."""
        fd = self.descriptor(number) if self.contains(number) else self._of_tree()
        return Worker({} if fd is None else {"user": fd}, modules=(user_making.__name__,))

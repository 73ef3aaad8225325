"""Which namespaces the tasks of a tree are in: numbers for the images, and a collection of each.

A `Census` lives as long as a migration or dump, so that a namespace has the same number in every pass.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from phaul_engine.images.pb import core_pb2
from phaul_engine.objects.base import Collection, Owner
from phaul_engine.proc.access import open_process
from phaul_engine.proc.namespaces import identities

from . import catalogue, lineage
from . import pid as pid_namespace
from .base import NamespaceView, kind_named
from .lineage import Standing

if TYPE_CHECKING:
    from phaul_engine.members import Member

NAMES = ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup", "time")
"""In the order of their fields in the images. Those of the engine have the numbers 1 to 8 (`inventory.root_ids`)."""

HOST = {name: number for number, name in enumerate(NAMES, start=1)}
_OF_CHILDREN = ("pid", "time")
_FIRST = 16  # the numbers of namespaces of trees begin here

assert catalogue


class Census:
    """The numbers of namespaces, kept from pass to pass."""

    def __init__(self, *, lent: bool = False) -> None:
        """`lent`: see `lodging`."""
        self._lent = ("mnt",) if lent else ()
        self._numbers: dict[tuple[str, int, int], int] = {}
        self._next = _FIRST
        self._home = HOST["user"]
        self._members: dict[int, dict[str, int]] = {}

    def take(self, members: Iterable[Member]) -> None:
        """Look where all living tasks are; the root comes first."""
        living = [member for member in members if not member.process.zombie]
        self._know_ours(living[0])
        self._members = {member.pid: self._look(member.process.proc) for member in living}
        self._home = self._find_home(living[0])

    def numbers(self, pid: int) -> Mapping[str, int]:
        """The namespaces of a process, in our numbers of processes: number by kind."""
        return self._members[pid]

    def collect(self, members: Iterable[Member], collection: Collection) -> None:
        """Have every namespace of the tree's own collected; a kind that cannot be carried is a blocker."""
        living = [member for member in members if not member.process.zombie]
        found: dict[tuple[str, int], list[Member]] = {}
        for member in living:
            for name, number in self._members[member.pid].items():
                if number != HOST[name]:
                    found.setdefault((name, number), []).append(member)
        for member in living:
            _judge_children(member, collection)
        standings = self._standings(found, collection)
        with self._at_home(living[0]) as at_home:
            for (name, number), inside in sorted(found.items(), key=lambda item: _rank(item[0][0])):
                standing = standings.get((name, number), Standing())
                lords = found.get(("user", standing.above)) if standing.above != self._home else None
                owned = [one for (kind, one), other in standings.items() if kind != "user" and other.above == number]
                owners = tuple(member.owner for member in inside)
                of_root = inside[0] is living[0]
                view = NamespaceView(
                    *(name, number, owners[0], owners, of_root, collection.survey),
                    lord=lords[0].owner if lords else at_home,
                    above=standing.above if lords else 0,
                    maker=standing.maker,
                    parent=standing.above,
                    owns=tuple(owned) if name == "user" else (),
                )
                _collect(view, collection)

    @contextlib.contextmanager
    def _at_home(self, root: Member) -> Iterator[Owner]:
        """A process in the user namespace that the tree is said to be in: its root, or the engine."""
        if self._members[root.pid]["user"] == self._home:
            yield root.owner
            return
        proc = open_process(os.getpid())
        try:
            yield replace(root.owner, pid=os.getpid(), comm="phaul", proc=proc)
        finally:
            os.close(proc)

    def _find_home(self, root: Member) -> int:
        """The user namespace that the tree is said to be in: the root's. But if the root's view of files belongs to
        ours, the root went into its user namespace after it had got that, as what systemd starts does: it is below.
        Not with a pid namespace of its own, where nobody but the root could say which numbers its threads get."""
        own = self._members[root.pid]["user"]
        if own == HOST["user"] or self._members[root.pid]["pid"] != HOST["pid"]:
            return own
        shown = lineage.standing("mnt", root.process.proc, self._users()).above
        apart = lineage.differs("mnt", root.process.proc)
        return HOST["user"] if apart and shown == HOST["user"] else own

    def _users(self) -> dict[tuple[int, int], int]:
        return {(dev, inode): number for (name, dev, inode), number in self._numbers.items() if name == "user"}

    def _standings(
        self, found: Mapping[tuple[str, int], list[Member]], collection: Collection
    ) -> dict[tuple[str, int], Standing]:
        """How the tree's namespaces stand to its user namespaces, where it has such below its own; else nothing."""
        home, users = self._home, self._users()
        if all(name != "user" or number == home for name, number in found):
            return {}
        made = {
            (name, number): lineage.standing(name, inside[0].process.proc, users)
            for (name, number), inside in found.items()
            if (name, number) != ("user", home)
        }
        for (name, number), standing in made.items():
            if name == "user" and standing.above != home and ("user", standing.above) not in made:
                why = "no process of the tree is in the one above it, which would not move"
                advice = "let the program end that process, or start it without"
                collection.block(found[name, number][0].owner, "in a user namespace of its own", why, advice)
        return made

    def _look(self, proc: int) -> dict[str, int]:
        return HOST | {name: self._number(name, *identity) for name, identity in identities(proc, NAMES).items()}

    def _number(self, name: str, device: int, inode: int) -> int:
        key = (name, device, inode)
        if key not in self._numbers:
            self._numbers[key] = self._next
            self._next += 1
        return self._numbers[key]

    def _know_ours(self, root: Member) -> None:
        """What the engine is in is not the tree's; nor are namespaces that were made for it (`--pidns`), whose numbers
        of processes are as in them; and clocks go on wherever the tree goes."""
        if self._numbers:
            return
        init = pid_namespace.init_above(root.pid)
        for pid, names in ((os.getpid(), NAMES), (init, pid_namespace.SHARED), (root.pid, ("time", *self._lent))):
            if pid is not None:
                proc = open_process(pid)
                try:
                    for name, identity in identities(proc, names).items():
                        self._numbers[(name, *identity)] = HOST[name]
                finally:
                    os.close(proc)


def _collect(view: NamespaceView, collection: Collection) -> None:
    """Have one namespace collected, if that can be."""
    kind, what = kind_named(view.name), f"in a {view.name} namespace of its own"
    if kind is None:
        why, advice = f"{view.name} namespaces are not carried yet", "run phaul inside the container"
        collection.block(view.owner, what, why, advice)
    elif view.above and not kind.at_birth:
        why = f"it belongs to the user namespace of {view.lord}, which is below the tree's own"
        collection.block(view.owner, what, why, "let the program do without")
    else:
        kind.collect(view, collection)


def _judge_children(member: Member, collection: Collection) -> None:
    """What a task has called unshare(2) or setns(2) for, its children will be in."""
    names = [name + end for name in _OF_CHILDREN for end in ("", "_for_children")]
    found = identities(member.process.proc, names)
    for name in _OF_CHILDREN:
        if found.get(name) != found.get(f"{name}_for_children"):
            kind = f"about to start children in another {name} namespace"
            collection.block(member.owner, kind, "which it has made or joined, and is not in itself")


def _rank(name: str) -> int:
    """The order of collecting: that of registration, unknown kinds first."""
    return catalogue.ORDER.index(name) if name in catalogue.ORDER else -1


def write(entry: core_pb2.task_kobj_ids_entry, numbers: Mapping[str, int]) -> None:
    """Put the numbers of a task's namespaces into its ids."""
    for name, number in numbers.items():
        setattr(entry, f"{name}_ns_id", number)


def read(entry: core_pb2.task_kobj_ids_entry) -> dict[str, int]:
    """The opposite; a kind that the image does not tell is absent."""
    return {name: getattr(entry, f"{name}_ns_id") for name in NAMES if entry.HasField(f"{name}_ns_id")}

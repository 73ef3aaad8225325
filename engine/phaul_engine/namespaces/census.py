"""Which namespaces the tasks of a tree are in: numbers for the images, and a collection of each.

A `Census` lives as long as a migration or dump, so that a namespace has the same number in every pass.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from phaul_engine.errors import GoneError
from phaul_engine.images.pb import core_pb2
from phaul_engine.numbering import TREE
from phaul_engine.objects.base import Collection, Owner
from phaul_engine.proc.access import open_process
from phaul_engine.proc.namespaces import identities

from . import catalogue, lineage
from . import pid as pid_namespace
from .base import NamespaceView, kind_named
from .lineage import Standing
from .uninhabited import Uninhabited

if TYPE_CHECKING:
    from phaul_engine.members import Member

NAMES = ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup", "time")
"""In the order of their fields in the images. Those of the engine have the numbers 1 to 8 (`inventory.root_ids`)."""

HOST = {name: number for number, name in enumerate(NAMES, start=1)}
_OF_CHILDREN = ("pid", "time")
_CHILDREN = tuple(f"{name}_for_children" for name in _OF_CHILDREN)
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
        self._children: dict[int, int] = {}
        self._dead: dict[tuple[int, int], int] = {}
        self._pid = HOST["pid"]
        self._uninhabited = Uninhabited(self._number, HOST["user"])

    def close(self) -> None:
        """End what is kept between passes."""
        self._uninhabited.close()

    def prepare(self, pids: Sequence[int]) -> None:
        """Before a pass, while the tree runs, of which these are the processes, the root first: what takes time."""
        with contextlib.ExitStack() as stack:
            self._know_ours(pids[0])
            looks: list[tuple[dict[str, int], int]] = []
            for pid in pids:
                with contextlib.suppress(GoneError):
                    proc = open_process(pid)
                    stack.callback(os.close, proc)
                    looks.append((self._look(proc), proc))
            if looks:
                self._uninhabited.find(_own(looks), self._users, self._find_home(*looks[0]))

    def take(self, members: Iterable[Member]) -> None:
        """Look where all living tasks are; the root comes first."""
        living = [member for member in members if not member.process.zombie]
        root = living[0]
        self._know_ours(root.pid)
        self._members = {member.pid: self._look(member.process.proc) for member in living}
        self._home = self._find_home(self._members[root.pid], root.process.proc)
        self._pid = self._members[root.pid]["pid"]

    def numbers(self, pid: int) -> Mapping[str, int]:
        """The namespaces of a process, in our numbers of processes: number by kind."""
        return self._members[pid]

    def space(self, pid: int) -> int:
        """The pid namespace of a process, as `numbering` calls it."""
        number = self._members[pid]["pid"]
        return TREE if number == self._pid else number

    def children(self, member: Member) -> int | None:
        """The pid namespace that its children are born into, None if that is its own; 0 is one that has not begun."""
        return self._children.get(member.pid)

    def dead(self, member: Member) -> int:
        """A number for the pid namespace that ended with its process 1, which is this zombie."""
        key = member.pid, member.stat.start
        if key not in self._dead:
            self._dead[key] = self._next
            self._next += 1
        return self._dead[key]

    def collect(self, members: Iterable[Member], collection: Collection) -> None:
        """Have every namespace of the tree's own collected; a kind that cannot be carried is a blocker."""
        living = [member for member in members if not member.process.zombie]
        found: dict[tuple[str, int], list[Member]] = {}
        for member in living:
            for name, number in self._members[member.pid].items():
                if number != HOST[name]:
                    found.setdefault((name, number), []).append(member)
        standings = self._standings(found, collection)
        spaces = self._spaces()
        for member in living:
            self._judge_children(member, standings, collection)
        places = {key: tuple(member.owner for member in inside) for key, inside in found.items()}
        empty = {("user", number): owner for number, owner in self._uninhabited.owners.items()}
        empty = {key: owner for key, owner in empty.items() if key in standings and key not in found}
        with self._at_home(living[0]) as at_home:
            for name, number in sorted(places | empty, key=lambda key: _rank(key[0])):
                key, standing = (name, number), standings.get((name, number), Standing())
                inside, above = places.get(key, ()), ("user", standing.above)
                lords = (*places.get(above, ()), empty.get(above)) if standing.above != self._home else ()
                lord = next((one for one in lords if one is not None), None)
                owned = [one for (kind, one), other in standings.items() if kind != "user" and other.above == number]
                owner = inside[0] if inside else empty[key]
                of_root = owner is living[0].owner
                view = NamespaceView(
                    *(name, number, owner, inside, of_root, collection.survey),
                    lord=lord or at_home,
                    above=standing.above if lord else 0,
                    maker=standing.maker,
                    parent=self._pid_parent(owner) if name == "pid" and not of_root else standing.above,
                    owns=tuple(owned) if name == "user" else (),
                    spaces=spaces,
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

    def _find_home(self, root: Mapping[str, int], proc: int) -> int:
        """The user namespace that the tree is said to be in: the root's. But if the root's view of files belongs to
        ours, the root went into its user namespace after it had got that, as what systemd starts does: it is below.
        Not with a pid namespace of its own, where nobody but the root could say which numbers its threads get."""
        own = root["user"]
        if own == HOST["user"] or root["pid"] != HOST["pid"]:
            return own
        shown = lineage.standing("mnt", proc, self._users()).above
        apart = lineage.differs("mnt", proc)
        return HOST["user"] if apart and shown == HOST["user"] else own

    def _users(self) -> dict[tuple[int, int], int]:
        return {(dev, inode): number for (name, dev, inode), number in self._numbers.items() if name == "user"}

    def _standings(
        self, found: Mapping[tuple[str, int], list[Member]], collection: Collection
    ) -> dict[tuple[str, int], Standing]:
        """How the tree's namespaces stand to its user namespaces, where it has such below its own; else nothing."""
        home, others = self._home, self._uninhabited.standings
        self._uninhabited.find({key: one[0].process.proc for key, one in found.items()}, self._users, home)
        if not others and all(name != "user" or number == home for name, number in found):
            return {}
        users = self._users()
        made = {
            (name, number): lineage.standing(name, inside[0].process.proc, users)
            for (name, number), inside in found.items()
            if (name, number) != ("user", home)
        }
        waiting = [standing.above for standing in made.values()]
        while waiting:
            number = waiting.pop()
            if number in others and ("user", number) not in made:
                made["user", number] = others[number]
                waiting.append(others[number].above)
        for (name, number), standing in made.items():
            if name == "user" and standing.above != home and ("user", standing.above) not in made:
                why = "no process of the tree is in the one above it, which would not move"
                advice = "let the program end that process, or start it without"
                collection.block(found[name, number][0].owner, "in a user namespace of its own", why, advice)
        return made

    def _spaces(self) -> dict[tuple[int, int], int]:
        """The pid namespaces that processes of the tree are in, if there are several: see `numbering`."""
        inside = {numbers["pid"] for numbers in self._members.values()}
        return {
            (dev, inode): TREE if number == self._pid else number
            for (name, dev, inode), number in self._numbers.items()
            if name == "pid" and number in inside and len(inside) > 1
        }

    def _pid_parent(self, owner: Owner) -> int:
        """The number of the parent of a pid namespace, 0 if that is the tree's, -1 if nobody of the tree is in it."""
        number = self._numbers.get(("pid", *lineage.parent_of("pid", owner.proc)), -1)
        return TREE if number == self._pid else number

    def _judge_children(
        self, member: Member, standings: Mapping[tuple[str, int], Standing], collection: Collection
    ) -> None:
        """What a task has called unshare(2) or setns(2) for, its children will be in."""
        self._children.pop(member.pid, None)
        found = identities(member.process.proc, _CHILDREN)
        for name in _OF_CHILDREN:
            theirs = found.get(f"{name}_for_children")
            number = self._number(name, *theirs) if theirs else 0
            if number == self._members[member.pid][name] or (not number and _lacks(name)):
                continue
            inside = [one for one in self._members.values() if one["pid"] == number]
            above = standings.get(("pid", number), Standing(self._members[member.pid]["user"])).above
            if name == "pid" and (not number or inside) and above == self._members[member.pid]["user"]:
                self._children[member.pid] = number
            else:
                kind = f"about to start children in another {name} namespace"
                why = "which it has made or joined, and is not in itself"
                gone = name == "pid" and number > 0 and not inside
                collection.block(member.owner, kind, "its process 1 has ended, or is not of the tree" if gone else why)

    def _look(self, proc: int) -> dict[str, int]:
        return HOST | {name: self._number(name, *identity) for name, identity in identities(proc, NAMES).items()}

    def _number(self, name: str, device: int, inode: int) -> int:
        key = (name, device, inode)
        if key not in self._numbers:
            self._numbers[key] = self._next
            self._next += 1
        return self._numbers[key]

    def _know_ours(self, root: int) -> None:
        """What the engine is in is not the tree's; nor are namespaces that were made for it (`--pidns`), whose numbers
        of processes are as in them; and clocks go on wherever the tree goes."""
        if self._numbers:
            return
        init = pid_namespace.init_above(root)
        for pid, names in ((os.getpid(), NAMES), (init, pid_namespace.SHARED), (root, ("time", *self._lent))):
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
    else:
        kind.collect(view, collection)


def _own(looks: Iterable[tuple[Mapping[str, int], int]]) -> dict[tuple[str, int], int]:
    """The namespaces that are not the engine's, each with one of the processes in it."""
    found: dict[tuple[str, int], int] = {}
    for look, proc in looks:
        for name, number in look.items():
            if number != HOST[name]:
                found.setdefault((name, number), proc)
    return found


@functools.cache
def _lacks(name: str) -> bool:
    """Whether this kernel has no namespaces of a kind for children."""
    return not os.path.lexists(f"/proc/self/ns/{name}_for_children")


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

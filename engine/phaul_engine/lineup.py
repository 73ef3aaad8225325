"""The processes of a tree as images list them: who is whose child, in which session, under which numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .images.pb import core_pb2, pidns_pb2, pstree_pb2
from .namespaces import census
from .numbering import TREE, Name

if TYPE_CHECKING:
    from .members import Member
    from .objects.base import Collection


def ids(memory: int, files: int, fs: int, handlers: int) -> core_pb2.task_kobj_ids_entry:
    """Which objects a process shares with others."""
    return core_pb2.task_kobj_ids_entry(vm_id=memory, files_id=files, fs_id=fs, sighand_id=handlers)


def collect(members: Sequence[Member], numbers: census.Census, collection: Collection) -> None:
    """pstree and ids images: parents before children."""
    names = _Names(members, numbers, collection) if any(member.nested for member in members) else None
    for index, member in enumerate(members):
        entry = pstree_pb2.pstree_entry(
            pid=member.owner.inner_pid,
            ppid=collection.inner_pids.get(member.stat.ppid, 0) if index else 0,
            pgid=member.pgid,
            sid=member.sid,
        )
        entry.threads.extend(member.inner_tids.values())
        if names is not None:
            names.write(member, entry)
        children = numbers.children(member)
        if children is not None:
            entry.phaul_children_pid_ns = children
        collection.checkpoint.put("pstree", None, entry)
        if not member.process.zombie:
            entry_of_ids = ids(member.memory, member.files, member.fs, member.number)
            census.write(entry_of_ids, numbers.numbers(member.pid))
            collection.checkpoint.put("ids", member.owner.inner_pid, entry_of_ids)


class _Names:
    """What tasks, sessions and groups are called in pid namespaces below the tree's."""

    def __init__(self, members: Sequence[Member], numbers: census.Census, collection: Collection) -> None:
        self._collection = collection
        self._census = numbers
        self._members = {member.pid: member for member in members}
        self._spaces = {
            member.pid: numbers.space(member.pid) for member in members if member.nested and not member.process.zombie
        }
        self._parents = dict(_parents(collection))
        for member in members:  # parents come first
            if member.nested and member.process.zombie:
                self._spaces[member.pid] = self._space_of_dead(member)
        self._known: dict[int, Name] = {}
        for member in members:
            space = self._spaces.get(member.pid, TREE)
            self._known |= {numbers[0]: Name(numbers, self._way(space)) for numbers in member.names.values()}
        for member in members:
            for number in (member.status.ns_sid, member.status.ns_pgid):
                self._know_leader(number[member.level :], self._spaces.get(member.pid, TREE))

    def write(self, member: Member, entry: pstree_pb2.pstree_entry) -> None:
        """Add the names of all that are in one entry."""
        for number in dict.fromkeys((*member.inner_tids.values(), member.pgid, member.sid)):
            name = self._known.get(number)
            if name is not None:
                entry.phaul_numbers.add(number=number, below=name.numbers[1:], pid_ns=name.space)

    def _know_leader(self, numbers: tuple[int, ...], space: int) -> None:
        """A session or group, as a member of it sees it: its leader may be dead, and may be above."""
        seen = tuple(number for number in numbers if number)
        if len(seen) > 1 and len(seen) > len(self._known.get(seen[0], Name(())).numbers):
            self._known[seen[0]] = Name(seen, self._way(space)[: len(seen)])

    def _way(self, space: int) -> tuple[int, ...]:
        way = [space]
        while way[-1] != TREE and way[-1] in self._parents:
            way.append(self._parents[way[-1]])
        return tuple(reversed(way))

    def _space_of_dead(self, member: Member) -> int:
        """The pid namespace that a zombie was in. One that was process 1 has taken its own along."""
        depth = len(member.numbers)
        parent = self._spaces.get(member.stat.ppid, TREE)
        if member.numbers[-1] == 1:
            above = self._way(parent)
            if len(above) == depth - 1:
                space = self._census.dead(member)
                self._parents[space] = parent
                self._collection.checkpoint.put("pidns", space, pidns_pb2.pidns_entry(phaul_parent=parent))
                return space
        children = self._census.children(self._members[member.stat.ppid])
        for space in (parent, children or TREE, *self._spaces.values()):
            if space in self._parents and len(self._way(space)) == depth:
                return space
        why = "nobody tells which pid namespace it was in"
        self._collection.block(member.owner, "a dead process of a pid namespace of its own", why, "have it reaped")
        return TREE


def _parents(collection: Collection) -> Iterator[tuple[int, int]]:
    for ident in collection.checkpoint.idents("pidns"):
        if isinstance(ident, int):
            yield ident, collection.checkpoint.one("pidns", ident).phaul_parent

"""Who forks whom, and in which session each task is born: the order in which a tree can be made again.

A task is born into its parent's session of that moment. So a parent forks the children of its first session before it
calls setsid(2), and the others after. Process groups are joined when all tasks of a session are there. Both rules hold
for dead tasks too: a group or session outlives its leader, which is then a placeholder that is born, leads, and exits.
Members of a session whose leader is dead are born by the placeholder, and when it exits they come to whom orphans come
to: the next subreaper above, or, for the root, the init of its pid namespace. An orphan whose session's leader lives is
born by a placeholder below that leader in the same way, if its parent is above the leader.

A task in another pid namespace than its parent (`numbering`) may be in a session or group that nobody sees in there: it
is born into that. So such tasks come last, when all above have joined their groups.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from .errors import ImageError
from .images.checkpoint import Checkpoint
from .numbering import TREE, Name, Numbering

_DEAD = 2
FILES, DIRECTORIES = 0, 1  # indices in Node.tables
SHAREABLE = (FILES, DIRECTORIES)


@dataclass
class Node:
    """A process to be made. `exit_code` is its wait status if it is dead, else None.

    `tables` are the numbers of its tables of descriptors, directories and signal handlers, `memory` that of its address
    space: it is another after execve(2). `namespaces` are the numbers of those that it is in, by field of the image.
    """

    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: tuple[int, ...]
    exit_code: int | None = None
    placeholder: bool = False
    children: list[Node] = field(default_factory=list)
    adopts: bool = False  # what a placeholder below leaves
    tables: tuple[int, int, int] = (0, 0, 0)
    memory: int = 0
    namespaces: tuple[tuple[str, int], ...] = ()
    names: dict[int, Name] = field(default_factory=dict)  # of its threads, session and group, where they have several

    def name(self, number: int) -> Name:
        """Of one of its threads, its session or its group."""
        return self.names.get(number) or Name((number,))

    @property
    def space(self) -> int:
        """Its pid namespace, as `numbering` calls it."""
        return self.name(self.pid).space


class Birth(NamedTuple):
    """`parent` forks `child`. The root's parent is None."""

    parent: Node | None
    child: Node


class NewSession(NamedTuple):
    """setsid in `node`."""

    node: Node


class JoinGroup(NamedTuple):
    """setpgid of `node` to its group, in itself; or in `parent`, where that alone sees the leader."""

    node: Node
    parent: Node | None = None


class Adoption(NamedTuple):
    """From now on orphans below `node` become its children (prctl(2), PR_SET_CHILD_SUBREAPER)."""

    node: Node


class Death(NamedTuple):
    """`node` exits, with its exit status. A placeholder is reaped by `parent`, unless that is None."""

    node: Node
    parent: Node | None


Step = Birth | NewSession | JoinGroup | Adoption | Death


def read_tree(checkpoint: Checkpoint) -> Node:
    """The root of the process tree in the images; ImageError if they do not describe one."""
    nodes: dict[int, Node] = {}
    numbering = Numbering(checkpoint)
    root: Node | None = None
    for record in checkpoint.records("pstree"):
        entry = record.message
        core = checkpoint.one("core", entry.pid)
        dead = core.tc.task_state == _DEAD
        node = Node(
            entry.pid, entry.ppid, entry.pgid, entry.sid, tuple(entry.threads), core.tc.exit_code if dead else None
        )
        found = {number: numbering.name(number) for number in (*entry.threads, entry.pid, entry.pgid, entry.sid)}
        node.names = {number: name for number, name in found.items() if name.space != TREE}
        if not dead and checkpoint.has("ids", entry.pid):
            ids = checkpoint.one("ids", entry.pid)
            node.tables, node.memory = (ids.files_id, ids.fs_id, ids.sighand_id), ids.vm_id
            node.namespaces = tuple((one.name, value) for one, value in ids.ListFields() if one.name.endswith("_ns_id"))
        if node.pid in nodes or (not dead and node.pid not in node.threads):
            raise ImageError(f"pstree.img has process {node.pid} twice, or without its leader")
        nodes[node.pid] = node
        if node.ppid == 0 and root is None:
            root = node
        elif node.ppid in nodes:
            above = nodes[node.ppid].name(node.ppid).way
            if node.name(node.pid).way[: len(above)] != above:
                raise ImageError(f"process {node.pid} is in a pid namespace above that of its parent, {node.ppid}")
            nodes[node.ppid].children.append(node)
        else:
            raise ImageError(f"pstree.img has process {node.pid} before its parent {node.ppid}")
    if root is None or root.exit_code is not None:
        raise ImageError("pstree.img has no living root")
    return root


def processes(root: Node) -> Iterator[Node]:
    """A node and all below it, parents first."""
    yield root
    for child in root.children:
        yield from processes(child)


def order(root: Node, *, foreign_session: bool = False) -> list[Step]:
    """The steps that make the tree, in their order.

    With `foreign_session` the root's session and group, if it leads none, are whatever the engine is in. Raises
    ImageError for a tree that cannot be made in this way.
    """
    root = copy.deepcopy(root)
    root_leads = root.sid == root.pid
    top = root
    if not root_leads and not foreign_session:
        top = Node(root.sid, 0, root.sid, root.sid, (root.sid,), exit_code=0, placeholder=True, children=[root])
    _add_session_leaders(top)
    _add_bearers(top)
    _add_group_leaders(top, foreign_session)
    members = list(processes(top))
    known = {node.pid for node in members}
    steps: list[Step] = []
    waiting: _Waiting = [(None, top, None if root_leads or top is not root else root.sid)]
    while waiting:
        spaces = {TREE, *(step.child.space for step in steps if isinstance(step, Birth))}
        now = [one for one in waiting if one[1].space in spaces or one[1].name(one[1].pid).numbers[-1] == 1]
        if not now:
            raise ImageError(f"process {waiting[0][1].pid} is in a pid namespace without its process 1")
        begun, later = len(steps), [one for one in waiting if one not in now]
        for parent, child, session in now:
            later += _bear(parent, child, session, known, steps)
        steps += _joining([step.child for step in steps[begun:] if isinstance(step, Birth)], known)
        waiting = later
    by_pid = {node.pid: node for node in members}
    steps += [Death(node, by_pid.get(node.ppid)) for node in reversed(members) if node.placeholder]
    steps += [
        Death(node, by_pid.get(node.ppid))
        for node in reversed(members)
        if node.exit_code is not None and not node.placeholder
    ]
    return steps


def _joining(born: list[Node], known: set[int]) -> Iterator[Step]:
    """What brings tasks into their groups: leaders come first."""
    joiners = [node for node in born if node.sid != node.pid and node.pgid in known]
    joiners = [node for node in joiners if node.name(node.pgid).seen(node.space)]
    yield from (JoinGroup(node) for node in joiners if node.pgid == node.pid)
    yield from (JoinGroup(node) for node in joiners if node.pgid != node.pid)


def _join_above(node: Node, parent: Node | None, known: set[int], steps: list[Step]) -> None:
    """Have a task come into a group that it does not see, where its parent is in another."""
    if parent is None or node.pgid not in known or node.name(node.pgid).seen(node.space) or node.pgid == parent.pgid:
        return
    if not node.name(node.pgid).seen(parent.space) or node.sid != parent.sid:
        raise ImageError(f"process {node.pid} is in group {node.pgid}, which neither it nor its parent sees")
    steps.append(JoinGroup(node, parent))


@dataclass(frozen=True)
class Changes:
    """What makes one tree another. `gone` are to end, children before parents; `born` to be made, by `steps`, some of
    which may have been there before, but cannot become what they are to be. `renewed` keep their task, but all of their
    memory is new."""

    gone: tuple[Node, ...]
    born: frozenset[int]
    renewed: frozenset[int]
    steps: tuple[Step, ...]

    @property
    def unfilled(self) -> frozenset[int]:
        """The processes whose memory holds nothing of what was sent before."""
        return self.born | self.renewed


def changes(old: Node, new: Node, *, foreign_session: bool = False) -> Changes:
    """What makes the tree `old` the tree `new`. Both ends of a migration come to the same result."""
    before = {node.pid: node for node in processes(old)}
    after = {node.pid: node for node in processes(new)}
    steps = order(new, foreign_session=foreign_session)
    kept = {pid for pid, node in after.items() if pid in before and _same(before[pid], node)}
    while True:
        lost = {pid for pid in kept if after[pid].ppid in after and after[pid].ppid not in kept}
        for step in steps:
            if isinstance(step, Birth) and step.child.pid in after and step.child.pid not in kept:
                lost |= kept & _obstacles(step, after)
        if not lost:
            break
        kept -= lost
    born = after.keys() - kept
    renewed = {pid for pid in kept if before[pid].memory != after[pid].memory}
    joining = {pid for pid, node in after.items() if pid in born or before[pid].pgid != node.pgid}
    steps = [step for step in steps if _due(step, born, joining, after)]
    gone = tuple(node for node in reversed(list(processes(old))) if node.pid not in kept)
    return Changes(gone, frozenset(born), frozenset(renewed), tuple(steps))


def _same(before: Node, after: Node) -> bool:
    """Whether a task can stay, and become what is new about it."""
    return all(
        getattr(before, name) == getattr(after, name) for name in ("ppid", "sid", "exit_code", "tables", "namespaces")
    ) and before.name(before.pid) == after.name(after.pid)


def _obstacles(step: Birth, after: dict[int, Node]) -> set[int]:
    """Who would have to be made anew for a birth to be possible: a parent that has left the session that the child is
    born into; or, where a dead leader bears, all of its session."""
    parent, child = step.parent, step.child
    if parent is None:
        return set()
    if parent.placeholder:
        return {pid for pid, node in after.items() if node.sid == parent.sid}
    wanted = _birth_session(child)
    return {parent.pid} if wanted not in (None, parent.sid) else set()


def _due(step: Step, born: set[int], joining: set[int], after: dict[int, Node]) -> bool:
    """Whether a step of making the whole tree is one of changing it."""
    match step:
        case Birth(_, node) | NewSession(node) | Death(node, _) if not node.placeholder:
            return node.pid in born
        case Birth(_, node) | NewSession(node) | Death(node, _):
            if any(child.pid in born for child in node.children):
                return True
            members = [pid for pid, one in after.items() if one.pgid == node.pid]
            return bool(members) and all(pid in joining for pid in members) and not node.children
        case JoinGroup(node, _) if not node.placeholder:
            return node.pid in joining
        case JoinGroup(node, _):
            return _due(Death(node, None), born, joining, after)
        case Adoption(node):
            return any(one.pid in born for child in node.children if child.placeholder for one in child.children)


_Waiting: TypeAlias = list[tuple[Node | None, Node, int | None]]


def _bear(parent: Node | None, child: Node, session: int | None, known: set[int], steps: list[Step]) -> _Waiting:
    """A birth, and all below: as `_make`."""
    steps.append(Birth(parent, child))
    _join_above(child, parent, known, steps)
    return _make(child, session, known, steps)


def _make(node: Node, born_into: int | None, known: set[int], steps: list[Step]) -> _Waiting:
    """Births and sessions below `node`, which is in session `born_into` (None: one from outside, or its own first).
    Returned is who is still to be born, in another pid namespace: a parent, a child, and the session of that moment."""
    before = [child for child in node.children if _birth_session(child) == born_into and node.sid != born_into]
    before = [child for child in before if child.space == node.space or _birth_session(child) is not None]
    after = [child for child in node.children if child not in before]
    waiting: _Waiting = []
    for child in before:
        waiting += _bear(node, child, born_into, known, steps)
    if node.sid == node.pid:
        steps.append(NewSession(node))
    if node.adopts or any(child.placeholder and child.sid == child.pid and child.children for child in node.children):
        steps.append(Adoption(node))
    for child in after:
        if _birth_session(child) not in (node.sid, None):
            raise ImageError(f"process {child.pid} is in session {child.sid}, which its parent {node.pid} never was in")
        if child.space != node.space:
            waiting.append((node, child, node.sid))
        else:
            waiting += _bear(node, child, node.sid, known, steps)
    return waiting


def _birth_session(node: Node) -> int | None:
    """The session a task must be born into; None if any will do: it makes its own, and its children do not tell."""
    if node.sid != node.pid:
        return node.sid
    wanted = {_birth_session(child) for child in node.children} - {None, node.pid}
    return wanted.pop() if len(wanted) == 1 else None


def _placeholder(pid: int, parent: Node, sid: int, names: dict[int, Name]) -> Node:
    return Node(pid, parent.pid, pid, sid, (pid,), exit_code=0, placeholder=True, names=names)


def _add_session_leaders(top: Node) -> None:
    """Dead leaders of sessions: children of the subreaper that their orphans came to."""
    known = {node.pid for node in processes(top)}
    for parent in list(processes(top)):
        for child in list(parent.children):
            if child.sid in known or parent.sid == child.sid:
                continue
            leader = next((one for one in parent.children if one.placeholder and one.pid == child.sid), None)
            if leader is None:
                leader = _placeholder(child.sid, parent, child.sid, child.names)
                parent.children.append(leader)
            parent.children.remove(child)
            leader.children.append(child)


def _add_bearers(top: Node) -> None:
    """Who bears orphans into a session that their parent never was in: a placeholder below the session's leader."""
    parents = {child.pid: parent for parent in processes(top) for child in parent.children}
    nodes = {node.pid: node for node in processes(top)}
    numbers = {number for node in nodes.values() for number in (*node.threads, node.pid, node.pgid, node.sid)}
    for parent in list(nodes.values()):
        for child in list(parent.children):
            session = _birth_session(child)
            leader = None if session in (None, parent.sid) or parent.placeholder else nodes.get(session or 0)
            if leader is None or leader is child or not _is_above(parent, leader, parents):
                continue
            name = _unused(leader, nodes.values(), max(numbers) + 1)
            bearer = _placeholder(name.numbers[0], leader, leader.pid, leader.names | {name.numbers[0]: name})
            numbers.add(bearer.pid)
            nodes[bearer.pid] = bearer
            parent.children.remove(child)
            bearer.children.append(child)
            leader.children.append(bearer)
            parent.adopts = True


def _unused(node: Node, nodes: Iterable[Node], number: int) -> Name:
    """A name in the pid namespace of a node that nobody has; `number` is free in the tree's."""
    way = node.name(node.pid).way
    names = [name for one in nodes for name in one.names.values()]
    return Name((number, *(1 + max(name.seen(space) for name in names) for space in way[1:])), way)


def _is_above(node: Node, other: Node, parents: dict[int, Node]) -> bool:
    while other.pid in parents:
        other = parents[other.pid]
        if other is node:
            return True
    return False


def _add_group_leaders(top: Node, foreign_session: bool) -> None:
    """Dead leaders of groups: children of a member's parent in the session, which exit at the end."""
    known = {node.pid for node in processes(top)}
    for parent in list(processes(top)):
        for child in list(parent.children):
            if child.pgid not in known and not (foreign_session and child.pgid == top.pgid):
                above = parent if child.name(child.pgid).space == parent.space else child  # who can bear it
                above.children.insert(0, _placeholder(child.pgid, above, child.sid, child.names))
                known.add(child.pgid)

"""Numbers of tasks in pid namespaces below the tree's, and the order in which such trees are made."""

from __future__ import annotations

import pytest
from phaul_engine import plan
from phaul_engine.errors import ImageError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import core_pb2, pidns_pb2, pstree_pb2
from phaul_engine.numbering import Name, Numbering


def _checkpoint(*processes: tuple[int, int, int, int, tuple[int, ...], int], **parents: int) -> Checkpoint:
    """Of processes: number, parent, group, session, numbers below, pid namespace; and pid namespaces with parents."""
    checkpoint = Checkpoint()
    for name, parent in parents.items():
        checkpoint.put("pidns", int(name[1:]), pidns_pb2.pidns_entry(phaul_parent=parent))
    for pid, ppid, pgid, sid, below, space in processes:
        entry = pstree_pb2.pstree_entry(pid=pid, ppid=ppid, pgid=pgid, sid=sid, threads=[pid])
        if below:
            entry.phaul_numbers.add(number=pid, below=below, pid_ns=space)
        checkpoint.put("pstree", None, entry)
        core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
        core.tc.task_state, core.tc.exit_code = 1, 0
        core.tc.personality = core.tc.flags = core.tc.blk_sigset = 0
        core.tc.comm = b"one"
        checkpoint.put("core", pid, core)
    return checkpoint


def test_everybody_sees_those_in_and_below_his_own() -> None:
    numbering = Numbering(
        _checkpoint((7, 0, 7, 7, (), 0), (8, 7, 7, 7, (1,), 20), (9, 8, 7, 7, (2, 1), 21), _20=0, _21=20)
    )
    assert numbering.name(9) == Name((9, 2, 1), (0, 20, 21))
    assert [numbering.name(9).seen(space) for space in (0, 20, 21, 22)] == [9, 2, 1, 0]
    assert numbering.name(7).seen(20) == 0
    assert numbering.unused((0, 20), {300, 301}.__contains__) == Name((302, 300), (0, 20))


@pytest.mark.parametrize(
    ("below", "space", "parents"),
    [
        pytest.param((1,), 20, {}, id="no such namespace"),
        pytest.param((1,), 20, {"_20": 21, "_21": 20}, id="one below itself"),
        pytest.param((1, 2), 20, {"_20": 0}, id="more numbers than namespaces"),
    ],
)
def test_numbers_that_cannot_be(below: tuple[int, ...], space: int, parents: dict[str, int]) -> None:
    with pytest.raises(ImageError):
        Numbering(_checkpoint((8, 0, 8, 8, below, space), **parents))


def _births(checkpoint: Checkpoint) -> list[object]:
    found: list[object] = []
    for step in plan.order(plan.read_tree(checkpoint)):
        match step:
            case plan.Birth(_, child):
                found.append(child.pid)
            case plan.JoinGroup(node, parent):
                found.append((node.pid, parent and parent.pid))
            case plan.Death(node, _):
                found.append(-node.pid)
    return found


def test_tasks_of_another_namespace_come_when_all_above_are_in_their_groups() -> None:
    """The sandbox, 5, is in the group of 3, which nobody in it sees: it has it from its maker, 4."""
    processes = [(2, 0, 2, 2, (), 0), (4, 2, 3, 2, (), 0), (5, 4, 3, 2, (1,), 20), (6, 5, 3, 2, (2,), 20)]
    steps = _births(_checkpoint(*processes, (3, 2, 3, 2, (), 0), _20=0))
    assert steps == [2, 4, 3, (3, None), (4, None), 5, 6]


def test_a_parent_brings_its_child_into_a_group_that_this_does_not_see() -> None:
    processes = [(2, 0, 2, 2, (), 0), (3, 2, 3, 2, (), 0), (5, 2, 3, 2, (1,), 20)]
    assert _births(_checkpoint(*processes, _20=0)) == [2, 3, (3, None), 5, (5, 2)]


def test_the_first_process_of_a_namespace_comes_first() -> None:
    """Whoever has joined it stands before it in the images here."""
    processes = [(2, 0, 2, 2, (), 0), (3, 2, 2, 2, (2,), 20), (4, 2, 2, 2, (), 0), (5, 4, 2, 2, (1,), 20)]
    assert _births(_checkpoint(*processes, _20=0)) == [2, 4, (4, None), 5, 3]


def test_a_group_that_neither_a_process_nor_its_parent_sees() -> None:
    processes = [(2, 0, 2, 2, (), 0), (3, 2, 3, 2, (), 0), (5, 2, 2, 2, (1,), 20), (6, 5, 3, 2, (2,), 20)]
    with pytest.raises(ImageError, match="neither"):
        _births(_checkpoint(*processes, _20=0))


def test_a_process_above_its_parent() -> None:
    with pytest.raises(ImageError, match="above"):
        plan.read_tree(_checkpoint((2, 0, 2, 2, (), 0), (5, 2, 2, 2, (1,), 20), (6, 5, 2, 2, (), 0), _20=0))

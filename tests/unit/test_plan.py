"""The order in which a tree is made again."""

from __future__ import annotations

from phaul_engine.plan import Adoption, Birth, Death, JoinGroup, NewSession, Node, Step, order


def _node(pid: int, ppid: int, pgid: int, sid: int, *children: Node) -> Node:
    return Node(pid, ppid, pgid, sid, (pid,), children=list(children))


def _words(steps: list[Step]) -> list[str]:
    words = []
    for step in steps:
        match step:
            case Birth(parent, child):
                words.append(f"{parent.pid if parent else 'we'} bears {child.pid}")
            case NewSession(node):
                words.append(f"{node.pid} leads")
            case JoinGroup(node):
                words.append(f"{node.pid} joins {node.pgid}")
            case Adoption(node):
                words.append(f"{node.pid} adopts")
            case Death(node, _):
                words.append(f"{node.pid} dies")
    return words


def test_children_are_born_into_the_session_of_their_leader() -> None:
    root = _node(10, 0, 10, 10, _node(11, 10, 10, 10), _node(12, 10, 12, 10))
    assert _words(order(root)) == [
        "we bears 10",
        "10 leads",
        "10 bears 11",
        "10 bears 12",
        "12 joins 12",
        "11 joins 10",
    ]


def test_a_child_of_an_earlier_session_is_born_before_the_parent_leads_its_own() -> None:
    middle = _node(11, 10, 11, 11, _node(12, 11, 10, 10), _node(13, 11, 11, 11))
    words = _words(order(_node(10, 0, 10, 10, middle)))
    assert words.index("11 bears 12") < words.index("11 leads") < words.index("11 bears 13")


def test_a_dead_group_leader_is_a_placeholder_that_dies_last() -> None:
    words = _words(order(_node(10, 0, 10, 10, _node(12, 10, 11, 10))))
    assert words[-1] == "11 dies"
    assert words.index("11 joins 11") < words.index("12 joins 11")


def test_a_zombie_is_born_and_dies() -> None:
    zombie = Node(11, 10, 10, 10, (11,), exit_code=256)
    words = _words(order(_node(10, 0, 10, 10, zombie)))
    assert words[-1] == "11 dies"
    assert "10 bears 11" in words


def test_a_root_whose_session_leader_is_dead_is_born_by_a_placeholder() -> None:
    assert _words(order(_node(12, 0, 11, 11))) == [
        "we bears 11",
        "11 leads",
        "11 bears 12",
        "12 joins 11",
        "11 dies",
    ]


def test_a_root_in_a_session_from_outside_stays_in_ours() -> None:
    assert _words(order(_node(12, 0, 11, 11, _node(13, 12, 11, 11)), foreign_session=True)) == [
        "we bears 12",
        "12 bears 13",
    ]


def test_orphans_of_a_dead_session_leader_come_to_the_subreaper() -> None:
    words = _words(order(_node(10, 0, 10, 10, _node(12, 10, 11, 11), _node(13, 10, 13, 11))))
    assert words.count("10 bears 11") == 1
    assert words.index("11 leads") < words.index("11 bears 12") < words.index("11 dies")
    assert words.index("10 adopts") < words.index("11 dies")
    assert words.index("11 bears 13") < words.index("13 joins 13")


def test_an_orphan_of_a_living_session_is_born_by_a_placeholder_below_the_leader() -> None:
    leader = _node(6, 1, 6, 6)
    words = _words(order(_node(1, 0, 1, 1, leader, _node(8, 1, 6, 6))))
    assert words.index("1 adopts") < words.index("9 dies")
    assert words.index("6 leads") < words.index("6 bears 9") < words.index("9 bears 8") < words.index("9 dies")
    assert words.index("8 joins 6") < words.index("9 dies")

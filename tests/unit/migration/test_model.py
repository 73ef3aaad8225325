"""Every interleaving of the switchover with accidents: never two copies, never none unsaid, always an end.

One accident a run, with an arbiter none but silence by default; PHAUL_MODEL_ACCIDENTS=1 (as in `make test`) is one for
both, and 2 takes minutes.
"""

from __future__ import annotations

import os
from collections import deque

import pytest

from phaul.migration import Outcome, Row
from tests.unit.migration.world import DESTINATION, SOURCE, Move, World, finished, moves, start

pytestmark = pytest.mark.timeout(900)  # seconds of a machine that is busy with much else


class Graph:
    """The worlds that can be reached, how, and what follows each."""

    def __init__(self, first: World) -> None:
        self.came: dict[World, tuple[World, str] | None] = {first: None}
        self.calm: dict[World, list[World]] = {}
        todo = deque([first])
        while todo:
            world = todo.popleft()
            self.calm[world] = []
            for move in moves(world):
                self._note(world, move, todo)

    def _note(self, world: World, move: Move, todo: deque[World]) -> None:
        if not move.fault:
            self.calm[world].append(move.world)
        if move.world not in self.came:
            self.came[move.world] = (world, move.name)
            todo.append(move.world)

    def story(self, world: World) -> str:
        """How a world came about, for a person."""
        lines = [str(world)]
        while (step := self.came[world]) is not None:
            world, name = step
            lines.append(name)
        return "\n".join(reversed(lines))

    def reaching(self, goals: set[World]) -> set[World]:
        """The worlds from which a goal can be reached without further accidents."""
        before: dict[World, list[World]] = {}
        for world, nexts in self.calm.items():
            for after in nexts:
                before.setdefault(after, []).append(world)
        found, todo = set(goals), list(goals)
        while todo:
            for world in before.get(todo.pop(), ()):
                if world not in found:
                    found.add(world)
                    todo.append(world)
        return found


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "arbiter"])
def graph(request: pytest.FixtureRequest) -> Graph:
    accidents = os.environ.get("PHAUL_MODEL_ACCIDENTS", "0" if request.param else "1")
    return Graph(start(int(accidents), arbiter=request.param))


def quiet(world: World) -> bool:
    """Nobody is at work."""
    return not any((world.source.agent, world.source.other, world.destination.agent, world.destination.other))


def running(world: World) -> int:
    return (world.source.copy == "running") + (world.destination.copy == "running")


def at_rest(world: World) -> bool:
    """Nobody is at work, and each row that asks for more has been looked at and said so."""
    return quiet(world) and (finished(world, SOURCE) or world.source.said is not None)


def test_the_model_is_not_trivial(graph: Graph) -> None:
    assert len(graph.came) > 1_000
    outcomes = {world.source.said for world in graph.came if quiet(world)}
    assert {Outcome.MIGRATED, Outcome.STAYED, Outcome.IN_DOUBT} <= outcomes
    assert Outcome.LOST in outcomes or all(world.source.same_boot for world in graph.came)


def test_never_two_copies(graph: Graph) -> None:
    for world in graph.came:
        assert running(world) < 2, graph.story(world)


def test_what_ran_there_never_runs_here_again_unasked(graph: Graph) -> None:
    for world in graph.came:
        if world.ran_there and world.source.copy == "running":
            assert world.by_word, graph.story(world)


def test_no_copy_is_killed_that_is_the_only_one(graph: Graph) -> None:
    """Nobody but a host that goes down takes the last copy."""
    for world in graph.came:
        if world.source.copy == world.destination.copy == "dead":
            assert not (world.source.same_boot and world.destination.same_boot), graph.story(world)


def test_none_running_is_said(graph: Graph) -> None:
    for world in graph.came:
        if at_rest(world) and not running(world) and not world.gone_with_host:
            assert world.source.said in (Outcome.IN_DOUBT, Outcome.LOST), graph.story(world)


def test_every_path_ends(graph: Graph) -> None:
    ends = graph.reaching({world for world in graph.came if at_rest(world)})
    for world in graph.came:
        assert world in ends, graph.story(world)


def test_doubt_ends_by_itself_where_both_hosts_stayed_up(graph: Graph) -> None:
    ends = graph.reaching({world for world in graph.came if quiet(world) and running(world) == 1})
    for world in graph.came:
        up = world.source.same_boot and world.destination.same_boot
        if up and world.destination.row is not None:
            assert world in ends, graph.story(world)


def test_without_accidents_and_with_patience_it_moves() -> None:
    """Every interleaving in which no deadline passes."""
    seen, todo = set(), [start(faults=0)]
    ended = []
    while todo:
        world = todo.pop()
        patient = [move.world for move in moves(world) if not move.name.endswith(("deadline", "recovery"))]
        patient = [after for after in patient if after != world]
        if not patient:
            ended.append(world)
        for after in patient:
            if after not in seen:
                seen.add(after)
                todo.append(after)
    assert ended
    for world in ended:
        assert (world.source.copy, world.destination.copy) == ("dead", "running")
        assert (world.source.row, world.destination.row) == (Row.RELEASED, Row.RELEASED)
        assert world.source.said is world.destination.said is Outcome.MIGRATED


def _impatient(world: World, move: Move) -> bool:
    """Whether a deadline passes while a work goes on."""
    who, _, what = move.name.partition(": ")
    if what != "deadline":
        return False
    role, slot = who.split()
    return getattr(getattr(world, role), slot).working is not None


def test_with_an_arbiter_a_cut_link_needs_no_human() -> None:
    """Works end in their time, and from any moment on no message comes any more: one copy runs when all have had their
    say."""
    seen, todo = set(), [start(faults=0, arbiter=True)]
    while todo:
        world = todo.pop()
        for move in moves(world):
            if move.world not in seen and not _impatient(world, move):
                seen.add(move.world)
                todo.append(move.world)
    rest = [world for world in seen if at_rest(world) and (finished(world, DESTINATION) or world.destination.said)]
    assert {(world.arbiter, world.source.said) for world in rest} >= {
        ("resumed", Outcome.MIGRATED),
        ("resumed", Outcome.IN_DOUBT),
        ("discarded", Outcome.STAYED),
    }
    for world in rest:
        assert running(world) == 1, world

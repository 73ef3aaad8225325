"""A small world for the protocol: two hosts, their rows, their copies of the program, and a network. Every party moves
one step at a time, so that anything can happen between any two.

What was sent once may come at any time, any number of times, or never: loss, repetition and delay in one. A process
waits before each change of its row; what else it does follows at once, since being killed before a message is sent is
the same as its loss, and before a work is begun the same as before its effect.

Each host has at most one agent and one other process on the row (a keeper's recovery, `resolve`, or the answerer of
a question), so that a hung agent that wakes up late meets what was done without it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from phaul.migration import (
    Done,
    Ended,
    Event,
    Expired,
    Failed,
    Keep,
    Limits,
    LinkLost,
    Message,
    Outcome,
    Received,
    Refused,
    Role,
    Row,
    Send,
    Start,
    State,
    Step,
    Swap,
    Swapped,
    Verdict,
    Work,
    deadline,
    recover,
    step,
)
from phaul.migration.destination import Filling, answer
from phaul.migration.source import Committed, Copying

LIMITS = Limits(freezes=2, asks=1, tries=1)
ARBITRATED = dataclasses.replace(LIMITS, arbiter=True)
SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION


class Process(NamedTuple):
    """An agent or another process that works on a row."""

    state: State
    swap: Swap | None = None  # about to be made
    working: Work | None = None


class Host(NamedTuple):
    """One side. `copy` is its copy of the program: none, running, frozen, parked (dies with its tracer), dead."""

    copy: str
    row: Row | None
    synced: Row | None
    agent: Process | None
    other: Process | None = None
    same_boot: bool = True
    said: Outcome | None = None  # what the last process that ended said


class World(NamedTuple):
    source: Host
    destination: Host
    to_source: frozenset[Message] = frozenset()
    to_destination: frozenset[Message] = frozenset()
    faults: int = 0
    ran_there: bool = False
    by_word: bool = False  # the operator has vouched for something
    gone_with_host: bool = False  # a host went down on which the program ran
    arbiter: str | None = None  # what it says: open, resumed, discarded; None where there is none


class Move(NamedTuple):
    name: str
    world: World
    fault: bool = False


def start(faults: int, *, arbiter: bool = False) -> World:
    """The last round is about to end: everything before it touches nothing that could be lost."""
    return World(
        Host("running", Row.PREPARED, Row.PREPARED, Process(Copying(), working=Work.COPY)),
        Host("parked", Row.PREPARED, Row.PREPARED, Process(Filling())),
        faults=faults,
        arbiter="open" if arbiter else None,
    )


@functools.cache
def plain(state: State) -> State:
    """One object for all states that differ in words only: they make no difference, and worlds hash faster."""
    changes = {name: value for name, value in (("why", ""), ("round", 0)) if hasattr(state, name)}
    return _one(dataclasses.replace(state, **changes) if changes else state)


@functools.cache
def _one(state: State) -> State:
    return state


@functools.cache
def next_step(state: State, event: Event, arbitrated: bool) -> Step:
    return step(state, event, ARBITRATED if arbitrated else LIMITS)


def host(world: World, role: Role) -> Host:
    return world.source if role is SOURCE else world.destination


def with_host(world: World, role: Role, **changes: Any) -> World:
    changed: dict[str, Any] = {role.value: host(world, role)._replace(**changes)}
    return world._replace(**changed)


def moves(world: World) -> Iterator[Move]:
    """Everything that can happen next."""
    for role in Role:
        for slot in ("agent", "other"):
            process = getattr(host(world, role), slot)
            if process is not None:
                yield from process_moves(world, role, slot, process)
        yield from starts(world, role)
        yield from deliveries(world, role)
        if world.faults:
            yield from accidents(world._replace(faults=world.faults - 1), role)


def react(world: World, role: Role, slot: str, process: Process, event: Event) -> World:
    """An event, and what follows at once."""
    return follow(world, role, slot, process, next_step(process.state, event, world.arbiter is not None))


def follow(world: World, role: Role, slot: str, process: Process | None, made: Step) -> World:
    """Carry out the actions of a step, up to a change of the row. A process that has ended is gone."""
    swap, working = None, process.working if process else None
    for action in made.actions:
        match action:
            case Send(message):
                field = "to_destination" if role is SOURCE else "to_source"
                world = world._replace(**{field: getattr(world, field) | {message}})
            case Start(work):
                working = work
            case Swap():
                swap = dataclasses.replace(action, why="")
    if not isinstance(made.state, Ended):
        return with_host(world, role, **{slot: Process(plain(made.state), swap, working)})
    if slot == "agent":
        world = orphan(world, role)
    return with_host(world, role, **{slot: None}, said=made.state.outcome)


def orphan(world: World, role: Role) -> World:
    """The tracer is gone: what it had parked dies (PTRACE_O_EXITKILL)."""
    return with_host(world, role, copy="dead") if host(world, role).copy == "parked" else world


def process_moves(world: World, role: Role, slot: str, process: Process) -> Iterator[Move]:
    name = f"{role} {slot}"
    if process.swap is not None:
        yield exchange(world, role, slot, process, process.swap)
        return
    if (work := process.working) is not None:
        idle = process._replace(working=None)
        event: Event = Done(work, Verdict.SWITCH if work is Work.COPY else None)
        if work in _DECISIONS and effect(world, role, work).arbiter != _DECISIONS[work]:
            event = Failed(work)  # the other side was faster
        yield Move(f"{name}: {work.name}", react(effect(world, role, work), role, slot, idle, event))
        if work is Work.FREEZE:
            yield Move(f"{name}: {work.name} takes effect", effect(world, role, work))  # READY may overtake its end
        if world.faults:
            for before in {world, effect(world, role, work)}:
                for again in {True} if work in _DECISIONS else {False, work is Work.FREEZE}:
                    failed = before._replace(faults=world.faults - 1)
                    after = react(failed, role, slot, idle, Failed(work, again=again))
                    yield Move(f"{name}: {work.name} fails", after, fault=True)
    if deadline(process.state, LIMITS) is not None:
        yield Move(f"{name}: deadline", react(world, role, slot, process, Expired()))


_DECISIONS = {Work.CLAIM: "resumed", Work.REVOKE: "discarded"}
"""What the arbiter says if the work succeeds."""


def exchange(world: World, role: Role, slot: str, process: Process, swap: Swap) -> Move:
    """Compare-and-set the row."""
    row = host(world, role).row
    idle = process._replace(swap=None)
    if row is not swap.expected:
        assert row is not None
        return Move(f"{role} {slot}: row is {row}", react(world, role, slot, idle, Refused(row)))
    synced = swap.to if swap.sync else host(world, role).synced
    swapped = with_host(world, role, row=swap.to, synced=synced)
    return Move(f"{role} {slot}: row {row} -> {swap.to}", react(swapped, role, slot, idle, Swapped(swap.to)))


def effect(world: World, role: Role, work: Work) -> World:
    """What a work does to the copy of its host."""
    copy = host(world, role).copy
    match work:
        case Work.CLAIM | Work.REVOKE if world.arbiter == "open":
            return world._replace(arbiter=_DECISIONS[work])
        case Work.FREEZE:
            sent = world._replace(to_destination=world.to_destination | {Message.FINAL})
            return with_host(sent, role, copy="frozen") if copy == "running" else sent
        case Work.LET_GO | Work.UNDO if copy == "frozen":
            return with_host(world, role, copy="running")
        case Work.RELEASE if copy != "none":
            return with_host(world, role, copy="dead")
        case Work.DETACH if copy == "parked":
            return with_host(world, role, copy="frozen")
        case Work.WAKE if copy == "frozen":
            return with_host(world, role, copy="running")._replace(ran_there=True)
        case Work.SYNC:
            return with_host(world, role, synced=host(world, role).row)
        case Work.KILL:
            return with_host(world, role, copy="dead")
    return world


def starts(world: World, role: Role) -> Iterator[Move]:
    """A keeper recovers the row of a dead agent; an operator or a question does so beside a hung one."""
    here = host(world, role)
    if here.other is not None or here.row is None or finished(world, role):
        return
    made = recover(role, here.row, same_boot=here.same_boot, arbiter=world.arbiter is not None)
    after = follow(world, role, "other", None, made)
    if here.agent is None:
        yield Move(f"{role}: recovery", after)
    elif world.faults:
        yield Move(f"{role}: resolve beside a hung agent", after._replace(faults=world.faults - 1), fault=True)


def finished(world: World, role: Role) -> bool:
    """Whether the row asks for nothing more."""
    here = host(world, role)
    if role is SOURCE:
        return (here.row is Row.ABORTED and here.copy in ("running", "dead")) or (
            here.row is Row.RELEASED and here.copy == "dead"
        )
    done = {Row.DISCARDED: ("dead", "none"), Row.RESUMED: ("running",), Row.RELEASED: ("running", "dead")}
    return here.copy in done.get(here.row, ()) if here.row else True


def deliveries(world: World, role: Role) -> Iterator[Move]:
    """Any message that was ever sent may come now."""
    here = host(world, role)
    for message in world.to_source if role is SOURCE else world.to_destination:
        for slot in ("agent", "other") if role is SOURCE else ("agent",):
            process: Process | None = getattr(here, slot)
            if process is not None and process.swap is None:
                after = react(world, role, slot, process, Received(message))
                yield Move(f"{role} {slot}: receives {message}", after)
        if role is DESTINATION and message is Message.ASK and here.other is None:
            made = answer(here.row, same_boot=here.same_boot, arbiter=world.arbiter is not None)
            yield Move("destination: answerer", follow(world, role, "other", None, made))


def accidents(world: World, role: Role) -> Iterator[Move]:
    """What may go wrong at any time; the caller has taken it from the budget."""
    here = host(world, role)
    if here.agent is not None:
        yield Move(f"{role} agent: killed", orphan(with_host(world, role, agent=None, said=None), role), fault=True)
        if here.agent.swap is None:
            lost = react(world, role, "agent", here.agent, LinkLost())
            yield Move(f"{role} agent: link lost", lost, fault=True)
    if here.other is not None:
        yield Move(f"{role} other: killed", with_host(world, role, other=None, said=None), fault=True)
        waits = here.other.state
        if role is SOURCE and isinstance(waits, Committed) and here.other.swap is None:
            for keep in Role:
                if trustworthy(world, keep):
                    vouched = react(world._replace(by_word=True), role, "other", here.other, Keep(keep))
                    yield Move(f"operator keeps {keep}", vouched, fault=True)
    down = with_host(world, role, agent=None, other=None, row=here.synced, same_boot=False, said=None)
    copy = "dead" if here.copy != "none" else "none"
    down = with_host(down, role, copy=copy)._replace(gone_with_host=world.gone_with_host or here.copy == "running")
    yield Move(f"{role}: host goes down", down, fault=True)
    if role is DESTINATION and here.agent is None and here.other is None and here.row is not None:
        yield Move("destination: row lost", with_host(world, role, row=None), fault=True)


def trustworthy(world: World, keep: Role) -> bool:
    """The operator has looked: keeps the source only when the destination's copy is dead and cannot come back."""
    there = world.destination.copy
    if keep is SOURCE:
        return there == "dead"
    return there == "running"

"""The protocol of a migration: one copy runs at any instant, whatever fails.

    source                                              destination
    CONNECT, HELLO       ------------------------------>
                         <------------------------------ WELCOME
    row PREPARED (synced), own cgroup, PREPARE --------->
                                                         row PREPARED (synced), skeleton tree
                         <------------------------------ PREPARED
    rounds of pages      ==============================>
    row PREPARED -> FROZEN (synced)
    freeze, collect, hold the network
    last pages, FINAL    ==============================>
                                                         land: fill, settle, park, freeze
                                                         row PREPARED -> PARKED
                         <------------------------------ READY
    row FROZEN -> COMMITTED
    COMMIT               ------------------------------>
                                                         clear EXITKILL, detach (still frozen)
                                                         row PARKED -> RESUMED   <== the decision
                                                         announce, leave repair, inject, THAW
                                                         sync the row
                         <------------------------------ RESUMED
    row COMMITTED -> RELEASED
    kill the frozen copy
    RELEASED             ------------------------------>
                                                         row RESUMED -> RELEASED
                         <------------------------------ GOODBYE

The destination's row is the one arbiter: it leaves PARKED once, for RESUMED or DISCARDED. A source whose row is not
COMMITTED has never sent COMMIT and may go on by itself; one whose row is COMMITTED acts on the destination's answer
alone. An answer is given from a row only, and asking about an undecided one decides it.

With an arbiter (phaul.arbiter) the decision is written there first, by compare-and-set: the destination claims it
between detach and RESUMED, which costs the freeze one round trip to the arbiter. A source whose questions are not
answered asks the arbiter to revoke: whoever is first has it. Won, the source goes on; lost, it keeps its frozen copy
until the destination says RESUMED itself, since a host that is down has won nothing. An arbiter that nobody reaches
decides nothing, and all is as without one.

Everything here is pure. A party is a state; `step` takes a state and an event and returns the next state with the
actions to carry out, in their order. Rows change by compare-and-set (`Swap`), whose result is an event. Works run one
at a time: starting one stops the one before and waits for it. `recover` makes the state of a process that finds a row
after a crash; it goes on with the same `step`. docs/protocol.md is generated from this module.
"""

from __future__ import annotations

from .destination import recover as recover_destination
from .machine import (
    MOVES,
    Action,
    Broken,
    Cancel,
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
    states,
    step,
)
from .source import recover as recover_source

__all__ = [
    "MOVES",
    "Action",
    "Broken",
    "Cancel",
    "Done",
    "Ended",
    "Event",
    "Expired",
    "Failed",
    "Keep",
    "Limits",
    "LinkLost",
    "Message",
    "Outcome",
    "Received",
    "Refused",
    "Role",
    "Row",
    "Send",
    "Start",
    "State",
    "Step",
    "Swap",
    "Swapped",
    "Verdict",
    "Work",
    "deadline",
    "recover",
    "states",
    "step",
]


def recover(role: Role, row: Row, *, same_boot: bool, arbiter: bool = False, asked: bool = False) -> Step:
    """What a process does that finds an unfinished row whose owner is dead. It goes on with `step`.

    `same_boot` says whether the row was written in this boot of the host; otherwise nothing that it speaks of lives.
    `arbiter` as in `Limits`. `asked`: the source waits for the answer of this destination.
    """
    if role is Role.SOURCE:
        return recover_source(row, same_boot=same_boot)
    return recover_destination(row, same_boot=same_boot, arbiter=arbiter, asked=asked)

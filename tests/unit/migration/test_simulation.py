"""Thousands of simulated migrations of the real drivers and the real recovery, each with its own accidents.

PHAUL_SIMULATIONS=1000000 python -m pytest tests/unit/migration/test_simulation.py --timeout 0        a longer run
"""

from __future__ import annotations

import collections
import os
import random

import pytest

from phaul import driver
from phaul.migration import Event, Expired, Limits, LinkLost, Message, Received, State, Step, step
from phaul.migration.source import Committed
from tests.unit.migration.clock import Clock
from tests.unit.migration.simulation import simulate

COUNT = int(os.environ.get("PHAUL_SIMULATIONS", "1000"))
PARTS = 4
OUTCOMES = {"migrated", "stayed", "cancelled", "in-doubt", "killed"}


@pytest.mark.parametrize("part", range(PARTS))
def test_one_copy_runs_whatever_happens(part: int) -> None:
    """Seeds begin at a random number, which an AssertionError tells."""
    first = random.randrange(1 << 40)
    clock, seen = Clock(), collections.Counter[str]()
    for seed in range(first, first + COUNT // PARTS):
        seen[simulate(seed, clock)] += 1
    assert seen.keys() >= OUTCOMES, f"these simulations are too easy: {seen}"


def test_a_run_is_the_same_every_time() -> None:
    assert [simulate(seed, Clock()) for seed in range(30)] == [simulate(seed, Clock()) for seed in range(30)]


def test_a_source_that_does_not_wait_for_an_answer_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the simulation is worth: libvirt's source goes on when it hears nothing."""

    def hasty(state: State, event: Event, limits: Limits) -> Step:
        if isinstance(state, Committed) and isinstance(event, (Expired, LinkLost)):
            event = Received(Message.DISCARDED)
        return step(state, event, limits)

    def search() -> None:
        for seed in range(2000):
            simulate(seed, Clock())

    monkeypatch.setattr(driver, "step", hasty)
    with pytest.raises(AssertionError, match=r"seed .*(two copies|runs here again)"):
        search()

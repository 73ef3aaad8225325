"""The machines that tests of this directory share: two at a time, on one wire."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm import image
from tests.vm.machine import Machine, machines

PAIRS = (("6.1", "6.12"), ("6.12", "6.12"))


@pytest.fixture(scope="session", params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Machine, Machine]]:
    """Two machines with these kernels."""
    reason = image.missing()
    if reason:
        pytest.skip(reason)
    with machines(*request.param) as (one, other):
        yield one, other


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a program, a hold or a mount of its own on a machine."""
    if "pair" not in request.fixturenames:
        yield
        return
    pair: tuple[Machine, Machine] = request.getfixturevalue("pair")
    before = [machine.leftovers() for machine in pair]
    yield
    for machine, there in zip(pair, before, strict=True):
        left = machine.leftovers() - there
        if left:
            pytest.fail(
                f"left on the machine with Linux {machine.kernel}:\n  " + "\n  ".join(sorted(left)), pytrace=False
            )

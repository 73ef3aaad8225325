"""Soft-dirty bits on the kernels that have them: the tests of tests/kernel, run in the machines."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine

pytestmark = pytest.mark.timeout(960)
CHECKOUT = "/opt/phaul/checkout"
TIMEOUT = 900.0


def test_memory_by_soft_dirty_bits(pair: tuple[Machine, Machine]) -> None:
    """What a restless program writes, drops, reads and shares arrives."""
    machine = pair[0]
    tests = "tests/kernel/test_memory.py"
    chosen = "(SOFT_DIRTY and not 3- and not 2-) or stopped or shared or went_away"
    words = ["env", "-C", CHECKOUT, "python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "600"]
    done = machine.run([*words, tests, "-k", chosen], timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout


def test_what_the_host_can_do(pair: tuple[Machine, Machine]) -> None:
    """`phaul check` finds the tracker of each kernel."""
    for machine in pair:
        said = machine.run(["phaul", "check", "--json"], timeout=240).stdout
        assert "soft-dirty" in said
        assert ("WP_ASYNC and" in said) == (machine.kernel != "6.1"), said

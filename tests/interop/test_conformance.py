"""A few programs of CRIU's suite, with and without rounds of pre-copy; `make conformance` runs all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.interop import conformance

_NAMES = ("sleeping00", "pthread00-pac", "sigpending", "timers", "pipe00", "file_attr", "maps00", "wait00", "stopped")
_CONTAINED = ("utsname", "msgque", "netns", "tempfs")


@pytest.mark.parametrize("rounds", [0, 2])
def test_programs_that_judge_themselves(tmp_path: Path, rounds: int) -> None:
    _run(tmp_path, _NAMES, rounds=rounds)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("flavour", ["ns", "uns"])
def test_programs_in_containers(tmp_path: Path, flavour: str) -> None:
    _run(tmp_path, _CONTAINED, flavour=flavour)


def _run(tmp_path: Path, names: tuple[str, ...], *, rounds: int = 0, flavour: str = "h") -> None:
    place = conformance.peers()
    if place is None:
        pytest.skip("the programs are not here; PHAUL_PEERS can say where their directory is")
    if os.geteuid():
        pytest.skip("needs root")
    listed = tmp_path / "list"
    listed.write_text("".join(f"static/{name}\n" for name in names))
    found = conformance.run(place, listed, rounds=rounds, jobs=2, flavour=flavour)
    assert found == {f"static/{name}": "passed" for name in names}

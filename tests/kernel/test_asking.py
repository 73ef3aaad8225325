"""A freeze in which threads are asked while the tree is looked at from outside (Departure.begin_collect)."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.departure import Departure
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import mm_pb2
from phaul_engine.target import Tracer

from tests.subjects.programs import build, wait_until


@pytest.fixture
def program(tmp_path: Path) -> Iterator[int]:
    """Some threads, with some descriptors."""
    status = tmp_path / "status"
    words = [str(build("heap")), "--status", str(status), "--heap", "1", "--rate", "1"]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_until(status.exists, "a status")
    yield process.pid
    process.kill()
    process.wait()


def _collect(departure: Departure) -> Checkpoint:
    return departure.collect(hold=lambda: None, seal=lambda _: None, note=lambda _: None)


def _memory(checkpoint: Checkpoint, pid: int) -> bytes:
    entry: mm_pb2.mm_entry = checkpoint.one("mm", pid)
    return entry.SerializeToString(deterministic=True)


def test_what_is_injected_is_not_in_the_images(program: int) -> None:
    with Tracer() as tracer, Departure(tracer, program) as departure:
        departure.survey(timeout_ms=1000)
        found = []
        for at_once in (False, True, True):
            departure.freeze(timeout_ms=1000)
            assert not departure.changed()
            if at_once:
                departure.begin_collect()
            checkpoint = _collect(departure)
            found.append((_memory(checkpoint, program), checkpoint.files(), len(checkpoint.records("files"))))
            departure.let_go()
        assert found == [found[0]] * 3


def test_a_program_that_is_killed_while_it_is_asked(program: int) -> None:
    """Whoever gives the freeze up for that is rid of it."""
    with Tracer() as tracer, Departure(tracer, program) as departure:
        departure.survey(timeout_ms=1000)
        departure.freeze(timeout_ms=1000)
        assert not departure.changed()
        departure.begin_collect()
        os.kill(program, signal.SIGKILL)
        departure.let_go()
    with open(f"/proc/{program}/stat") as stat:
        assert stat.read().split()[2] == "Z"

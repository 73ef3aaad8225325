"""A frozen copy that is killed writes nothing to memory that others see."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine import silence
from phaul_engine.cgroup import Hierarchy, Hold, HoldGoneError, path_of
from phaul_engine.target import Tracer, stop_tree

from tests.subjects import last_words
from tests.subjects.programs import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    file = tmp_path / "words"
    file.write_bytes(bytes(4096))
    child = subprocess.Popen([sys.executable, last_words.__file__, file])
    wait_until(lambda: last_words.read(file).count > 2, "the program counts")
    yield child
    child.kill()
    child.wait()


@pytest.fixture
def hold(program: subprocess.Popen[bytes]) -> Iterator[Hold]:
    with Hierarchy.find() as hierarchy:
        made = Hold.create(hierarchy, path_of(program.pid), f"phaul-test-{os.getpid()}")
        made.gather(lambda: [program.pid])
        made.freeze(2.0)
        yield made
        with contextlib.suppress(HoldGoneError):
            left = Hold.open(hierarchy, made.path)
            left.kill(5.0)
            left.remove()


def test_a_killed_program_speaks_otherwise(program: subprocess.Popen[bytes], hold: Hold, tmp_path: Path) -> None:
    hold.kill(5.0)
    words = last_words.read(tmp_path / "words")
    assert words.lock & last_words.OWNER_DIED, "this test's program does not do what the others are about"
    assert words.tid == 0


def test_a_silenced_one_does_not(program: subprocess.Popen[bytes], hold: Hold, tmp_path: Path) -> None:
    before = last_words.read(tmp_path / "words")
    assert before.lock == program.pid
    assert silence.kill(hold, 5.0) == ""
    assert not hold.populated
    assert last_words.read(tmp_path / "words") == before, "not even its counter moved"


def test_what_cannot_be_silenced_dies_all_the_same(
    program: subprocess.Popen[bytes], hold: Hold, tmp_path: Path
) -> None:
    count = last_words.read(tmp_path / "words").count
    with Tracer() as tracer, stop_tree(tracer, program.pid, timeout_ms=1000):
        assert "could not be silenced" in silence.kill(hold, 5.0)
        assert not hold.populated
    assert last_words.read(tmp_path / "words").count == count, "it never ran"


def test_an_empty_or_missing_hold(program: subprocess.Popen[bytes], hold: Hold) -> None:
    silence.kill(hold, 5.0)
    assert silence.kill(hold, 5.0) == ""
    hold.remove()
    with Hierarchy.find() as hierarchy, pytest.raises(HoldGoneError):
        silence.kill(Hold.open(hierarchy, hold.path), 5.0)

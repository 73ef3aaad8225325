"""Decoders in C under AddressSanitizer and UndefinedBehaviorSanitizer: what fuzzing has found before, and a few seconds
of changed inputs. `make fuzz` does it with guidance, for as long as one likes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.fuzz import harness

_SECONDS = 4


@pytest.mark.parametrize("name", harness.SUBJECTS)
def test_no_input_does_harm(name: str, tmp_path: Path) -> None:
    try:
        fuzzer = harness.build(name, tmp_path, None)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"it does not compile:\n{error.stderr}")
    command = harness.command(fuzzer, _SECONDS, os.getpid(), tmp_path, libfuzzer=False)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 0

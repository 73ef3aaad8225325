"""`make fuzz`: all fuzzers for a while, native ones with libFuzzer and those in Python with atheris where these are.

    python -m tests.fuzz.campaign [--seconds N] [NAME ...]

Each gets an equal part of the seconds. What a fuzzer is stopped by is left in .state/fuzz/NAME, to be looked at,
repaired and kept in the corpus; `--merge` keeps inputs that reach something new.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz import harness
from tests.fuzz.targets import TARGETS

_ROOT = Path(__file__).parents[2]
_STATE = _ROOT / ".state" / "fuzz"
_SMALL = 8192  # bytes of an input that is kept


def _run(name: str, seconds: int, *, merge: bool) -> bool:
    """One fuzzer; whether nothing was found."""
    found = _STATE / name
    shutil.rmtree(found, ignore_errors=True)
    found.mkdir(parents=True)
    seed = int(time.time()) % (1 << 31)
    compiler = harness.clang()
    if name in harness.SUBJECTS:
        programs = _STATE / "bin"
        programs.mkdir(exist_ok=True)
        fuzzer = harness.build(name, programs, compiler)
        command = harness.command(fuzzer, seconds, seed, found, libfuzzer=compiler is not None)
    elif importlib.util.find_spec("atheris"):
        limits = [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={found}/", "-timeout=20"]
        corpus = [str(found), *_seeds(name)]
        command = [sys.executable, "-m", "tests.fuzz.coverage_guided", name, *limits, *corpus]
    else:
        examples = {**os.environ, "PHAUL_FUZZ_EXAMPLES": str(seconds * 100)}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--timeout",
            "0",
            "tests/fuzz/test_targets.py",
            "-k",
            f"[{name}]",
        ]
        return subprocess.run(command, cwd=_ROOT, env=examples, check=False).returncode == 0
    with (found.parent / f"{name}.log").open("w") as log:
        done = subprocess.run(command, cwd=found, env=_environment(), stdout=log, stderr=log, check=False)
    stopped = [path for path in found.iterdir() if path.name.startswith(("crash-", "leak-", "timeout-", "oom-"))]
    if merge and not stopped:
        _keep(name, found)
    text = (found.parent / f"{name}.log").read_text(errors="replace")
    print(f"{name}: {'stopped, see ' + str(found) if stopped else _last(text)}", flush=True)
    return done.returncode == 0 and not stopped


def _environment() -> dict[str, str]:
    paths = f"{_ROOT}:{_ROOT / 'engine'}"
    return {**os.environ, "PYTHONPATH": paths, "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1"}


def _seeds(name: str) -> list[str]:
    """Directories with what is known: atheris reads files."""
    seeds = _STATE / f"{name}.seeds"
    shutil.rmtree(seeds, ignore_errors=True)
    seeds.mkdir()
    for number, content in enumerate(TARGETS[name].seeds()):
        (seeds / str(number)).write_bytes(content)
    return [str(seeds), *([str(harness.CORPUS / name)] if (harness.CORPUS / name).is_dir() else [])]


def _keep(name: str, found: Path) -> None:
    """Put the smallest inputs that reached something new into the corpus: as many as are small and few."""
    corpus = harness.CORPUS / name
    corpus.mkdir(exist_ok=True)
    for path in sorted(found.iterdir(), key=lambda one: one.stat().st_size)[:40]:
        if path.stat().st_size <= _SMALL:
            shutil.copy(path, corpus / path.name[:12])


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if "DONE" in line or "runs" in line]
    return lines[-1] if lines else text[-300:]


def main() -> int:
    """Run them all, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    names = given.names or [*harness.SUBJECTS, *TARGETS]
    _STATE.mkdir(parents=True, exist_ok=True)
    if harness.clang() is None:
        print("no clang with libFuzzer here: native fuzzers run without guidance (.ci/packages fuzz installs it)")
    good = [_run(name, max(given.seconds // len(names), 1), merge=given.merge) for name in names]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

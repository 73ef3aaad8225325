"""`make coverage`: which lines and branches the tests reach, of Python and of the native library, in their own process
and in all that they start: commands, agents under their keepers, what SSH starts. Processes that are killed or replaced
tell nothing of themselves; what is injected into programs (engine/native/interp) has nowhere to count.

    python -m tests.coverage [DIRECTORY or FILE of tests ...]

Prints the share of each file, of the protocol's, of the others and of C; .state/coverage/html shows what is missing.
The native library is built to count while this runs, and built anew after it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import coverage

_ROOT = Path(__file__).parents[1]
_STATE = _ROOT / ".state" / "coverage"
_CONFIG = _STATE / "config"
_HOOK = Path(sysconfig.get_path("purelib")) / "phaul_coverage.pth"
_PROTOCOL = (
    *("phaul/migration/", "phaul/driver.py", "phaul/journal.py", "phaul/recovery.py", "phaul/keeper.py"),
    *("phaul/asking.py", "phaul/resolve.py"),
)
_LEFT_OUT = ("*/pb/*", "*/generate.py", "*/__main__.py")

_SETTINGS = """\
[run]
branch = True
parallel = True
data_file = {state}/data
source = {root}/phaul, {root}/engine/phaul_engine
omit = {omit}
patch = _exit, execv, fork
sigterm = True
concurrency = thread
disable_warnings = no-data-collected, module-not-measured, module-not-imported, couldnt-parse
"""


def _native(*options: str) -> None:
    """Build the native library of the editable installation with these options of meson."""
    (build,) = (_ROOT / "build").glob("cp*")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in (["meson", "configure", str(build), *options], ["ninja", "-C", str(build)]):
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    for path in build.rglob("*.gcda"):
        path.unlink()


@contextmanager
def _counting() -> Iterator[None]:
    """The native library counts, for several threads and processes at once."""
    _native("-Db_coverage=true", "-Dc_args=-fprofile-update=atomic")
    try:
        yield
    finally:
        _native("-Db_coverage=false", "-Dc_args=[]")


@contextmanager
def _everywhere() -> Iterator[None]:
    """Every Python process of the virtual environment measures itself, whoever starts it: what passes through SSH and
    sudo has no variables of ours."""
    start = f"os.environ.setdefault('COVERAGE_PROCESS_START', {str(_CONFIG)!r})"
    start += "; import coverage; coverage.process_startup()"
    _HOOK.write_text(f"import os; exec({start!r}) if os.path.exists({str(_CONFIG)!r}) else None\n")
    try:
        yield
    finally:
        _HOOK.unlink()


def _measure(suites: list[str]) -> int:
    shutil.rmtree(_STATE, ignore_errors=True)
    _STATE.mkdir(parents=True)
    _STATE.chmod(0o777)
    _CONFIG.write_text(_SETTINGS.format(state=_STATE, root=_ROOT, omit=", ".join(_LEFT_OUT)))
    with _counting(), _everywhere():
        command = [sys.executable, "-m", "pytest", "-q", "--timeout", "600", *suites]
        every = os.environ | {"PHAUL_FAILING_CALLS": "all"}
        status = subprocess.run(command, cwd=_ROOT, env=every, check=False).returncode
        _report_native()
    return status


def _report_native() -> None:
    """What gcov has counted in C."""
    summary = _STATE / "native.json"
    command = [sys.executable, "-m", "gcovr", "--root", str(_ROOT), "--filter", "engine/native/", str(_ROOT / "build")]
    command += ["--json-summary", str(summary), "--html-details", str(_STATE / "native.html")]
    subprocess.run(command, cwd=_ROOT, check=True)
    whole = json.loads(summary.read_text())
    for one in (*whole["files"], whole | {"filename": "C"}):
        print(f"{_shares(one['line_percent'], one['branch_percent'])}  {one['filename']}")


def _report() -> None:
    measured = coverage.Coverage(config_file=str(_ROOT / "pyproject.toml"), data_file=str(_STATE / "data"))
    measured.combine([str(_STATE)], keep=True)
    measured.save()
    measured.html_report(directory=str(_STATE / "html"), ignore_errors=True)
    measured.json_report(outfile=str(_STATE / "report.json"), ignore_errors=True)
    files = json.loads((_STATE / "report.json").read_text())["files"]
    groups: dict[str, list[dict[str, int]]] = {"protocol": [], "others": []}
    for name, one in sorted(files.items()):
        path = os.path.relpath(name, _ROOT) if os.path.isabs(name) else name
        group = "protocol" if path.startswith(_PROTOCOL) else "others"
        groups[group].append(one["summary"])
        missing = ", ".join(map(str, one["missing_lines"])) if group == "protocol" else ""
        branches = (
            ", ".join(f"{start}->{end}" for start, end in one.get("missing_branches", ()))
            if missing or group == "protocol"
            else ""
        )
        print(f"{_share([one['summary']])}  {path}  {missing}{' / ' if branches else ''}{branches}")
    for group, summaries in groups.items():
        print(f"{_share(summaries)}  {group}")


def _share(summaries: list[dict[str, int]]) -> str:
    """Lines and branches, in percent."""
    shares = []
    for covered, total in (("covered_lines", "num_statements"), ("covered_branches", "num_branches")):
        whole = sum(one[total] for one in summaries)
        shares.append(100.0 * sum(one[covered] for one in summaries) / whole if whole else 100.0)
    return _shares(*shares)


def _shares(lines: float, branches: float) -> str:
    return f"lines {lines:5.1f} %, branches {branches:5.1f} %"


def main() -> int:
    """Run the tests, tell what they reached."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hook goes
    status = _measure(sys.argv[1:] or ["tests"])
    _report()
    return status


if __name__ == "__main__":
    sys.exit(main())

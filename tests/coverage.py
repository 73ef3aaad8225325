"""`make coverage`: which lines and branches of Python the tests reach, in their own process and in all that they start:
commands, agents under their keepers, what SSH starts. Processes that are killed tell nothing of themselves.

    python -m tests.coverage [DIRECTORY or FILE of tests ...]

Prints the share of each file, of the protocol's and of the others; .state/coverage/html shows what is missing.
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
    with _everywhere():
        command = [sys.executable, "-m", "pytest", "-q", "--timeout", "600", *suites]
        return subprocess.run(command, cwd=_ROOT, check=False).returncode


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
    return "lines {:5.1f} %, branches {:5.1f} %".format(*shares)


def main() -> int:
    """Run the tests, tell what they reached."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hook goes
    status = _measure(sys.argv[1:] or ["tests"])
    _report()
    return status


if __name__ == "__main__":
    sys.exit(main())

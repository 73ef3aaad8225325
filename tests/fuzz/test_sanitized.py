"""The decoders under AddressSanitizer and UndefinedBehaviorSanitizer: the same tests, on a library built for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_SUBJECTS = ["tests/unit/memory"]


def _runtime(name: str) -> str:
    """The path of a sanitizer's library; what the compiler does not have, it echoes."""
    path = subprocess.run(["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"the compiler has no {name}")
    return str(Path(path).resolve())


def _tool(name: str) -> str:
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both packages and the instrumented library."""
    build = tmp_path_factory.mktemp("build")
    installed = tmp_path_factory.mktemp("installed")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    meson = _tool("meson")
    for command in (
        [meson, "setup", str(build), str(_ROOT), "-Db_sanitize=address,undefined", "-Db_lundef=false"],
        [meson, "install", "-C", str(build), "--destdir", str(installed), "--quiet"],
    ):
        subprocess.run(command, env=environment, check=True, capture_output=True)
    return next(installed.rglob("_native*.so")).parent.parent


@pytest.mark.timeout(400)
def test_no_sanitizer_complains(packages: Path, tmp_path: Path) -> None:
    reports = tmp_path / "report"
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{_runtime('libasan.so')}:{_runtime('libubsan.so')}",
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={reports}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={reports}",
        "PYTHONPATH": f"{packages}:{sysconfig.get_path('purelib')}:{_ROOT}",
    }
    # -S: without the hook of an editable installation, which would bring the ordinary library
    check = "import phaul_engine._native as native; print(native.__file__)"
    where = subprocess.run(
        [sys.executable, "-S", "-c", check], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert where.stdout.startswith(str(packages)), where.stderr
    command = [sys.executable, "-S", "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *_SUBJECTS]
    run = subprocess.run(command, env=environment, cwd=_ROOT, capture_output=True, text=True)
    found = "\n".join(report.read_text() for report in tmp_path.glob("report*"))
    assert not found, found
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]

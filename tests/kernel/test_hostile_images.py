"""Images of a real program that somebody changed to do harm: each is refused in words of ours, and leaves no process,
no file, no segment and no descriptor behind. Whole, they are a program that runs on."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.errors import EngineError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.directory import ImageDirectory
from phaul_engine.restore import restore
from phaul_engine.target import Tracer

from tests.kernel.hostile import demands
from tests.kernel.hostile.breaking import Break

_SUBJECT = Path(demands.__file__).with_name("subject.py")
_SHARED_MEMORY = Path("/dev/shm/phaul-hostile-victim")
_CASES = {name: (refusal, make) for name, refusal, make in demands.cases()}
_PATIENCE = 20.0  # seconds
_WALL = 0x40000000


class Victim:
    """What must stay as it is while images are refused: the program's directory, with things that images name."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.images = home.parent / "images"
        self.pids: list[int] = []

    def look(self) -> object:
        """All that can be seen of it, and of what else images might have changed."""
        gc.collect()  # an error may hold the frames that it went through
        files = {path: (path.lstat().st_mode, path.lstat().st_size) for path in sorted(self.home.rglob("*"))}
        kernel = [Path(f"/proc/sysvipc/{name}").read_text().count("\n") for name in ("shm", "sem", "msg")]
        elsewhere = [sorted(os.listdir(place)) for place in ("/dev/shm", "/etc")]
        return files, kernel, elsewhere, (self.home / "victim").read_text(), len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def victim(workplace: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """Images of the subject, which is dead, and what it leaves."""
    made = Victim(tmp_path_factory.mktemp("victim") / "home")
    made.home.mkdir()
    (made.home / "victim").write_text("precious")
    (made.home / "ring").symlink_to("ring")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(made.home / "stale"))
    _SHARED_MEMORY.write_text("precious")
    quiet = subprocess.DEVNULL
    command = [sys.executable, str(_SUBJECT), str(made.home)]
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        _wait(lambda: (made.home / "ready").exists(), "the subject is not ready")
        dump = [sys.executable, "-m", "phaul", "dump", "--pid", str(process.pid), "--images", str(made.images)]
        done = subprocess.run(dump, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        made.pids = [record.message.pid for record in Checkpoint.load(made.images).records("pstree")]
        process.wait(5)
        _end(made.pids)
        # The first restore opens /proc/self/fd for all that follow it, which `look` would count.
        _restore(_broken(made, lambda c: None, tmp_path_factory.mktemp("first")))
        _end(made.pids)
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _SHARED_MEMORY.unlink()


def _wait(condition: object, words: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, words
        time.sleep(0.01)


def _end(pids: list[int]) -> None:
    """End what there is of the program, and take our dead children from the table: their numbers are wanted again."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def over() -> bool:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG | _WALL)[0]:
                pass
        return not any(Path(f"/proc/{pid}").exists() for pid in pids)

    _wait(over, "the program is left")


def _restore(images: Path) -> int:
    with Tracer() as tracer, ImageDirectory(images) as directory:
        return restore(tracer, directory)


def _broken(victim: Victim, make: Break, place: Path) -> Path:
    """The images with a change."""
    checkpoint = Checkpoint.load(victim.images)
    make(checkpoint)
    for pages in victim.images.glob("pages-*.img"):
        os.link(pages, place / pages.name)
    checkpoint.save(place)
    return place


def test_what_is_refused_here_runs_on_otherwise(victim: Victim, tmp_path: Path) -> None:
    try:
        pid = _restore(_broken(victim, lambda c: None, tmp_path))
        assert pid == victim.pids[0]
        assert all(Path(f"/proc/{one}").exists() for one in victim.pids)
        assert os.readlink(f"/proc/{pid}/cwd") == str(victim.home)
    finally:
        _end(victim.pids)


@pytest.mark.parametrize("name", _CASES)
def test_refused(name: str, victim: Victim, tmp_path: Path) -> None:
    refusal, make = _CASES[name]
    images = _broken(victim, make, tmp_path)
    before = victim.look()
    try:
        with pytest.raises(EngineError, match=refusal):
            _restore(images)
    finally:
        _end(victim.pids)
    assert victim.look() == before

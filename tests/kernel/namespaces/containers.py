"""Programs in namespaces of their own, stored and restored from outside by the engine; each checks itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaul_engine.dump import dump, open_store
from phaul_engine.errors import GoneError
from phaul_engine.images.directory import ImageDirectory
from phaul_engine.proc.tree import read_tree
from phaul_engine.restore import restore
from phaul_engine.target import Tracer

_FRAME = """
import os, signal, sys, traceback
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR1}})
if os.getsid(0) != os.getpid():
    os.setsid()
os.closerange(3, 1024)
for number in (1, 2):
    os.dup2(0, number)
{text}
try:
    setup()
finally:
    if sys.exc_info()[0]:
        open({place!r} + "/log", "a").write(traceback.format_exc())
open({place!r} + "/ready", "w").close()
while True:
    signal.sigwait({{signal.SIGUSR1}})
    try:
        check()
        told = "ok"
    except BaseException:
        told = traceback.format_exc()
    with open({place!r} + "/told.new", "w") as out:
        out.write(told)
    os.rename({place!r} + "/told.new", {place!r} + "/told")
"""
_PATIENCE = 60.0


@dataclass
class Container:
    """A program that has set itself up, process `pid` here, and looks at itself when it is asked."""

    pid: int
    place: Path

    def check(self) -> None:
        """AssertionError with what it says if it does not find everything as it was."""
        told = self.place / "told"
        told.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        _wait_for(told, self.pid)
        assert told.read_text() == "ok", told.read_text()

    def carry(self, **options: Any) -> None:
        """Store and restore it."""
        images = Path(tempfile.mkdtemp(prefix="images-", dir=self.place))
        with ImageDirectory(images) as directory:
            with Tracer() as tracer, contextlib.ExitStack() as stack:
                dump(tracer, self.pid, directory, open_store(directory, stack), options=options)
            _wait_until_gone(self.pid)
            with Tracer() as tracer:
                self.pid = restore(tracer, directory, options=options)


@contextlib.contextmanager
def container(place: Path, text: str, *flags: str) -> Iterator[Container]:
    """Run a program in new namespaces (`flags` as unshare(1) has them). `text` defines `setup` and `check`."""
    place.chmod(0o777)
    program = _FRAME.format(text=text, place=str(place))
    words = ["unshare", *flags, "--fork", sys.executable, "-I", "-S", "-c", program]
    log = (place / "log").open("wb")
    outer = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
    log.close()
    made = Container(0, place)
    try:
        _wait_for(place / "ready", outer.pid)
        made.pid = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
        yield made
    finally:
        for pid in (*_tree(made.pid), outer.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        outer.wait()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(made.pid, 0)


def _wait_for(path: Path, pid: int) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not path.exists():
        log = path.parent / "log"
        assert time.monotonic() < deadline, log.read_text()
        assert Path(f"/proc/{pid}").exists(), log.read_text()
        time.sleep(0.01)


def _wait_until_gone(pid: int) -> None:
    """Until its number is free, as a session's too: parents have to take notice, this process perhaps among them."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    deadline = time.monotonic() + _PATIENCE
    while any(_session(entry) == pid for entry in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _tree(pid: int) -> list[int]:
    with contextlib.suppress(GoneError):
        return [process.pid for process in read_tree(pid)] if pid else []
    return []


def _session(entry: Path) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int((entry / "stat").read_bytes().rpartition(b")")[2].split()[3])
    return 0

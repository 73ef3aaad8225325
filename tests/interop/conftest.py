"""What these tests compare with: CRIU 4.2, and crit of any version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop import conformance


@pytest.fixture(scope="session")
def criu() -> Path:
    """CRIU 4.2: $PHAUL_CRIU, or criu-4.2/criu in the peers' directory."""
    given, place = os.environ.get("PHAUL_CRIU"), conformance.peers()
    path = Path(given) if given else place / "criu-4.2/criu" if place else None
    if path is None or not path.exists():
        pytest.skip("CRIU 4.2 is not here; PHAUL_CRIU, or PHAUL_PEERS, can say where it is")
    if os.geteuid():
        pytest.skip("CRIU needs root")
    found = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    if "4.2" not in found.stdout:
        pytest.skip(f"{path} does not run here, or is not CRIU 4.2: {found.stdout}{found.stderr}")
    return path


@pytest.fixture(scope="session")
def crit() -> str:
    """CRIU's image tool, from Debian's package criu."""
    path = shutil.which("crit")
    if path is None:
        pytest.skip("crit is not installed (package criu)")
    return path


# A program with one of each: pipe with data, socket pair with data, eventfd, epoll, a file without a name, memfd,
# shared memory, a lock, an interval timer, a thread and a child.
PROGRAM = """
import fcntl, mmap, os, select, signal, socket, sys, threading, time
left, right = socket.socketpair(); left.send(b"queued")
out, into = os.pipe(); os.write(into, b"piped")
event = os.eventfd(3)
watch = select.epoll(); watch.register(left.fileno(), select.EPOLLIN)
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen()
ghost = open(sys.argv[1] + "/ghost", "w+b"); ghost.write(b"unlinked" * 1000); ghost.flush()
os.unlink(ghost.name)
locked = open(sys.argv[1] + "/caf\\udce9", "w"); fcntl.flock(locked, fcntl.LOCK_EX)
shared = mmap.mmap(-1, 1 << 20); shared[:6] = b"shared"
memory = os.memfd_create("memory"); os.write(memory, b"memory")
signal.signal(signal.SIGUSR1, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 5000)
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
if os.fork():
    print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The program, running in a session of its own; it is killed at the end."""
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "work")]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass

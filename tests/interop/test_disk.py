"""CRIU restores what phaul stored, phaul restores what CRIU stored, and crit reads every file of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.images.directory import file_name
from phaul_engine.images.kinds import parse_name

from tests.interop.test_images import decode

# Says over and over that all of what it set up is as it was: signals, a timer, threads, memory, files, pipes, sockets.
_PROGRAM = """
import mmap, os, select, signal, socket, sys, threading, time
work = sys.argv[1]
out = os.open(work + "/out", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
left, right = socket.socketpair(); left.send(b"queued")
reading, writing = os.pipe(); os.write(writing, b"piped")
event = os.eventfd(3)
watch = select.epoll(); watch.register(right.fileno(), select.EPOLLIN)
ghost = open(work + "/ghost", "w+b"); ghost.write(b"unlinked"); ghost.flush(); os.unlink(ghost.name)
shared = mmap.mmap(-1, 1 << 16); shared[:6] = b"shared"
own = bytearray(os.urandom(1 << 20)); twin = bytes(own)
signal.signal(signal.SIGUSR1, lambda *_: os.write(out, b"signal\\n"))
ticks = []
def count():
    while True:
        time.sleep(0.02)
        ticks.append(1)
threading.Thread(target=count, daemon=True).start()
child = os.fork() == 0
if child:
    while True:
        shared[8:16] = (int.from_bytes(shared[8:16], "big") + 1).to_bytes(8, "big")
        time.sleep(0.02)
step = 0
while True:
    step += 1
    seen, begun = (len(ticks), shared[8:16]), time.monotonic()
    while (len(ticks) == seen[0] or shared[8:16] == seen[1]) and time.monotonic() < begun + 5:
        time.sleep(0.02)
    ghost.seek(0)
    sound = (own == twin, right.recv(6, socket.MSG_PEEK) == b"queued", ghost.read() == b"unlinked",
             len(ticks) > seen[0], shared[:6] == b"shared", shared[8:16] > seen[1], len(watch.poll(0)) == 1)
    os.write(out, f"{step} {os.getpid()} {all(sound)} {sound}\\n".encode())
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The program, in a session of its own; what is left of it in the end is killed."""
    quiet = subprocess.DEVNULL
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "work")]
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    _follow(tmp_path, 2)
    yield process
    if Path(f"/proc/{process.pid}").exists():
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _lines(tmp_path: Path) -> list[str]:
    out = tmp_path / "work" / "out"
    return out.read_text().splitlines() if out.exists() else []


def _follow(tmp_path: Path, more: int) -> list[str]:
    """The lines of the program, when it has written so many more."""
    wanted = len(_lines(tmp_path)) + more
    deadline = time.monotonic() + 20
    while len(_lines(tmp_path)) < wanted:
        assert time.monotonic() < deadline, "the program does not go on"
        time.sleep(0.05)
    return _lines(tmp_path)


def _run(*command: object) -> None:
    words = list(map(str, command))
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL, close_fds=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _until_gone(process: subprocess.Popen[bytes], images: Path) -> None:
    from phaul_engine.images.checkpoint import Checkpoint

    process.wait(10)
    deadline = time.monotonic() + 20  # an orphan is reaped by init, which takes its time
    for record in Checkpoint.load(images, pagemaps=False).records("pstree"):
        for tid in record.message.threads:
            while Path(f"/proc/{tid}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)


def _sound(tmp_path: Path, pid: int, before: int) -> None:
    """It goes on where it was, with all that it had, and hears signals."""
    lines = _follow(tmp_path, 3)
    assert len(lines) > before
    os.kill(pid, signal.SIGUSR1)
    lines = [line for line in _follow(tmp_path, 3) if line != "signal"]
    assert [line for line in lines if f" {pid} True " not in line] == []
    assert [int(line.split()[0]) for line in lines] == list(range(1, len(lines) + 1))
    assert "signal" in _lines(tmp_path)


def test_criu_restores_what_phaul_stored(criu: Path, program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    images = tmp_path / "images"
    _run(sys.executable, "-m", "phaul", "dump", "--pid", program.pid, "--images", images)
    _until_gone(program, images)
    before = len(_lines(tmp_path))
    _run(criu, "restore", "-d", "-D", images, "-o", "restore.log")
    _sound(tmp_path, program.pid, before)


def test_criu_restores_rounds_of_phaul(criu: Path, program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    first, last = tmp_path / "first", tmp_path / "last"
    _run(sys.executable, "-m", "phaul", "pre-dump", "--pid", program.pid, "--images", first)
    _run(sys.executable, "-m", "phaul", "dump", "--pid", program.pid, "--images", last, "--parent", first)
    _until_gone(program, last)
    before = len(_lines(tmp_path))
    _run(criu, "restore", "-d", "-D", last, "-o", "restore.log")
    _sound(tmp_path, program.pid, before)


def test_phaul_restores_what_criu_stored(criu: Path, program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    _run(criu, "dump", "-t", program.pid, "-D", images, "-o", "dump.log")
    _until_gone(program, images)
    before = len(_lines(tmp_path))
    _run(sys.executable, "-m", "phaul", "restore", "--images", images, "--detach")
    _sound(tmp_path, program.pid, before)


def test_crit_reads_every_file(crit: str, program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    from phaul_engine.images.checkpoint import Checkpoint

    images = tmp_path / "images"
    _run(sys.executable, "-m", "phaul", "dump", "--pid", program.pid, "--images", images)
    checkpoint = Checkpoint.load(images)
    for kind, ident in checkpoint.files():
        name = file_name(kind, ident)
        assert len(decode(crit, images / name)["entries"]) == len(checkpoint.records(kind, ident)), name
    known = {name for name in os.listdir(images) if parse_name(name)}
    assert known == set(os.listdir(images)), "every file is one of CRIU's"

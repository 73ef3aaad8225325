"""Whole programs, collected and made again by the engine: descriptors at their numbers, in their tasks."""

from __future__ import annotations

import ctypes
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from phaul_engine.collect import Collector
from phaul_engine.errors import EngineError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.proc import access, fdinfo
from phaul_engine.proc.locks import FileLock
from phaul_engine.skeleton import Skeleton
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.skeletons import private_pages

_PR_SET_CHILD_SUBREAPER = 36
_HEAD = """
import fcntl, os, select, signal, struct, sys, threading, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
path = sys.argv[1]
def at(fd, number):
    os.dup2(fd, number)
    os.close(fd)
"""
_WAIT = """
os.write(1, b"ready")
signal.sigwait([signal.SIGUSR1])
"""

_LOCKS = """
for number in range(10, 14):
    at(os.open(f"{path}/{number}", os.O_RDWR | os.O_CREAT), number)
fcntl.lockf(10, fcntl.LOCK_EX, 10, 5)
fcntl.lockf(10, fcntl.LOCK_SH, 0, 100)
fcntl.flock(11, fcntl.LOCK_EX)
at(os.dup(11), 20)
fcntl.fcntl(12, 37, struct.pack("hhxxxxqqixxxx", fcntl.F_WRLCK, 0, 3, 4, 0))
os.close(13)
at(os.open(f"{path}/13", os.O_RDONLY), 13)
fcntl.fcntl(13, 1024, fcntl.F_RDLCK)
"""

_EVERYTHING = """
at(os.open(f"{path}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 10)
os.write(10, b"before\\n")
reader, writer = os.pipe()
at(reader, 11); at(writer, 12)
os.write(12, b"in the pipe")
at(os.eventfd(3, os.EFD_SEMAPHORE), 13)
at(os.memfd_create("memory"), 14)
at(os.open(f"{path}/gone", os.O_RDWR | os.O_CREAT), 15)
os.write(15, b"ghost"); os.unlink(f"{path}/gone")
epoll = select.epoll()
at(os.dup(epoll.fileno()), 16)
epoll.close()
epoll = select.epoll.fromfd(16)
epoll.register(11, select.EPOLLIN); epoll.register(13, select.EPOLLIN | select.EPOLLET)
os.mkdir(f"{path}/cwd"); os.chdir(f"{path}/cwd")
child = os.fork()
if child == 0:
    signal.sigwait([signal.SIGUSR1])
    assert os.read(11, 100) == b"in the pipe"
    os.write(10, b"child\\n")
    os._exit(7)
"""
_EVERYTHING_CHECK = """
os.kill(child, signal.SIGUSR1)
assert os.waitpid(child, 0)[1] == 7 << 8
assert epoll.poll(0) == [(13, select.EPOLLIN)], epoll.poll(0)
os.write(12, b"again")
assert sorted(epoll.poll(0))[0] == (11, select.EPOLLIN)
assert os.eventfd_read(13) == 1
assert os.pread(15, 100, 0) == b"ghost"
assert os.getcwd() == f"{path}/cwd"
assert os.readlink("/proc/self/fd/14") == "/memfd:memory (deleted)"
os.write(10, b"after\\n")
os._exit(0)
"""


_TERMINAL = r"""
import pty, termios, traceback
child, master = pty.fork()
if child == 0:
    os.dup2(os.open(f"{path}/errors", os.O_WRONLY | os.O_APPEND), 2)
    def foreground():
        return os.tcgetpgrp(0), os.getsid(0), os.getpgrp()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    background = os.fork()
    if background == 0:
        signal.sigwait([signal.SIGUSR1])
        os.close(os.open("/dev/tty", os.O_RDWR))
        os._exit(5)
    os.setpgid(background, background)
    os.tcsetpgrp(0, background)
    settings = termios.tcgetattr(0)
    settings[3] &= ~termios.ECHO
    settings[6][termios.VINTR] = b"x"
    termios.tcsetattr(0, termios.TCSANOW, settings)
    settings = termios.tcgetattr(0)
    before = foreground()
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 44, 111, 0, 0))
    signal.sigwait([signal.SIGUSR1])
    try:
        assert foreground() == before, (foreground(), before)
        assert termios.tcgetattr(0) == settings
        assert struct.unpack("4H", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))[:2] == (44, 111)
        os.kill(background, signal.SIGUSR1)
        assert os.waitpid(background, 0)[1] == 5 << 8
        os.tcsetpgrp(0, os.getpgrp())
        assert os.read(0, 100) == b"line\n"
        os.write(1, b"well\n")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
while struct.unpack("4H", fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(8)))[0] != 44:
    time.sleep(0.01)
time.sleep(0.1)
"""
_TERMINAL_CHECK = r"""
os.write(master, b"line\n")
os.kill(child, signal.SIGUSR1)
answer = os.read(master, 100)
assert answer == b"well\r\n", answer
assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""


def _start(text: str, path: Path) -> subprocess.Popen[bytes]:
    (path / "program.py").write_text(_HEAD + text)
    out = (path / "out").open("wb")
    with out, (path / "errors").open("wb") as errors:
        program = subprocess.Popen(
            [sys.executable, path / "program.py", path],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
    try:
        for _ in range(200):
            if (path / "out").read_bytes() == b"ready":
                return program
            assert program.poll() is None, (path / "errors").read_text()
            signal.sigtimedwait([], 0.05)
        raise AssertionError("the program does not get ready")
    except BaseException:
        program.kill()
        program.wait()
        raise


def _again(
    program: subprocess.Popen[bytes], meanwhile: Callable[[Checkpoint], None], after: Callable[[int], None]
) -> None:
    """Collect a tree, kill it, make it again and let it go; then `after` is called with its pid."""
    pages = {}
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # so that the pids are free when we say so
    with Tracer() as tracer, stop_tree(tracer, program.pid, timeout_ms=1000) as tree:
        with Collector() as collector:
            collection = collector.collect(tree, survey=False)
        assert collection.blockers == []
        checkpoint = Checkpoint.from_bytes(collection.checkpoint.to_bytes())
        for ident in checkpoint.idents("mm"):
            assert isinstance(ident, int)
            pages[ident] = private_pages(ident, checkpoint)
        for pid in pages:
            os.kill(pid, signal.SIGKILL)
    program.wait()
    for pid in pages.keys() - {program.pid}:
        os.waitpid(pid, 0)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    meanwhile(checkpoint)
    with Tracer() as tracer, Skeleton(tracer, checkpoint) as skeleton:
        skeleton.build()
        for inner, pid in skeleton.pids().items():
            with open(f"/proc/{pid}/mem", "r+b", buffering=0) as mem:
                for address, content in pages[inner]:
                    mem.seek(address)
                    mem.write(content)
        skeleton.protect()
        skeleton.finish(checkpoint)
        skeleton.release()
        root = next(iter(skeleton.pids().values()))
    after(root)


def _locks(pid: int, fd: int) -> list[tuple[str, str, int, int]]:
    def tell(lock: FileLock) -> tuple[str, str, int, int]:
        return lock.kind, lock.access, lock.start, lock.end

    proc = access.open_process(pid)
    try:
        return sorted(tell(lock) for lock in fdinfo.read(proc, fd).locks)
    finally:
        os.close(proc)


def test_file_locks(tmp_path: Path) -> None:
    program = _start(_LOCKS + _WAIT, tmp_path)
    before = {fd: _locks(program.pid, fd) for fd in (10, 11, 12, 13, 20)}
    assert [len(locks) for locks in before.values()] == [2, 1, 1, 1, 1]

    def after(pid: int) -> None:
        try:
            assert {fd: _locks(pid, fd) for fd in before} == before
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    _again(program, lambda checkpoint: None, after)


def test_a_lock_that_somebody_else_holds_is_refused(tmp_path: Path) -> None:
    import fcntl

    program = _start(_LOCKS + _WAIT, tmp_path)
    held: list[int] = []

    def take(_: Checkpoint) -> None:
        held.append(os.open(tmp_path / "11", os.O_RDWR))
        fcntl.flock(held[0], fcntl.LOCK_EX)

    with pytest.raises(EngineError, match="lock fd 11"):
        _again(program, take, lambda pid: None)
    os.close(held[0])


def test_everything_at_once(tmp_path: Path) -> None:
    program = _start(_EVERYTHING + _WAIT + _EVERYTHING_CHECK, tmp_path)

    def after(pid: int) -> None:
        os.kill(pid, signal.SIGUSR1)
        _, status = os.waitpid(pid, 0)
        assert status == 0, (tmp_path / "errors").read_text()

    _again(program, lambda checkpoint: None, after)
    assert (tmp_path / "log").read_text() == "before\nchild\nafter\n"


def test_a_terminal_and_its_session(tmp_path: Path) -> None:
    """Both sides of a pty, the session it controls, its foreground group, settings and size."""
    program = _start(_TERMINAL + _WAIT + _TERMINAL_CHECK, tmp_path)

    def after(pid: int) -> None:
        os.kill(pid, signal.SIGUSR1)
        _, status = os.waitpid(pid, 0)
        assert status == 0, (tmp_path / "errors").read_text()

    _again(program, lambda checkpoint: None, after)


def test_a_terminal_of_somebody_else_is_a_blocker() -> None:
    child, master = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"])
    try:
        assert os.read(master, 10).startswith(b"up")
        with Tracer() as tracer, stop_tree(tracer, child, timeout_ms=1000) as tree, Collector() as collector:
            texts = [str(blocker) for blocker in collector.collect(tree, survey=True).blockers]
        assert any(f"fd 0 of pid {child} (" in text and "is a terminal" in text for text in texts)
        assert any("a process with a controlling terminal" in text for text in texts)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(master)

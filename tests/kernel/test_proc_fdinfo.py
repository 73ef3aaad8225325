"""fdinfo of live descriptors."""

import ctypes
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.errors import GoneError
from phaul_engine.proc.access import open_process
from phaul_engine.proc.fdinfo import read

LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def proc() -> Iterator[int]:
    fd = open_process(os.getpid())
    yield fd
    os.close(fd)


def test_pipe_and_cloexec(proc: int) -> None:
    reader, writer = os.pipe()
    try:
        info = read(proc, reader)
        assert info.cloexec
        assert info.ino == os.fstat(reader).st_ino
        assert read(proc, writer).flags & os.O_ACCMODE == os.O_WRONLY
    finally:
        os.close(reader)
        os.close(writer)


def test_eventfd(proc: int) -> None:
    fd = LIBC.eventfd(0x1234, 1)
    try:
        info = read(proc, fd)
        assert (info.eventfd_count, info.eventfd_semaphore) == (0x1234, True)
    finally:
        os.close(fd)


def test_epoll(proc: int) -> None:
    reader, writer = os.pipe()
    epoll = select.epoll()
    try:
        epoll.register(reader, select.EPOLLIN | select.EPOLLET)
        (target,) = read(proc, epoll.fileno()).epoll
        assert (target.tfd, target.data & 0xFFFFFFFF, target.ino) == (reader, reader, os.fstat(reader).st_ino)
        assert target.events & select.EPOLLET
    finally:
        epoll.close()
        os.close(reader)
        os.close(writer)


def test_signalfd(proc: int) -> None:
    mask = ctypes.c_uint64(1 << (signal.SIGUSR2 - 1))
    fd = LIBC.signalfd(-1, ctypes.byref(mask), os.O_CLOEXEC)  # glibc's sigset_t is larger; only 8 bytes are read
    try:
        assert read(proc, fd).sigmask == 1 << (signal.SIGUSR2 - 1)
    finally:
        os.close(fd)


def test_inotify_and_lock(proc: int, tmp_path: Path) -> None:
    fd = LIBC.inotify_init1(0)
    file = os.open(tmp_path / "locked", os.O_RDWR | os.O_CREAT)
    try:
        wd = LIBC.inotify_add_watch(fd, os.fsencode(tmp_path), 0x3FF)
        (watch,) = read(proc, fd).inotify
        assert (watch.wd, watch.ino, watch.mask) == (wd, os.stat(tmp_path).st_ino, 0x3FF)
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 5)
        (lock,) = read(proc, file).locks
        assert (lock.kind, lock.access, lock.start, lock.end, lock.pid) == ("POSIX", "WRITE", 5, 14, os.getpid())
        assert lock.ino == os.fstat(file).st_ino
    finally:
        os.close(fd)
        os.close(file)


def test_pidfd(proc: int) -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        info = read(proc, fd)
        assert info.pid == os.getpid()
        assert info.ns_pids[0] == os.getpid()
    finally:
        os.close(fd)


def test_a_closed_descriptor_and_a_gone_process() -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    proc = open_process(child)
    try:
        with pytest.raises(GoneError):
            read(proc, 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with pytest.raises(GoneError):
            read(proc, 0)
    finally:
        os.close(proc)
    with pytest.raises(GoneError):
        open_process(child)

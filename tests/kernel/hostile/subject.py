"""A program that has one of nearly everything, for images to be made of and broken: `python subject.py DIRECTORY`.

It says "ready" on a file of that name and waits.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time

_SECONDS = 100_000
_IPC_PRIVATE, _IPC_CREAT = 0, 0o1000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmat.restype = ctypes.c_void_p
_libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
kept: list[object] = []


def _files() -> None:
    kept.append(os.open("data", os.O_RDWR | os.O_CREAT, 0o644))
    fcntl.lockf(kept[-1], fcntl.LOCK_EX)  # type: ignore[arg-type]
    ghost = os.open("ghost", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(ghost, b"boo")
    os.unlink("ghost")
    os.mkfifo("fifo")
    fifo = os.open("fifo", os.O_RDWR)
    os.write(fifo, b"first in")
    memory = os.memfd_create("memory")
    os.write(memory, b"memory" * 1000)
    kept.extend((ghost, fifo, memory))


def _counters() -> int:
    event = os.eventfd(7)
    reading, writing = os.pipe()
    os.write(writing, b"in the pipe")
    inner, outer = select.epoll(), select.epoll()
    inner.register(event, select.EPOLLIN)
    outer.register(inner.fileno(), select.EPOLLIN)
    watch = _libc.inotify_init()
    _libc.inotify_add_watch(watch, b".", 2)
    timer = _libc.timerfd_create(1, 0)
    _libc.timerfd_settime(timer, 0, struct.pack("4q", 0, 0, _SECONDS, 0), None)
    mask = _libc.signalfd(-1, struct.pack("16Q", 1 << 11, *[0] * 15), 0)
    pidfd = os.pidfd_open(os.getpid())
    kept.extend((event, reading, writing, inner, outer, watch, timer, mask, pidfd))
    return event


def _sockets(event: int) -> None:
    left, right = socket.socketpair()
    socket.send_fds(left, [b"with a descriptor"], [event])
    named = socket.socket(socket.AF_UNIX)
    named.bind("socket")
    named.listen(3)
    listener = socket.create_server(("127.0.0.1", 0))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    kept.extend((left, right, named, listener, datagrams))


def _memory() -> None:
    shared = mmap.mmap(-1, 1 << 16)
    shared[:6] = b"shared"
    segment = _libc.shmget(_IPC_PRIVATE, 4096, _IPC_CREAT | 0o600)
    kept.extend((shared, _libc.shmat(segment, None, 0)))
    _libc.shmctl(segment, 0, None)  # IPC_RMID: it goes with its last user


def _task() -> None:
    ident = ctypes.c_int()
    _libc.syscall(222, 1, None, ctypes.byref(ident))  # timer_create
    _libc.syscall(223, ident, 0, struct.pack("4q", 0, 0, _SECONDS, 0), None)  # timer_settime
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    os.kill(os.getpid(), signal.SIGUSR1)
    threading.Thread(target=time.sleep, args=(_SECONDS,), daemon=True).start()
    allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
    _libc.prctl(22, 2, struct.pack("HxxxxxxQ", 1, ctypes.addressof(allow)), 0, 0)  # PR_SET_SECCOMP


def main() -> None:
    """Have it all, and wait."""
    os.chdir(sys.argv[1])
    _files()
    _sockets(_counters())
    _memory()
    child = os.fork()
    if child:
        _task()
        os.close(os.open("ready", os.O_CREAT, 0o600))
    while True:
        time.sleep(_SECONDS)


if __name__ == "__main__":
    main()

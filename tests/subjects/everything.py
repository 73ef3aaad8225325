"""A small program that has one of each kind of kernel object, and says whether they are still what they were.

    python everything.py DIRECTORY ADDRESS

DIRECTORY is on storage that both hosts see. At each SIGUSR1 it writes into DIRECTORY/said how often it has looked
before, and "ok" or what it found wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pty
import select
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path

_SYS_INOTIFY_INIT1, _SYS_INOTIFY_ADD_WATCH, _SYS_SIGNALFD4 = 294, 254, 289
_SYS_TIMERFD_CREATE, _SYS_TIMERFD_SETTIME, _SYS_TIMERFD_GETTIME = 283, 286, 287
_IN_CREATE = 0x100
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNGETIFF, _IFF_TUN_NO_PI = 0x400454CA, 0x800454D2, 0x1001
_TUN_NAME = b"tun7"
_HOUR = 3600

libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result: int = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result


class Everything:
    """The objects; each has something in it that `check` looks for."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directory = directory
        self.number = 0
        self.memory = os.memfd_create("memory")
        os.write(self.memory, b"memory")
        self.file = os.open(directory / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        fcntl.lockf(self.file, fcntl.LOCK_EX, 4, 2)
        self.device = os.open("/dev/zero", os.O_RDONLY)
        self.event = os.eventfd(3, os.EFD_NONBLOCK)
        self.pipe = os.pipe()
        os.mkfifo(directory / "fifo")
        self.fifo = os.open(directory / "fifo", os.O_RDWR)
        self.inotify = _call(_SYS_INOTIFY_INIT1, os.O_NONBLOCK)
        (directory / "watched").mkdir()
        _call(_SYS_INOTIFY_ADD_WATCH, self.inotify, bytes(directory / "watched"), _IN_CREATE)
        self.namespace = os.open("/proc/self/ns/uts", os.O_RDONLY)
        self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self.netlink.bind((0, 0))
        self.process = os.pidfd_open(os.getpid())
        self.signals = _call(_SYS_SIGNALFD4, -1, struct.pack("Q", 1 << (signal.SIGWINCH - 1)), 8, os.O_NONBLOCK)
        self.timer = _call(_SYS_TIMERFD_CREATE, time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        _call(_SYS_TIMERFD_SETTIME, self.timer, 0, struct.pack("4q", 0, 0, _HOUR, 0), None)
        self.master, self.terminal = pty.openpty()
        self.listener = socket.create_server((address, 7788))
        self.caller = socket.create_connection((address, 7788), source_address=(address, 0))
        self.called = self.listener.accept()[0]
        self.datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind((address, 7788))
        self.pair = socket.socketpair()
        self.named = socket.socket(socket.AF_UNIX)
        self.named.bind(str(directory / "named"))
        self.named.listen(4)
        self.apart = _start_apart()
        self.epoll = select.epoll()
        self.epoll.register(self.pair[1], select.EPOLLIN)

    def check(self) -> None:
        """AssertionError or OSError where something is not as it was."""
        token = b"%d" % self.number
        self.number += 1
        assert os.pread(self.memory, 100, 0) == b"memory"
        assert os.readlink(f"/proc/self/fd/{self.memory}") == "/memfd:memory (deleted)"
        os.write(self.file, b"x")
        assert os.fstat(self.file).st_size == self.number
        assert os.read(self.device, 2) == bytes(2)
        assert os.eventfd_read(self.event) == 3
        os.eventfd_write(self.event, 3)
        for reader, writer in (self.pipe, (self.fifo, self.fifo), (self.terminal, self.master)):
            end = b"\n" if writer == self.master else b""
            os.write(writer, token + end)
            assert os.read(reader, 100) == token + end
        os.read(self.master, 100)  # the terminal's echo
        (self.directory / "watched" / token.decode()).touch()
        assert token in os.read(self.inotify, 100)
        assert os.fstat(self.namespace).st_ino == os.stat("/proc/self/ns/uts").st_ino
        assert self.netlink.getsockname()[0] != 0
        signal.pidfd_send_signal(self.process, signal.SIGWINCH)
        assert struct.unpack("I", os.read(self.signals, 128)[:4])[0] == signal.SIGWINCH
        left = struct.unpack("4q", _timer_left(self.timer))[2]
        assert 0 < left < _HOUR
        self._check_sockets(token)

    def _check_sockets(self, token: bytes) -> None:
        for sender, receiver in ((self.caller, self.called), self.pair):
            sender.send(token)
            assert self.epoll.poll(0) == ([] if receiver is self.called else [(receiver.fileno(), select.EPOLLIN)])
            assert receiver.recv(100) == token
        self.datagrams.sendto(token, self.datagrams.getsockname())
        assert self.datagrams.recv(100) == token
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(self.directory / "named"))
            self.named.accept()[0].close()
        os.write(self.apart[1], token)
        assert os.read(self.apart[0], 100) == _TUN_NAME


def _start_apart() -> tuple[int, int]:
    """A child in a network of its own, with a TUN device and nothing else; asked for the device's name, it answers. It
    ends with us."""
    (questions, ask), (hear, answers) = os.pipe(), os.pipe()
    if os.fork() == 0:
        for fd in map(int, os.listdir("/proc/self/fd")):  # sockets of the other network too
            if fd > 2 and fd not in (questions, answers):
                with contextlib.suppress(OSError):
                    os.close(fd)
        if libc.unshare(_CLONE_NEWNET) != 0:
            os._exit(1)
        tun = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", _TUN_NAME, _IFF_TUN_NO_PI))
        while os.read(questions, 100):
            os.write(answers, fcntl.ioctl(tun, _TUNGETIFF, bytes(40))[:16].rstrip(b"\0"))
        os._exit(0)
    os.close(questions)
    os.close(answers)
    return hear, ask


def _timer_left(timer: int) -> bytes:
    left = ctypes.create_string_buffer(32)
    _call(_SYS_TIMERFD_GETTIME, timer, left)
    return left.raw


def main(directory: Path, address: str) -> None:
    """Be there, and tell when asked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGWINCH])
    everything = Everything(directory, address)
    said = directory / "said"
    while True:
        said.with_suffix(".new").write_text(f"{everything.number} {_verdict(everything)}")
        said.with_suffix(".new").rename(said)
        signal.sigwait([signal.SIGUSR1])


def _verdict(everything: Everything) -> str:
    try:
        everything.check()
    except (AssertionError, OSError):
        return traceback.format_exc()
    return "ok"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

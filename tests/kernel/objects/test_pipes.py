"""Pipes and fifos."""

from __future__ import annotations

import fcntl
import os
import select
import socket
from pathlib import Path

import pytest
from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.pb import pipe_data_pb2
from phaul_engine.objects import pipe, unix_socket  # noqa: F401 (registers the kind)

from tests.kernel.objects.subject import at, moves, moves_in_turn, started

F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032


def _events(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLOUT)
    return sum(event for _, event in poll.poll(0))


def _pipe(reader: int, writer: int, flags: int = 0) -> None:
    ends = os.pipe2(flags)
    at(ends[0], reader)
    at(ends[1], writer)


def test_content_size_and_flags() -> None:
    content = bytes(range(256)) * 500

    def setup() -> None:
        _pipe(10, 11)
        fcntl.fcntl(10, F_SETPIPE_SZ, 1 << 18)
        os.write(11, content)
        os.read(10, 1000)
        fcntl.fcntl(11, fcntl.F_SETFL, os.O_NONBLOCK)

    def check() -> None:
        assert fcntl.fcntl(10, F_GETPIPE_SZ) == 1 << 18
        assert fcntl.fcntl(10, fcntl.F_GETFL) == os.O_RDONLY
        assert fcntl.fcntl(11, fcntl.F_GETFL) == os.O_WRONLY | os.O_NONBLOCK
        assert os.read(10, 1 << 20) == content[1000:]
        os.write(11, b"more")
        assert os.read(10, 100) == b"more"
        os.close(11)
        assert os.read(10, 100) == b""

    moves(setup, check)


def test_a_full_pipe() -> None:
    def setup() -> None:
        _pipe(10, 11, os.O_NONBLOCK)
        while True:
            try:
                os.write(11, bytes(4096))
            except BlockingIOError:
                break

    def check() -> None:
        with pytest.raises(BlockingIOError):
            os.write(11, bytes(4096))
        assert len(os.read(10, 1 << 20)) == 65536

    moves(setup, check)


def test_packets_stay_packets() -> None:
    def setup() -> None:
        _pipe(10, 11, os.O_DIRECT)
        for packet in (b"one", b"second", b"3"):
            os.write(11, packet)

    def check() -> None:
        assert [os.read(10, 100) for _ in range(3)] == [b"one", b"second", b"3"]
        os.write(11, b"a")
        os.write(11, b"b")
        assert os.read(10, 100) == b"a"

    moves(setup, check)


def test_one_end_only() -> None:
    """A reader without a writer sees the end after the content; a writer without a reader gets SIGPIPE's error."""

    def setup() -> None:
        _pipe(10, 11)
        os.write(11, b"last words")
        os.close(11)
        _pipe(12, 13)
        os.close(12)

    def check() -> None:
        assert os.read(10, 100) == b"last words"
        assert os.read(10, 100) == b""
        with pytest.raises(BrokenPipeError):
            os.write(13, b"x")

    moves(setup, check)


def test_ends_opened_again() -> None:
    """Two descriptions of one end have flags of their own; one for reading and writing keeps a pipe open."""

    def setup() -> None:
        _pipe(10, 11)
        at(os.open("/proc/self/fd/10", os.O_RDONLY | os.O_NONBLOCK), 12)
        at(os.open("/proc/self/fd/11", os.O_RDWR), 13)
        os.write(11, b"data")

    def check() -> None:
        flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (10, 11, 12, 13)]
        large = 0o100000
        assert flags == [os.O_RDONLY, os.O_WRONLY, os.O_RDONLY | os.O_NONBLOCK | large, os.O_RDWR | large]
        assert os.fstat(10).st_ino == os.fstat(12).st_ino == os.fstat(13).st_ino
        assert os.read(12, 100) == b"data"
        with pytest.raises(BlockingIOError):
            os.read(12, 100)
        os.close(11)
        os.write(13, b"still")
        assert os.read(10, 100) == b"still"

    moves(setup, check)


def test_an_end_outside_is_a_blocker() -> None:
    reader, writer = os.pipe()
    try:
        for end in (reader, writer):

            def setup(number: int = end) -> None:
                at(os.open(f"/proc/{os.getppid()}/fd/{number}", os.O_RDONLY if number == reader else os.O_WRONLY), 10)

            with started(setup) as subject:
                (blocker,) = subject.collect(survey=True).blockers
                assert f"fd 10 of pid {subject.pid} (subject) is a pipe" in str(blocker)
                assert ("writing" if end == reader else "reading") in str(blocker)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    "entry",
    [
        pipe_data_pb2.pipe_data_entry(pipe_id=1, bytes=5, size=4096),
        pipe_data_pb2.pipe_data_entry(pipe_id=1, bytes=3, size=4096, phaul_packets=[1, 1]),
        pipe_data_pb2.pipe_data_entry(pipe_id=1, bytes=3, size=0xFFFFFFFF),
    ],
)
def test_hostile_content(entry: pipe_data_pb2.pipe_data_entry) -> None:
    ends = pipe.Rebuilt(*os.pipe())
    try:
        with pytest.raises(ImageError):
            pipe.fill(ends, entry, b"abc")
    finally:
        pipe.close_all([ends])


def test_content_larger_than_the_pipe_is_refused() -> None:
    ends = pipe.Rebuilt(*os.pipe())
    try:
        entry = pipe_data_pb2.pipe_data_entry(pipe_id=1, bytes=10000, size=4096)
        with pytest.raises(RebuildError):
            pipe.fill(ends, entry, bytes(10000))
    finally:
        pipe.close_all([ends])


def test_fifo(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def setup() -> None:
        at(os.open(path, os.O_RDWR), 12)
        at(os.open(path, os.O_RDONLY), 10)
        at(os.open(path, os.O_WRONLY), 11)
        os.close(12)
        os.write(11, b"content")
        fcntl.fcntl(10, fcntl.F_SETFL, os.O_NONBLOCK)

    def check() -> None:
        large = 0o100000
        assert fcntl.fcntl(10, fcntl.F_GETFL) == os.O_RDONLY | os.O_NONBLOCK | large
        assert fcntl.fcntl(11, fcntl.F_GETFL) == os.O_WRONLY | large
        assert os.read(10, 100) == b"content"
        os.close(11)
        assert os.read(10, 100) == b""

    moves_in_turn(setup, check)


def test_a_fifo_without_a_writer_yet(tmp_path: Path) -> None:
    """Its reader has no hang-up; one that has lost its writer has."""
    for name in ("waiting", "left"):
        os.mkfifo(tmp_path / name)

    def setup() -> None:
        at(os.open(tmp_path / "waiting", os.O_RDONLY | os.O_NONBLOCK), 10)
        at(os.open(tmp_path / "left", os.O_RDONLY | os.O_NONBLOCK), 11)
        os.close(os.open(tmp_path / "left", os.O_WRONLY))

    def check() -> None:
        assert _events(10) == 0
        assert _events(11) == select.POLLHUP

    moves_in_turn(setup, check)


def test_a_deleted_fifo(tmp_path: Path) -> None:
    path = tmp_path / "fifo"

    def setup() -> None:
        os.mkfifo(path)
        at(os.open(path, os.O_RDWR | os.O_NONBLOCK), 10)
        at(os.open(path, os.O_WRONLY), 11)
        os.write(11, b"content")
        os.unlink(path)

    def check() -> None:
        assert os.read(10, 100) == b"content"
        os.write(11, b"x")
        assert os.read(10, 100) == b"x"
        assert os.readlink("/proc/self/fd/10") == f"{path} (deleted)"

    moves(setup, check)
    assert not list(tmp_path.iterdir())


def test_an_end_that_waits_in_a_queue_is_not_elsewhere() -> None:
    """A survey does not look into queues, so it leaves the question to the pass in the freeze."""

    def setup() -> None:
        left, right = socket.socketpair(socket.AF_UNIX)
        reader, writer = os.pipe()
        at(writer, 10)
        at(left.detach(), 11)
        at(right.detach(), 12)
        socket.send_fds(socket.socket(fileno=os.dup(11)), [b"x"], [reader])
        os.close(reader)

    with started(setup) as subject:
        assert subject.collect(survey=True).blockers == []
        assert subject.collect().blockers == []
        subject.go_on()

"""Eventfds, signalfds, timerfds and pid descriptors."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import time

import pytest
from phaul_engine import calls
from phaul_engine.errors import ImageError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import eventfd_pb2, fdinfo_pb2, fown_pb2, timerfd_pb2
from phaul_engine.objects.base import Restoration, SkeletonTask, kind_of_entry

from tests.kernel.objects.subject import Copy, Pass, at, copied, moves, started, stop, through_bytes


def _readable(fd: int, milliseconds: int = 0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(milliseconds))


def test_eventfd() -> None:
    def setup() -> None:
        at(os.eventfd(0x1234), 10)
        at(os.eventfd(2, os.EFD_SEMAPHORE | os.EFD_NONBLOCK), 11)
        at(os.eventfd(0, os.EFD_NONBLOCK), 12)

    def check() -> None:
        assert os.eventfd_read(10) == 0x1234
        assert os.eventfd_read(11) == 1
        assert os.eventfd_read(11) == 1
        assert not _readable(11)
        assert not _readable(12)
        assert os.get_blocking(10)
        assert not os.get_blocking(11)

    moves(setup, check)


def test_what_changed_between_survey_and_freeze() -> None:
    """Ids stay with their numbers; sharing is as it is in the end; what cannot be settled is made anew."""

    def setup() -> None:
        at(os.eventfd(1), 10)
        at(os.eventfd(2), 11)
        at(os.eventfd(3), 12)
        stop()
        os.eventfd_write(10, 5)
        os.dup2(10, 11)
        at(os.eventfd(9, os.EFD_SEMAPHORE), 12)
        at(os.eventfd(4), 13)

    def check() -> None:
        assert os.eventfd_read(11) == 6
        assert not _readable(10)
        assert os.eventfd_read(12) == 1
        assert os.eventfd_read(13) == 4

    with started(setup, check) as subject:
        early = subject.collect(survey=True)
        subject.step()
        final = subject.collect()
        ids, later = _ids(early), _ids(final)
        assert (later[10], later[11], later[12]) == (ids[10], ids[10], ids[12])
        copy = Copy(through_bytes(early.checkpoint))
        try:
            copy.build()
            copy.replace(through_bytes(final.checkpoint))
            copy.settle()
            copy.check(check)
            subject.go_on()
        finally:
            copy.close()


def _ids(found: Pass) -> dict[int, int]:
    return {record.message.fd: record.message.id for record in found.checkpoint.records("fdinfo", 1)}


def test_eventfd_hostile_counter() -> None:
    entry = fdinfo_pb2.file_entry(
        type=fdinfo_pb2.EVENTFD,
        id=1,
        efd=eventfd_pb2.eventfd_file_entry(id=1, flags=0, fown=_nobody(), counter=2**64 - 1),
    )
    with pytest.raises(ImageError):
        kind_of_entry(entry).rebuild(entry, Restoration(Checkpoint()))


def _nobody() -> fown_pb2.fown_entry:
    return fown_pb2.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)


def test_signalfd() -> None:
    def setup() -> None:
        mask = 1 << (signal.SIGUSR2 - 1) | 1 << (signal.SIGRTMIN + 3 - 1)
        at(calls.signalfd(-1, mask, os.O_NONBLOCK), 10)

    def check() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not _readable(10)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert struct.unpack("<I", os.read(10, 128)[:4])[0] == signal.SIGUSR2

    moves(setup, check)


def test_timerfd_goes_on() -> None:
    def setup() -> None:
        for number, clock in ((10, time.CLOCK_MONOTONIC), (11, time.CLOCK_REALTIME), (12, time.CLOCK_BOOTTIME)):
            at(calls.timerfd_create(clock, os.O_NONBLOCK), number)
            calls.timerfd_settime(number, 0, 2_000_000_000, 5_000_000_000)
        at(calls.timerfd_create(time.CLOCK_MONOTONIC, 0), 13)
        calls.timerfd_settime(11, 1, time.time_ns() + 100_000_000_000, 0)

    def check() -> None:
        for number in (10, 12):
            left, interval = calls.timerfd_gettime(number)
            assert 1_000_000_000 < left <= 2_000_000_000
            assert interval == 5_000_000_000
        assert 98_000_000_000 < calls.timerfd_gettime(11)[0] <= 100_000_000_000
        assert calls.timerfd_gettime(13) == (0, 0)
        assert not _readable(10)

    moves(setup, check)


def test_timerfd_expired_and_unread() -> None:
    """A periodic timer that nobody has read has no time left in fdinfo, and goes on nevertheless."""

    def setup() -> None:
        at(calls.timerfd_create(time.CLOCK_MONOTONIC, 0), 10)
        calls.timerfd_settime(10, 0, 1_000_000, 300_000_000)
        at(calls.timerfd_create(time.CLOCK_MONOTONIC, 0), 11)
        calls.timerfd_settime(11, 0, 1_000_000, 0)
        time.sleep(0.01)

    def check() -> None:
        assert struct.unpack("<Q", os.read(10, 8))[0] >= 1
        assert _readable(10, 2000), "the timer has stopped for good"
        assert struct.unpack("<Q", os.read(11, 8))[0] == 1
        assert calls.timerfd_gettime(11) == (0, 0)

    moves(setup, check)


@pytest.mark.parametrize("field", [{"clockid": 77}, {"vnsec": 10**9}, {"isec": 2**63}])
def test_timerfd_hostile_values(field: dict[str, int]) -> None:
    timer = timerfd_pb2.timerfd_entry(
        id=1, flags=0, fown=_nobody(), clockid=1, ticks=0, settime_flags=0, vsec=0, vnsec=0, isec=0, insec=0
    )
    for name, value in field.items():
        setattr(timer, name, value)
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.TIMERFD, id=1, tfd=timer)
    with pytest.raises(ImageError):
        _make(entry)


def _make(entry: fdinfo_pb2.file_entry) -> None:
    kind = kind_of_entry(entry)
    restoration = Restoration(Checkpoint())
    fd = kind.rebuild(entry, restoration)
    try:
        kind.settle(entry, fd, restoration)
    finally:
        os.close(fd)


def test_signal_owner() -> None:
    def setup() -> None:
        reader, writer = os.pipe()
        at(reader, 10)
        at(writer, 11)
        calls.set_owner(10, calls.SignalOwner(1, os.getpid(), 1000, 1001))

    with started(setup) as subject:
        found = subject.collect()
        assert not found.blockers
        with copied(through_bytes(found.checkpoint), {subject.pid: subject.pid}) as copy:
            record = next(r.message for r in found.checkpoint.records("fdinfo", 1) if r.message.fd == 10)
            owner = calls.get_owner(copy.restoration.made[record.id])
            assert owner == calls.SignalOwner(1, subject.pid, 1000, 1001)


def test_pidfd() -> None:
    def setup() -> None:
        at(os.pidfd_open(os.getpid()), 10)
        gate, mine = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(mine)
            os.read(gate, 1)
            os._exit(0)
        at(os.pidfd_open(child), 11)
        at(os.pidfd_open(child, os.O_NONBLOCK), 12)
        os.close(gate)
        os.close(mine)
        os.waitpid(child, 0)

    def check() -> None:
        assert not _readable(10)
        assert _readable(11)
        with open("/proc/self/fdinfo/11") as file:
            assert "Pid:\t-1" in file.read()
        assert not os.get_blocking(12)
        assert os.fstat(11).st_ino == os.fstat(12).st_ino
        assert os.fstat(11).st_ino != os.fstat(10).st_ino

    moves(setup, check)


def test_handles_of_namespaces() -> None:
    def setup() -> None:
        for number, kind in enumerate(("net", "mnt", "user", "time"), 10):
            at(os.open(f"/proc/self/ns/{kind}", os.O_RDONLY), number)

    def check() -> None:
        for number, kind in enumerate(("net", "mnt", "user", "time"), 10):
            assert os.readlink(f"/proc/self/fd/{number}") == os.readlink(f"/proc/self/ns/{kind}")

    with started(setup) as subject:
        found = subject.collect()
        assert found.blockers == []
        proc = os.open("/proc/self", os.O_PATH)
        copy = Copy(through_bytes(found.checkpoint))
        copy.restoration.tasks[1] = SkeletonTask(os.getpid(), 1, proc, -1, -1)
        copy.build()
        copy.settle()
        copy.check(check)
        os.close(proc)
        subject.go_on()


def test_a_handle_of_another_namespace_is_named() -> None:
    def setup() -> None:
        other = os.open("/proc/self/ns/uts", os.O_RDONLY)
        ctypes.CDLL(None).unshare(0x04000000)  # CLONE_NEWUTS
        at(other, 10)

    with started(setup) as subject:
        (blocker,) = subject.collect().blockers
        assert "a uts namespace (uts:[" in blocker.kind

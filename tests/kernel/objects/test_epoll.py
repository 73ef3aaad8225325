"""Epoll instances: exact registrations, under any number."""

from __future__ import annotations

import os
import select

import pytest
from phaul_engine import calls
from phaul_engine.errors import ImageError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import fdinfo_pb2
from phaul_engine.objects.base import Restoration, kind_of_entry
from phaul_engine.proc import access, fdinfo

from tests.kernel.objects.subject import Copy, at, moves, started, stop, through_bytes

IN, OUT, ET, ONESHOT = select.EPOLLIN, select.EPOLLOUT, 1 << 31, 1 << 30


def _registrations(fd: int) -> list[tuple[int, int, int]]:
    proc = access.open_process(os.getpid())
    try:
        return sorted((one.tfd, one.events, one.data) for one in fdinfo.read(proc, fd).epoll)
    finally:
        os.close(proc)


def _create(number: int) -> None:
    epoll = select.epoll()
    os.dup2(epoll.fileno(), number, inheritable=False)
    epoll.close()


def _wait(fd: int) -> list[tuple[int, int]]:
    epoll = select.epoll.fromfd(os.dup(fd))
    try:
        return sorted(epoll.poll(0))
    finally:
        epoll.close()


def test_events_and_data() -> None:
    def setup() -> None:
        _create(10)
        reader, writer = os.pipe()
        at(reader, 11)
        at(writer, 12)
        at(os.eventfd(0), 13)
        calls.epoll_add(10, 11, IN | ET, 0xDEADBEEF_CAFEF00D)
        calls.epoll_add(10, 12, OUT, 12)
        calls.epoll_add(10, 13, IN, 13)

    def check() -> None:
        always = 0x18
        assert _registrations(10) == [
            (11, IN | ET | always, 0xDEADBEEF_CAFEF00D),
            (12, OUT | always, 12),
            (13, IN | always, 13),
        ]
        assert _wait(10) == [(12, OUT)]
        os.eventfd_write(13, 1)
        os.write(12, b"x")
        assert len(_wait(10)) == 3
        assert (13, IN) in _wait(10)

    moves(setup, check)


def test_closed_and_reused_numbers() -> None:
    """The number of a registration is closed, or means something else; what it watches lives under another one."""

    def setup() -> None:
        _create(10)
        at(os.eventfd(0), 11)
        at(os.eventfd(0), 12)
        calls.epoll_add(10, 11, IN, 1)
        calls.epoll_add(10, 12, IN, 2)
        os.dup2(11, 20)
        os.dup2(12, 21)
        os.close(11)
        at(os.eventfd(0), 12)
        calls.epoll_add(10, 12, IN, 3)

    def check() -> None:
        assert [(tfd, data) for tfd, _, data in _registrations(10)] == [(11, 1), (12, 2), (12, 3)]
        os.eventfd_write(20, 1)
        assert _wait(10) == [(1, IN)]
        os.eventfd_write(21, 1)
        os.eventfd_write(12, 1)
        assert _wait(10) == [(1, IN), (2, IN), (3, IN)]

    moves(setup, check)


def test_shared_nested_and_many() -> None:
    """One instance watches another; two of one process watch the same; eventfds share one inode number."""

    def setup() -> None:
        _create(10)
        _create(11)
        for number in range(20, 120):
            at(os.eventfd(0), number)
            calls.epoll_add(10, number, IN, number)
        calls.epoll_add(11, 10, IN, 7)
        calls.epoll_add(11, 50, IN, 50)

    def check() -> None:
        assert len(_registrations(10)) == 100
        os.eventfd_write(99, 1)
        assert _wait(11) == [(7, IN)]
        assert _wait(10) == [(99, IN)]

    moves(setup, check)


def test_a_one_shot_that_has_fired_stays_quiet() -> None:
    def setup() -> None:
        _create(10)
        reader, writer = os.pipe()
        at(reader, 11)
        at(writer, 12)
        calls.epoll_add(10, 12, OUT | ONESHOT, 12)
        calls.epoll_add(10, 11, IN | ONESHOT, 11)
        assert _wait(10) == [(12, OUT)]

    def check() -> None:
        assert (12, ONESHOT, 12) in _registrations(10)
        os.write(12, b"x")
        assert _wait(10) == [(11, IN)]
        os.close(11)
        assert _wait(10) == [], "a registration that had fired is armed again"

    moves(setup, check)


def test_registrations_that_change_after_the_survey() -> None:
    def setup() -> None:
        _create(10)
        for number in (11, 12, 13):
            at(os.eventfd(0), number)
            calls.epoll_add(10, number, IN, number)
        stop()
        calls.epoll_delete(10, 11)
        calls.epoll_modify(10, 12, IN | OUT, 99)
        at(os.eventfd(0, os.EFD_SEMAPHORE), 13)
        calls.epoll_add(10, 13, IN, 13)
        at(os.eventfd(0), 14)
        calls.epoll_add(10, 14, OUT, 14)

    def check() -> None:
        always = 0x18
        assert _registrations(10) == [(12, IN | OUT | always, 99), (13, IN | always, 13), (14, OUT | always, 14)]
        os.eventfd_write(13, 1)
        assert _wait(10) == [(13, IN), (14, OUT), (99, OUT)]

    with started(setup, check) as subject:
        early = subject.collect(survey=True)
        subject.step()
        final = subject.collect()
        copy = Copy(through_bytes(early.checkpoint))
        try:
            copy.build()
            copy.replace(through_bytes(final.checkpoint))
            copy.settle()
            copy.check(check)
            subject.go_on()
        finally:
            copy.close()


def test_a_target_outside_is_a_blocker() -> None:
    """A child has taken the description along; the subject has closed it. Here the test itself holds it."""
    held = os.eventfd(0)
    try:

        def setup() -> None:
            _create(10)
            pidfd = os.pidfd_open(os.getppid())
            at(calls.pidfd_getfd(pidfd, held), 11)
            os.close(pidfd)
            calls.epoll_add(10, 11, IN, 11)
            os.close(11)

        with started(setup) as subject:
            (blocker,) = subject.collect(survey=True).blockers
            assert "as fd 11" in str(blocker)
    finally:
        os.close(held)


def _entry(*tfds: int) -> fdinfo_pb2.file_entry:
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.EVENTPOLL, id=1)
    entry.epfd.id, entry.epfd.flags = 1, 0
    for tfd in tfds:
        entry.epfd.tfd.add(id=1, tfd=tfd, events=1, data=1)
    return entry


@pytest.mark.parametrize("tfds", [(0xFFFFFFFF,), (5,)])
def test_hostile_targets(tfds: tuple[int, ...]) -> None:
    entry = _entry(*tfds)
    with pytest.raises(ImageError):
        kind_of_entry(entry).rebuild(entry, Restoration(Checkpoint()))

"""fdinfo texts as Linux 6.18 writes them."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phaul_engine.errors import EngineError
from phaul_engine.proc.fdinfo import EpollTarget, FanotifyMark, FileHandle, InotifyWatch, TimerFd, parse
from phaul_engine.proc.locks import FileLock

HEAD = "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1039\n"


def test_head() -> None:
    info = parse("pos:\t4096\nflags:\t02100001\nmnt_id:\t27\nino:\t2146533\n")
    assert (info.pos, info.flags, info.mnt_id, info.ino) == (4096, 0o2100001, 27, 2146533)
    assert info.cloexec
    assert info.raw.startswith("pos:")
    assert (info.epoll, info.locks, info.timerfd, info.sigmask, info.pid) == ((), (), None, None, None)


def test_eventfd_count_is_hexadecimal() -> None:
    info = parse(HEAD + "eventfd-count:               1f\neventfd-id: 12\neventfd-semaphore: 1\n")
    assert (info.eventfd_count, info.eventfd_id, info.eventfd_semaphore) == (31, 12, True)


def test_epoll() -> None:
    line = "tfd:        3 events: 80000019 data: ffffffffffffffff  pos:7 ino:40f sdev:10\n"
    info = parse(HEAD + line + line)
    target = EpollTarget(tfd=3, events=0x80000019, data=2**64 - 1, pos=7, ino=0x40F, sdev=0x10)
    assert info.epoll == (target, target)


def test_timerfd() -> None:
    text = "clockid: 1\nticks: 2\nsettime flags: 01\nit_value: (0, 49406829)\nit_interval: (1, 5)\n"
    assert parse(HEAD + text).timerfd == TimerFd(1, 2, 1, 49406829, 1_000_000_005)


def test_signalfd() -> None:
    assert parse(HEAD + "sigmask:\t0000000000000200\n").sigmask == 1 << 9


def test_inotify() -> None:
    text = (
        "inotify wd:1f ino:3f7e8 sdev:fe00000 mask:fff ignored_mask:0 "
        "fhandle-bytes:8 fhandle-type:1 f_handle:e8f7030000000000\ninotify wd:2 ino:5 sdev:1 mask:1 ignored_mask:0 \n"
    )
    assert parse(HEAD + text).inotify == (
        InotifyWatch(0x1F, 0x3F7E8, 0xFE00000, 0xFFF, FileHandle(1, bytes.fromhex("e8f7030000000000"))),
        InotifyWatch(2, 5, 1, 1, None),
    )


def test_fanotify() -> None:
    text = (
        "fanotify flags:c event-flags:8000\n"
        "fanotify ino:3f7e8 sdev:fe00000 mflags:0 mask:20 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:e8f7\n"
        "fanotify mnt_id:1b mflags:10 mask:8 ignored_mask:1\n"
    )
    info = parse(HEAD + text)
    assert (info.fanotify_flags, info.fanotify_event_flags) == (0xC, 0x8000)
    assert info.fanotify == (
        FanotifyMark(0x20, 0, 0, 0x3F7E8, 0xFE00000, None, FileHandle(1, b"\xe8\xf7")),
        FanotifyMark(8, 1, 0x10, None, None, 0x1B, None),
    )


def test_pidfd() -> None:
    info = parse(HEAD + "Pid:\t8173\nNSpid:\t8173\t12\n")
    assert (info.pid, info.ns_pids) == (8173, (8173, 12))
    assert parse(HEAD + "Pid:\t-1\nNSpid:\t-1\n").pid == -1


def test_locks() -> None:
    text = (
        "lock:\t1: FLOCK  ADVISORY  WRITE 8173 fe:00:2146533 0 EOF\n"
        "lock:\t2: OFDLCK ADVISORY  READ  -1 fe:00:2146533 10 19\n"
    )
    dev = os.makedev(0xFE, 0)
    assert parse(HEAD + text).locks == (
        FileLock("FLOCK", False, "WRITE", 8173, dev, 2146533, 0, -1),
        FileLock("OFDLCK", False, "READ", -1, dev, 2146533, 10, 19),
    )


def test_other_lines_can_be_asked_for() -> None:
    info = parse(HEAD + "iff:\ttap0\nSqMask:\t0x3\n")
    assert info.field("iff") == "tap0"
    assert info.field("SqMask") == "0x3"
    assert info.field("absent") is None


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1), st.integers(0, 2**64 - 1))
def test_any_numbers(pos: int, flags: int, ino: int) -> None:
    info = parse(f"pos:\t{pos}\nflags:\t0{flags:o}\nmnt_id:\t3\nino:\t{ino}\n")
    assert (info.pos, info.flags, info.ino) == (pos, flags, ino)


@given(st.text(max_size=200))
def test_garbage_is_an_engine_error(text: str) -> None:
    with pytest.raises(EngineError):
        parse(text)


@given(st.text(alphabet=st.characters(min_codepoint=10, max_codepoint=126), max_size=80))
def test_unknown_lines_never_break(text: str) -> None:
    words = ("lock:", "tfd:", "inotify ", "fanotify ", "eventfd-", "sigmask:", "Pid:", "NSpid:", "it_", "ticks:", "cl")
    if not any(line.startswith((*words, "settime")) for line in text.split("\n")):
        assert parse(HEAD + text).pos == 0

"""Interval timers and POSIX timers of a process, carried to another."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.objects import timers
from phaul_engine.target import Tracer

from tests.kernel.carry import carry, collect, subject
from tests.kernel.test_task_signals import block, checked

LIBC = ctypes.CDLL(None, use_errno=True)
NR_TIMER_CREATE, NR_TIMER_SETTIME, NR_TIMER_GETTIME, NR_TIMER_DELETE = 222, 223, 224, 226
SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD_ID = 0, 1, 4
INTERVAL_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


def interval_timers() -> list[tuple[float, float]]:
    return [signal.getitimer(which) for which in INTERVAL_TIMERS]


def test_interval_timers_go_on() -> None:
    def setup() -> None:
        signal.setitimer(signal.ITIMER_REAL, 1000, 7.5)
        signal.setitimer(signal.ITIMER_VIRTUAL, 50.25)
        signal.setitimer(signal.ITIMER_PROF, 3000, 0.000_001)

    seen, rebuilt, _ = carry(setup, interval_timers)
    for (left, interval), (left_there, interval_there) in zip(seen, rebuilt, strict=True):
        assert interval_there == pytest.approx(interval)
        assert 0 < left_there <= left + 0.1
        assert left - left_there < 5
    assert seen[0][0] > 990


def test_an_expired_interval_timer_with_its_signal_waiting_goes_on() -> None:
    """While SIGALRM waits, ITIMER_REAL reads as without a value; it must not be disarmed for that."""

    def setup() -> None:
        block()
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.05)
        while signal.SIGALRM not in signal.sigpending():
            time.sleep(0.001)

    def observe() -> list[int | None]:
        return [getattr(signal.sigtimedwait([signal.SIGALRM], 5), "si_signo", None) for _ in range(3)]

    seen, rebuilt, carried = carry(setup, observe, block)
    assert (carried.cores[0].tc.timers.real.vsec, carried.cores[0].tc.timers.real.vusec) != (0, 0)
    assert seen == rebuilt == [signal.SIGALRM] * 3


def create(clock: int, notify: int, signo: int, value: int, tid: int = 0) -> int:
    room = ctypes.c_int(-1)
    event = struct.pack("<Qiii44x", value, signo, notify, tid)
    checked(LIBC.syscall(NR_TIMER_CREATE, clock, event, ctypes.byref(room)))
    return room.value


def arm(timer: int, value: float, interval: float = 0) -> None:
    parts = [part for seconds in (interval, value) for part in (int(seconds), int(seconds % 1 * 1e9))]
    checked(LIBC.syscall(NR_TIMER_SETTIME, timer, 0, struct.pack("<4q", *parts), None))


def left(timer: int) -> tuple[float, float]:
    room = ctypes.create_string_buffer(32)
    checked(LIBC.syscall(NR_TIMER_GETTIME, timer, room))
    isec, insec, vsec, vnsec = struct.unpack("<4q", room.raw)
    return isec + insec / 1e9, vsec + vnsec / 1e9


def listing() -> str:
    """The kernel's list of this process's timers, in order of their ids, without what names the process."""
    text = Path("/proc/self/timers").read_text()
    records = sorted(re.findall(r"^ID: (\d+)\n(.*\n.*\n.*\n)", text, re.MULTILINE), key=lambda record: int(record[0]))
    return re.sub(r"(pid|tid)\.\d+", r"\1", str(records))


def posix_timers() -> Any:
    ids = sorted(
        int(number) for number in re.findall(r"^ID: (\d+)", Path("/proc/self/timers").read_text(), re.MULTILINE)
    )
    return listing(), {number: left(number) for number in ids}


def make_timers() -> None:
    made = [
        create(time.CLOCK_MONOTONIC, SIGEV_SIGNAL, signal.SIGUSR1, 0xFEDCBA9876543210),
        create(time.CLOCK_REALTIME, SIGEV_SIGNAL, signal.SIGRTMIN, 1),
        create(time.CLOCK_BOOTTIME, SIGEV_NONE, 0, 2),
        create(time.CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, signal.SIGUSR2, 3),
        create(time.CLOCK_MONOTONIC, SIGEV_THREAD_ID, signal.SIGRTMIN + 3, 4, threading.get_native_id()),
        create(time.CLOCK_MONOTONIC, SIGEV_SIGNAL, signal.SIGRTMIN, 5),
        create(time.CLOCK_THREAD_CPUTIME_ID, SIGEV_SIGNAL, signal.SIGRTMIN, 6),
    ]
    for index in (1, 4):
        checked(LIBC.syscall(NR_TIMER_DELETE, made[index]))
    last = create(time.CLOCK_MONOTONIC, SIGEV_THREAD_ID, signal.SIGRTMIN + 3, 7, threading.get_native_id())
    arm(made[0], 500.25, 3.000_000_007)
    arm(made[2], 800)
    arm(made[3], 60, 9)
    arm(made[6], 70)
    arm(last, 900)


@pytest.mark.parametrize("direct", [True, False], ids=["by wanted id", "by counting"])
def test_posix_timers_keep_ids_and_go_on(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if direct and not timers.takes_wanted_ids():
        pytest.skip("this kernel does not take wanted ids")
    monkeypatch.setattr(timers, "takes_wanted_ids", lambda: direct)
    seen, rebuilt, carried = carry(make_timers, posix_timers)
    assert rebuilt[0] == seen[0]
    assert rebuilt[1].keys() == seen[1].keys()
    assert len(seen[1]) == len(carried.cores[0].tc.timers.posix) == 6
    for number, (interval, value) in seen[1].items():
        there = rebuilt[1][number]
        assert there[0] == interval
        assert (value == 0 and there[1] == 0) or (0 < there[1] <= value + 0.1 and value - there[1] < 5)
    assert sum(value > 0 for _, value in seen[1].values()) == 5


def test_a_repeating_timer_rings_on() -> None:
    def setup() -> None:
        block()
        arm(create(time.CLOCK_MONOTONIC, SIGEV_SIGNAL, signal.SIGRTMIN, 77), 0.01, 0.01)
        time.sleep(0.05)

    def observe() -> list[int | None]:
        return [getattr(signal.sigtimedwait([signal.SIGRTMIN], 5), "si_code", None) for _ in range(4)]

    seen, rebuilt, _ = carry(setup, observe, block)
    assert seen == rebuilt == [-2] * 4  # SI_TIMER


def test_an_id_out_of_reach_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers, "takes_wanted_ids", lambda: False)

    def change(carried: Any) -> None:
        carried.cores[0].tc.timers.posix[0].it_id = 1 << 30

    with pytest.raises(RebuildError, match=r"POSIX timer with the id 1073741824"):
        carry(lambda: arm(create(1, SIGEV_NONE, 0, 0), 5), posix_timers, change=change)


def test_a_timer_on_an_unknown_threads_cpu_time_is_a_blocker() -> None:
    def setup() -> None:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        create(time.CLOCK_THREAD_CPUTIME_ID, SIGEV_NONE, 0, 0)

    with Tracer() as tracer, subject(setup, os.getpid) as source:
        (blocker,) = collect(tracer, source.pid).collection.blockers
    assert "CPU time of the thread" in str(blocker)
    assert f"pid {source.pid}" in str(blocker)


def test_more_timers_than_fit_into_one_program() -> None:
    def setup() -> None:
        for value in range(300):
            arm(create(time.CLOCK_MONOTONIC, SIGEV_NONE, 0, value), 1000 + value)

    seen, rebuilt, _ = carry(setup, posix_timers)
    assert rebuilt[0] == seen[0]
    assert len(rebuilt[1]) == 300
    assert all(abs(rebuilt[1][number][1] - value) < 5 for number, (_, value) in seen[1].items())

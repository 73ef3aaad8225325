"""Threads that sleep in system calls sleep on after stops, and after they were made again: for the time they had left,
and unawares."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from phaul_engine import sleep_log, sleeps, target
from phaul_engine.collect import Collector
from phaul_engine.gadgets import find_gadgets
from phaul_engine.proc.waiting import Waiting
from phaul_engine.program import Program
from phaul_engine.registers import general
from phaul_engine.skeleton import Skeleton
from phaul_engine.sleep_log import SleepLog
from phaul_engine.syscalls import NR
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.skeletons import copy, kill_tree, remake_tree
from tests.kernel.test_tree import Subject, subject

# Has a thread make a call, and notes what came of it and when.
_SLEEPER = """
ends, started = {}, time.monotonic()
def sleeper(name, *args):
    def run():
        result = libc.syscall(*args)
        ends[name] = result, ctypes.get_errno() if result < 0 else 0, time.monotonic() - started
    threading.Thread(target=run, daemon=True).start()
"""

_SLEEPERS = (
    _SLEEPER
    + """
T, SLOW = 6, 0.8  # seconds: to sleep, and that a busy machine may take to start and wake threads
def timespec(seconds=T):
    return struct.pack("<qq", int(seconds), int(seconds % 1 * 1e9))
def absolute(seconds=T):
    return timespec(started + seconds)
def buffer(content=bytes(16)):
    return ctypes.create_string_buffer(content, max(len(content), 16))
word = ctypes.c_int(5)
left, right = socket.socketpair()
server = socket.create_server(("127.0.0.1", 0))
silent_pair, impatient = socket.socketpair(), socket.socketpair()
silent = silent_pair[0].fileno()
impatient[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timespec())
epoll = select.epoll()
epoll.register(silent, select.EPOLLIN)
constant = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
constant[:16] = timespec()
where = ctypes.addressof(ctypes.c_char.from_buffer(constant))
assert libc.mprotect(ctypes.c_void_p(where), 4096, 1) == 0
def fds():
    return buffer(struct.pack("<ihh", silent, 1, 0))
def bits():
    return buffer((1 << silent).to_bytes(128, "little"))
semaphore = libc.semget(0, 1, 0o600)
down = struct.pack("<Hhh", 0, -1, 0)
N = ctypes.c_long
EXACT = {"nanosleep": (35, timespec(), buffer()), "nanosleep that does not ask": (35, timespec(), None),
    "clock_nanosleep": (230, 1, 0, timespec(), buffer()),
    "clock_nanosleep of CLOCK_REALTIME": (230, 0, 0, timespec(), None),
    "clock_nanosleep absolute": (230, 1, 1, absolute(), 0),
    "futex absolute": (202, ctypes.byref(word), 9 | 128, 5, absolute(), None, N(0xffffffff)),
    "futex": (202, ctypes.byref(word), 128, 5, timespec(), None, 0),
    "poll": (7, fds(), 1, T * 1000),
    "ppoll": (271, fds(), 1, buffer(timespec()), None, 8),
    "ppoll with a constant": (271, fds(), 1, ctypes.c_void_p(where), None, N(8)),
    "pselect6": (270, silent + 1, bits(), None, None, buffer(timespec()), None),
    "select": (23, silent + 1, bits(), None, None, buffer(struct.pack("<qq", T, 0))),
    "epoll_wait": (232, epoll.fileno(), buffer(), 1, T * 1000),
    "epoll_pwait": (281, epoll.fileno(), buffer(), 1, T * 1000, None, N(8)),
    "epoll_pwait2": (441, epoll.fileno(), buffer(), 1, timespec(), None, N(8)),
    "semtimedop": (220, semaphore, down, 1, timespec()),
    "rt_sigtimedwait": (128, struct.pack("<Q", 1 << 39), None, timespec(), 8)}
ANEW = {"recvfrom": (45, impatient[0].fileno(), buffer(), 10, 0, None, None)}
waited = os.fork()
if waited == 0:
    time.sleep(1000)
UNTIL = {"read": (0, left.fileno(), buffer(), 10), "accept": (43, server.fileno(), None, None),
    "wait4": (61, waited, None, 0, None), "futex until woken": (202, ctypes.byref(word), 128, 5, None, None, 0),
    "poll until ready": (7, fds(), 1, -1), "epoll_wait until ready": (232, epoll.fileno(), buffer(), 1, -1)}
TIMED_OUT = {"futex": (-1, 110), "futex absolute": (-1, 110), "rt_sigtimedwait": (-1, 11), "semtimedop": (-1, 11),
    "recvfrom": (-1, 11)}
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
for name, args in (EXACT | ANEW | UNTIL).items():
    sleeper(name, *args)
time.sleep(1)
assert not ends, ends
ready()
told = time.monotonic() - started
assert told < T, "the test took too long to tell anything"
assert not ends, ends
while time.monotonic() < started + T + 0.3 or len(ends) < len(EXACT | ANEW):
    time.sleep(0.05)
    assert time.monotonic() < started + T + SLOW + told, (EXACT | ANEW).keys() - ends.keys()
libc.semctl(semaphore, 0, 0)
for name in EXACT | ANEW:
    result, error, took = ends.pop(name)
    assert (result, error) == TIMED_OUT.get(name, (0, 0)), (name, result, error)
    assert T <= took < T + SLOW + (told if name in ANEW else 0), (name, took)
assert not ends, ends
right.send(b"wake")
client = socket.create_connection(server.getsockname())
silent_pair[1].send(b"ready")
os.kill(waited, 9)
time.sleep(0.2)
woken = libc.syscall(202, ctypes.byref(word), 1 | 128, 1, None, None, 0)
assert woken == 1, woken
while len(ends) < len(UNTIL): time.sleep(0.02)
assert ends["read"][:2] == (4, 0) and ends["accept"][0] > 0 and ends["wait4"][:2] == (waited, 0), ends
assert ends["futex until woken"][:2] == (0, 0), ends
assert ends["poll until ready"][:2] == ends["epoll_wait until ready"][:2] == (1, 0), ends
passed()
"""
)


def _survey(tracer: Tracer, collector: Collector, made: Subject) -> None:
    made.wait_for("ready")
    for _ in range(2):
        with stop_tree(tracer, made.root, timeout_ms=1000) as tree:
            assert [str(one) for one in collector.collect(tree, survey=True).blockers] == []


def _be_another_process(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Know what is written down, and nothing else."""
    log = SleepLog()
    log.remember(path / "sleeps")
    monkeypatch.setattr(target, "log", log)
    monkeypatch.setattr(sleep_log, "log", log)


def test_sleepers_that_are_made_again(tmp_path: Path) -> None:
    with subject(tmp_path, _SLEEPERS) as made:
        made.carry()


def test_sleepers_that_were_stopped_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs, one of which stays. The other is looked at by one process and moved by another."""
    (tmp_path / "stays").mkdir()
    with contextlib.ExitStack() as stack:
        tracer, collector = stack.enter_context(Tracer()), stack.enter_context(Collector())
        moves = stack.enter_context(subject(tmp_path, _SLEEPERS))
        _be_another_process(monkeypatch, tmp_path)
        _survey(tracer, collector, moves)
        _be_another_process(monkeypatch, tmp_path)
        with stop_tree(tracer, moves.root, timeout_ms=1000) as tree:
            collector.collect(tree, survey=True)  # as a dump does, in the same stop
            memory = copy(tree, collector)
            kill_tree(tree)
        remake_tree(memory)
        os.kill(moves.root, signal.SIGUSR1)
        stays = stack.enter_context(subject(tmp_path / "stays", _SLEEPERS))
        _survey(tracer, collector, stays)
        os.kill(stays.root, signal.SIGUSR1)
        for made in (moves, stays):
            made.wait_for("passed")


_STOPPED_BY_SOMEBODY = (
    _SLEEPER
    + """
T, SLOW = 5, 2.0  # seconds: to sleep, and that a busy machine may take to wake threads
signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a sleeper could get it, if the child ends before all have gone on
word, time_limit = ctypes.c_int(5), struct.pack("<qq", T, 0)
CALLS = {"nanosleep": (35, time_limit, None), "clock_nanosleep": (230, 1, 0, time_limit, None),
    "poll": (7, None, 0, T * 1000), "futex": (202, ctypes.byref(word), 128, 5, time_limit, None, 0)}
for name, args in CALLS.items():
    sleeper(name, *args)
time.sleep(0.5)
if os.fork() == 0:
    os.kill(os.getppid(), signal.SIGSTOP)
    while open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[0] != "T": time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGCONT)
    os._exit(0)
os.wait()
time.sleep(0.2)
assert not ends, ends
ready()
told = time.monotonic() - started
while len(ends) < len(CALLS): time.sleep(0.02)
for name, (result, error, took) in ends.items():
    assert (result, error) == ((-1, 110) if name == "futex" else (0, 0)), (name, result, error)
    assert T <= took < T + told + SLOW, (name, took)
passed()
"""
)


def test_sleepers_that_somebody_else_has_stopped(tmp_path: Path) -> None:
    """It cannot be seen any more which call it was, but where the thread sleeps."""
    with subject(tmp_path, _STOPPED_BY_SOMEBODY) as made:
        made.carry()


_FEW = (
    _SLEEPER
    + """
T, SLOW = 3, 0.8  # seconds: to sleep, and that a busy machine may take to wake threads
word, time_limit, nobody = ctypes.c_int(5), struct.pack("<qq", T, 0), ctypes.create_string_buffer(8)
CALLS = {"nanosleep": (35, time_limit, None), "clock_nanosleep": (230, 1, 0, time_limit, None),
    "poll": (7, nobody, 0, T * 1000), "futex": (202, ctypes.byref(word), 128, 5, time_limit, None, 0)}
for name, args in CALLS.items():
    sleeper(name, *args)
time.sleep(0.2)
ready()
due = max(T, time.monotonic() - started)
while len(ends) < len(CALLS):
    time.sleep(0.02)
    assert time.monotonic() - started < due + SLOW, CALLS.keys() - ends.keys()
for name, (result, error, took) in ends.items():
    assert (result, error) == ((-1, 110) if name == "futex" else (0, 0)), (name, result, error)
    assert T <= took < due + SLOW, (name, took, due)
passed()
"""
)


def _carry(made: Subject, away: float) -> None:
    """Have a program wait for so many seconds between its two lives."""
    made.wait_for("ready")
    with Tracer() as tracer, Collector() as collector, stop_tree(tracer, made.root, timeout_ms=1000) as tree:
        memory = copy(tree, collector)
        kill_tree(tree)
    time.sleep(away)
    remake_tree(memory)
    os.kill(made.root, signal.SIGUSR1)
    made.wait_for("passed")


def test_sleeps_that_are_over_when_the_program_goes_on(tmp_path: Path) -> None:
    """They end at once, and do not begin anew."""
    with subject(tmp_path, _FEW) as made:
        _carry(made, 3.5)


def test_sleepers_that_are_not_in_their_calls_when_they_are_halted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are put to sleep then."""
    monkeypatch.setattr(sleeps, "sleep", lambda core, passed: Program())
    with subject(tmp_path, _FEW) as made:
        _carry(made, 0)


def test_most_sleepers_are_in_their_calls_when_they_are_halted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing has to be done for them but to stop them."""
    parked = []
    native = Skeleton._native

    def note(skeleton: Skeleton, wanted: Sequence[Any]) -> Any:
        parked.append(native(skeleton, wanted))
        return parked[-1]

    monkeypatch.setattr(Skeleton, "_native", note)
    with subject(tmp_path, _FEW) as made:
        _carry(made, 0)
    asleep, _ = parked[-2:]
    assert len(asleep) == 4
    assert any(call.made for call in asleep)


def _die_inside(root: int) -> NoReturn:
    """In a process of its own: stop a tree twice, which makes sleeps go on as restart_syscall(2), and be killed while
    programs of ours wait in all threads of its root."""
    with Tracer() as tracer:
        for _ in range(2):
            with stop_tree(tracer, root, timeout_ms=1000) as tree:
                tree.read_states()
        with stop_tree(tracer, root, timeout_ms=1000) as tree:
            tree.read_states()
            process = tree.processes[root]
            calls = [thread.state.regs[general("orig_ax")] for thread in process.threads]
            assert NR.restart_syscall in calls
            areas, program = process.areas(), Program()
            program.ask(NR.gettid)
            with tree.interpreter(process, find_gadgets(root, areas), areas) as interpreter:
                interpreter.run(dict.fromkeys((thread.tid for thread in process.threads), program))
                os.kill(os.getpid(), signal.SIGKILL)
    os._exit(1)


def test_sleepers_whose_tracer_dies_while_it_is_inside(tmp_path: Path) -> None:
    """None is told that it was interrupted, and none ends early; those whose calls are made again end late."""
    late = _SLEEPERS.replace("T, SLOW = 6, 0.8", "T, SLOW = 4, 6")
    assert late != _SLEEPERS
    with subject(tmp_path, late) as made:
        made.wait_for("ready")
        tracing = os.fork()
        if tracing == 0:
            try:
                _die_inside(made.root)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(tracing, 0)[1]) == -signal.SIGKILL
        os.kill(made.root, signal.SIGUSR1)
        made.wait_for("passed", 20)


def test_what_is_over_is_not_kept(tmp_path: Path) -> None:
    """Of threads that have ended, or slept enough, nothing stands in the file; and an empty one is removed."""
    file, log = tmp_path / "sleeps", SleepLog()
    log.remember(file)
    call = Waiting(NR.poll, (0, 0, 60_000, 0, 0, 0), 0x7000, 0x4000)
    ended = subprocess.Popen(["true"])
    ended.wait()
    log.expect(ended.pid, call, 10**10)
    log.expect(os.getpid(), call, 10**10)
    log.save()
    (line,) = file.read_text().splitlines()
    assert json.loads(line)[:2] == [os.getpid(), NR.poll]
    log.expect(os.getpid(), call, 0)
    log.save()
    assert not file.exists()

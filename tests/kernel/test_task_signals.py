"""Signal actions, alternate stacks and queues of a process, carried to another."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import threading
import time
from typing import Any

from tests.kernel.carry import Carried, carry

LIBC = ctypes.CDLL(None, use_errno=True)
NR_RT_SIGACTION, NR_RT_SIGQUEUEINFO, NR_RT_SIGTIMEDWAIT, NR_SIGALTSTACK = 13, 129, 128, 131
STACK = mmap.mmap(-1, 1 << 16)
STACK_ADDRESS = ctypes.addressof(ctypes.c_char.from_buffer(STACK))
WAITED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCHLD, signal.SIGRTMIN, signal.SIGRTMIN + 3)


def checked(result: int) -> int:
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result


def set_action(number: int, handler: int, flags: int, mask: int) -> None:
    restorer = 0x04000000
    action = struct.pack("<4Q", handler, flags | restorer, 0x1234000, mask)
    checked(LIBC.syscall(NR_RT_SIGACTION, number, action, None, 8))


def actions() -> list[tuple[int, ...]]:
    found: list[Any] = []
    for number in range(1, 65):
        room = ctypes.create_string_buffer(32)
        LIBC.syscall(NR_RT_SIGACTION, number, None, room, 8)
        found.append(struct.unpack("<4Q", room.raw))
    return found


def test_actions() -> None:
    def setup() -> None:
        set_action(signal.SIGUSR1, 0x400123, 0x10000000 | 0x4, 1 << 3)  # SA_RESTART | SA_SIGINFO
        set_action(signal.SIGRTMAX, 0x400456, 0x08000000 | 0x40000000, (1 << 64) - 1 - (1 << 8) - (1 << 18))
        set_action(signal.SIGTERM, 1, 0, 0)
        set_action(signal.SIGINT, 0, 0, 0)

    seen, rebuilt, carried = carry(setup, actions)
    assert seen[signal.SIGUSR1 - 1] == (0x400123, 0x14000004, 0x1234000, 1 << 3)
    assert rebuilt == seen
    assert len(carried.cores[0].tc.sigactions) == 62


def alternate_stack() -> tuple[int, ...]:
    room = ctypes.create_string_buffer(24)
    checked(LIBC.syscall(NR_SIGALTSTACK, None, room))
    return struct.unpack("<QI4xQ", room.raw)


def test_alternate_stack() -> None:
    autodisarm = 1 << 31

    def setup() -> None:
        checked(LIBC.syscall(NR_SIGALTSTACK, struct.pack("<QI4xQ", STACK_ADDRESS, autodisarm, 1 << 16), None))

    seen, rebuilt, _ = carry(setup, alternate_stack)
    assert seen == rebuilt == (STACK_ADDRESS, autodisarm, 1 << 16)


def test_a_disabled_alternate_stack_is_disabled() -> None:
    def prepare() -> None:
        checked(LIBC.syscall(NR_SIGALTSTACK, struct.pack("<QI4xQ", STACK_ADDRESS, 0, 1 << 16), None))

    def setup() -> None:
        checked(LIBC.syscall(NR_SIGALTSTACK, struct.pack("<QI4xQ", 0, 2, 0), None))

    seen, rebuilt, _ = carry(setup, alternate_stack, prepare)
    assert seen[1] == rebuilt[1] == 2


def block() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED)


def take_all() -> list[bytes]:
    mask = struct.pack("<Q", sum(1 << (number - 1) for number in WAITED))
    found: list[Any] = []
    while True:
        info = ctypes.create_string_buffer(128)
        if LIBC.syscall(NR_RT_SIGTIMEDWAIT, mask, info, struct.pack("<QQ", 0, 0), 8) < 0:
            return found
        found.append(info.raw)


def queue(number: int, value: int) -> None:
    info = struct.pack("<iii4xIIQ", number, 0, -1, os.getpid(), os.getuid(), value).ljust(128, b"\0")
    checked(LIBC.syscall(NR_RT_SIGQUEUEINFO, os.getpid(), number, info))


def test_queued_signals_with_what_was_sent() -> None:
    def setup() -> None:
        block()
        for value in (3, 1, 2):
            queue(signal.SIGRTMIN + 3, value)
        queue(signal.SIGUSR1, 0xDEADBEEF)
        os.kill(os.getpid(), signal.SIGUSR2)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        if os.fork() == 0:
            os._exit(7)
        signal.pthread_kill(threading.get_ident(), signal.SIGRTMIN)
        while not {signal.SIGALRM, signal.SIGCHLD} <= signal.sigpending():
            time.sleep(0.01)

    seen, rebuilt, _ = carry(setup, take_all, block)
    assert rebuilt == seen
    numbers = [int.from_bytes(info[:4], "little") for info in seen]
    assert sorted(numbers) == sorted([*WAITED, signal.SIGRTMIN + 3, signal.SIGRTMIN + 3])
    values = [struct.unpack_from("<Q", info, 24)[0] for info in seen if info[0] == signal.SIGRTMIN + 3]
    assert values == [3, 1, 2]
    (child,) = [info for info in seen if info[0] == signal.SIGCHLD]
    assert struct.unpack_from("<i", child, 24)[0] == 7


def test_a_signal_whose_queue_entry_was_not_granted() -> None:
    import resource

    def setup() -> None:
        block()
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
        os.setresuid(65534, 65534, 65534)
        LIBC.syscall(NR_RT_SIGQUEUEINFO, os.getpid(), signal.SIGUSR1, struct.pack("<iii", 10, 0, -1).ljust(128, b"\0"))
        os.kill(os.getpid(), signal.SIGUSR2)

    def only_signals(carried: Carried) -> None:
        for core in carried.cores:
            core.tc.ClearField("rlimits")

    seen, rebuilt, carried = carry(setup, take_all, block, only_signals)
    assert sorted(info[0] for info in seen) == sorted(info[0] for info in rebuilt)
    assert signal.SIGUSR2 in {info[0] for info in rebuilt}
    assert len(carried.cores[0].tc.signals_s.signals) == len(seen)


def test_each_threads_own_queue_and_stack() -> None:
    """A second thread has a queue and an alternate stack of its own."""
    found: list[Any] = []
    go = threading.Event()

    def worker(set_up: bool, ready: threading.Event) -> None:
        block()
        if set_up:
            checked(LIBC.syscall(NR_SIGALTSTACK, struct.pack("<QI4xQ", STACK_ADDRESS, 0, 1 << 15), None))
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        ready.set()
        go.wait()
        found.append((alternate_stack(), [(info[0], info[8:16]) for info in take_all()]))

    def start(set_up: bool) -> None:
        block()
        ready = threading.Event()
        threading.Thread(target=worker, args=(set_up, ready), daemon=True).start()
        ready.wait()

    def observe() -> Any:
        go.set()
        while not found:
            time.sleep(0.001)
        return found[0][0], [number for number, _ in found[0][1]], take_all()

    seen, rebuilt, _ = carry(lambda: start(True), observe, lambda: start(False))
    assert seen == rebuilt == ((STACK_ADDRESS, 0, 1 << 15), [signal.SIGUSR2], [])


def test_more_signals_than_fit_into_one_program() -> None:
    def setup() -> None:
        block()
        for value in range(1500):
            queue(signal.SIGRTMIN, value)

    seen, rebuilt, _ = carry(setup, take_all, block)
    assert rebuilt == seen
    assert [struct.unpack_from("<Q", info, 24)[0] for info in rebuilt] == list(range(1500))

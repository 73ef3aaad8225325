"""Scheduling and the attributes of processes and threads, carried to another process."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.gadgets import find_gadgets
from phaul_engine.objects.scheduling import online_cpus
from phaul_engine.proc import sched
from phaul_engine.program import Program
from phaul_engine.syscalls import NR
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.carry import Carried, carry, collect, rebuild, subject
from tests.kernel.test_task_signals import checked

LIBC = ctypes.CDLL(None, use_errno=True)
PRIVATE = ctypes.create_string_buffer(8192)
ADDRESS = ctypes.addressof(PRIVATE) + 4096 & ~4095


def prctl(*args: int) -> int:
    return int(LIBC.prctl(*args, *(0,) * (5 - len(args))))


def asked(option: int) -> int:
    """A prctl that answers through a pointer."""
    room = ctypes.c_int(-1)
    checked(LIBC.prctl(option, ctypes.byref(room), 0, 0, 0))
    return room.value


def scheduling() -> Any:
    found = sched.read_scheduling(0)
    return found, sorted(sched.read_affinity(0)), sched.read_ioprio(0), prctl(30)


def nice() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, 11)
    checked(LIBC.syscall(NR.ioprio_set, 1, 0, 2 << 13 | 6))
    prctl(29, 123_456)


def real_time() -> None:
    os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(7))


def batch_on_one_cpu() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.sched_setaffinity(0, {max(online_cpus())})


def deadline() -> None:
    wanted = sched.Scheduling(6, 0, 0, 0, 1_000_000, 100_000_000, 200_000_000, 0, 0)
    checked(LIBC.syscall(NR.sched_setattr, 0, sched.pack_scheduling(wanted), 0))


@pytest.mark.parametrize("setup", [nice, real_time, batch_on_one_cpu, deadline], ids=lambda setup: setup.__name__)
def test_scheduling(setup: Callable[[], None]) -> None:
    seen, rebuilt, carried = carry(setup, scheduling)
    assert rebuilt == seen
    assert seen != scheduling()
    assert carried.cores[0].thread_core.phaul.HasField("affinity") == (len(seen[1]) < len(online_cpus()))


def test_scheduling_is_made_usual_again() -> None:
    """A skeleton is born with the agent's own scheduling, which must not stick."""
    seen, rebuilt, _ = carry(lambda: None, scheduling, nice)
    assert rebuilt == seen


def test_a_slice_of_its_own() -> None:
    if sched.read_scheduling(0).runtime == 0:
        pytest.skip("this kernel has no slices of one's own (Linux 6.12)")

    def setup() -> None:
        wanted = sched.Scheduling(0, 0, 3, 0, 7_000_000, 0, 0, 0, 0)
        checked(LIBC.syscall(NR.sched_setattr, 0, sched.pack_scheduling(wanted), 0))

    seen, rebuilt, carried = carry(setup, scheduling)
    assert seen[0].runtime == 7_000_000 == carried.cores[0].thread_core.phaul.sched_runtime
    assert rebuilt == seen


def test_cpus_that_are_not_here_are_refused() -> None:
    def change(carried: Carried) -> None:
        carried.cores[0].thread_core.phaul.affinity = bytes(100) + b"\x01"

    with pytest.raises(RebuildError, match=r"CPUs \[800\] only"):
        carry(lambda: None, scheduling, change=change)


def attributes() -> dict[str, Any]:
    found: dict[str, Any] = {
        "subreaper": asked(37),
        "thp": prctl(42),
        "mdwe": prctl(66),
        "death signal": asked(2),
        "personality": LIBC.personality(0xFFFFFFFF),
        "machine check": prctl(34),
        "store bypass": prctl(52, 0),
        "membarrier": LIBC.syscall(NR.membarrier, 1 << 9, 0, 0),
        "name": Path("/proc/thread-self/comm").read_bytes(),
    }
    for name in ("oom_score_adj", "coredump_filter", "loginuid"):
        found[name] = Path(f"/proc/self/{name}").read_text().strip()
    return found


def set_many() -> None:
    prctl(36, 1)
    checked(prctl(41, 1))
    checked(prctl(65, 1))
    prctl(1, signal.SIGUSR2)
    LIBC.personality(0x0040000)
    checked(prctl(33, 1, 1))
    prctl(53, 0, 4)
    checked(LIBC.syscall(NR.membarrier, 1 << 4, 0, 0))
    checked(LIBC.syscall(NR.membarrier, 1 << 2, 0, 0))
    ctypes.CDLL(None).prctl(15, b"\xff) (S 1\n", 0, 0, 0)
    Path("/proc/self/oom_score_adj").write_text("733")
    Path("/proc/self/coredump_filter").write_text("0x7f")


def test_attributes() -> None:
    seen, rebuilt, carried = carry(set_many, attributes)
    assert rebuilt == seen
    (ident,) = carried.collection.checkpoint.idents("mm")
    assert carried.collection.checkpoint.one("mm", ident).thp_disabled
    untouched = attributes()
    unchanged = {name for name in seen if seen[name] == untouched[name]}
    assert unchanged <= {"loginuid", "store bypass"}  # these the host may not let be changed
    assert seen["name"] == b"\xff) (S 1\n\n"
    assert carried.cores[0].tc.comm == b"\xff) (S 1\n"


def test_a_lower_oom_score_than_allowed_is_refused() -> None:
    def change(carried: Carried) -> None:
        carried.cores[0].tc.oom_score_adj = -999

    if _may_raise():
        seen, rebuilt, _ = carry(lambda: None, attributes, change=change)
        assert rebuilt["oom_score_adj"] == "-999" != seen["oom_score_adj"]
    else:
        with pytest.raises(RebuildError, match="oom_score_adj -999"):
            carry(lambda: None, attributes, change=change)


def _may_raise() -> bool:
    return bool(int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16) >> 24 & 1)


def test_each_thread_has_its_own_name_and_scheduling() -> None:
    found: list[Any] = []
    go = threading.Event()

    def worker(set_up: bool, ready: threading.Event) -> None:
        if set_up:
            ctypes.CDLL(None).prctl(15, b"worker", 0, 0, 0)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 9)
            LIBC.personality(0x0040000)
        ready.set()
        go.wait()
        found.append((attributes(), scheduling()))

    def start(set_up: bool) -> None:
        ready = threading.Event()
        threading.Thread(target=worker, args=(set_up, ready), daemon=True).start()
        ready.wait()

    def observe() -> Any:
        go.set()
        while not found:
            time.sleep(0.001)
        return found[0], attributes(), scheduling()

    seen, rebuilt, _ = carry(lambda: start(True), observe, lambda: start(False))
    assert rebuilt == seen
    assert seen[0][0]["name"] == b"worker\n" != seen[1]["name"]
    assert (seen[0][0]["personality"], seen[1]["personality"]) == (0x40000, 0)
    assert (seen[0][1][0].nice, seen[2][0].nice) == (9, os.getpriority(os.PRIO_PROCESS, 0))


def test_umask() -> None:
    def umask() -> int:
        now = os.umask(0)
        os.umask(now)
        return now

    with Tracer() as tracer, subject(lambda: None, umask) as source, subject(lambda: None, umask) as target:
        rebuild(tracer, target.pid, collect(tracer, source.pid), umask=0o137)
        assert target.observe() == 0o137


def addresses() -> tuple[int, int, int]:
    tid, head, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64()
    checked(LIBC.prctl(40, ctypes.byref(tid), 0, 0, 0))
    checked(LIBC.syscall(NR.get_robust_list, 0, ctypes.byref(head), ctypes.byref(size)))
    return tid.value, head.value, size.value


def test_tid_address_and_robust_list() -> None:
    def setup() -> None:
        LIBC.syscall(NR.set_tid_address, ctypes.c_void_p(ADDRESS))
        checked(LIBC.syscall(NR.set_robust_list, ctypes.c_void_p(ADDRESS + 64), 24))

    seen, rebuilt, _ = carry(setup, addresses)
    assert seen == rebuilt == (ADDRESS, ADDRESS + 64, 24)


def test_rseq() -> None:
    """In a process without an area of its own, as a skeleton task is."""
    signature = 0x53053053

    with Tracer() as tracer, subject(lambda: None, os.getpid) as source:
        carried = collect(tracer, source.pid)
        own = carried.cores[0].thread_core.rseq_entry
        if not own.rseq_abi_pointer:
            pytest.skip("this C library has not registered an rseq area")
        with stop_tree(tracer, source.pid, timeout_ms=2000) as tree:
            tree.read_states()
            process = tree.processes[source.pid]
            areas = process.areas()
            with tree.interpreter(process, find_gadgets(source.pid, areas), areas) as interpreter:
                leave = Program()
                leave.order(NR.rseq, own.rseq_abi_pointer, own.rseq_abi_size, 1, own.signature)
                interpreter.run({source.pid: leave})
        assert not collect(tracer, source.pid).cores[0].thread_core.HasField("rseq_entry")
        carried.cores[0].thread_core.rseq_entry.signature = signature
        rebuild(tracer, source.pid, carried, rseq=True)
        again = collect(tracer, source.pid).cores[0].thread_core.rseq_entry
        assert (again.rseq_abi_pointer, again.rseq_abi_size) == (own.rseq_abi_pointer, own.rseq_abi_size)
        assert again.signature == signature
        assert source.observe() == source.pid


def test_a_local_descriptor_table_is_a_blocker() -> None:
    def setup() -> None:
        entry = struct.pack("<IIII", 0, 0x1000, 0xFFFFF, 0b1110001)
        checked(LIBC.syscall(NR.modify_ldt, 1, entry, 16))

    with Tracer() as tracer, subject(setup, os.getpid) as source:
        (blocker,) = collect(tracer, source.pid).collection.blockers
    assert "local descriptor table" in str(blocker)

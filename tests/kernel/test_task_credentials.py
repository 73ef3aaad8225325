"""Credentials, limits and seccomp filters of a process, carried to another."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.proc.access import open_process
from phaul_engine.proc.status import read_status
from phaul_engine.target import Tracer

from tests.kernel.carry import Carried, carry, collect, rebuild, subject
from tests.kernel.test_task_signals import checked

LIBC = ctypes.CDLL(None, use_errno=True)
NR_GETPPID, NR_CAPSET, NR_SETFSUID, NR_SECCOMP, NR_UNAME = 110, 126, 122, 317, 63
SECCOMP_FILTER_FLAG_LOG = 2
PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_GET_SECUREBITS, PR_SET_SECUREBITS = 3, 4, 24, 27, 28
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_GET_SECCOMP = 8, 38, 47, 21
NET_RAW, CHOWN, SETPCAP, NET_BIND = 13, 0, 8, 10


def prctl(*args: int) -> int:
    return checked(LIBC.prctl(*args, *(0,) * (5 - len(args))))


def capset(effective: int, permitted: int, inheritable: int) -> None:
    masks = (effective, permitted, inheritable)
    words = struct.pack("<6I", *(mask & 0xFFFFFFFF for mask in masks), *(mask >> 32 for mask in masks))
    checked(LIBC.syscall(NR_CAPSET, struct.pack("<Ii", 0x20080522, 0), words))


def permitted() -> int:
    return int(Path("/proc/thread-self/status").read_text().split("CapPrm:")[1].split()[0], 16)


def credentials() -> dict[str, Any]:
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    names = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
    found: dict[str, Any] = dict(line.split(":\t") for line in lines if line.startswith(names))
    return {**found, "securebits": prctl(PR_GET_SECUREBITS), "dumpable": prctl(PR_GET_DUMPABLE)}


def plain_user() -> None:
    os.setgroups([7, 5, 100])
    os.setresgid(1001, 1002, 1003)
    os.setresuid(2001, 2002, 2003)


def user_with_ambient_capability() -> None:
    prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(1001, 1001, 1001)
    os.setresuid(2001, 2001, 2001)
    capset(1 << NET_BIND, 1 << NET_BIND | 1 << NET_RAW, 1 << NET_BIND)
    prctl(PR_CAP_AMBIENT, 2, NET_BIND)
    prctl(PR_SET_DUMPABLE, 1)


def root_without_some() -> None:
    have = permitted()
    capset(have & ~(1 << NET_RAW), have & ~(1 << NET_RAW), 1 << CHOWN)
    for number in (NET_RAW, CHOWN):  # inheritable stays what is not bounding any more
        prctl(PR_CAPBSET_DROP, number)
    prctl(PR_SET_SECUREBITS, 0b101111)  # NOROOT and NO_SETUID_FIXUP with their locks, and one lock more
    LIBC.syscall(NR_SETFSUID, 1234)
    os.setregid(-1, 55)


def no_new_privileges() -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    capset(0, permitted(), 0)
    prctl(PR_SET_DUMPABLE, 0)


def nothing_at_all() -> None:
    for number in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


SCENARIOS = [plain_user, user_with_ambient_capability, root_without_some, no_new_privileges, nothing_at_all]


@pytest.mark.parametrize("setup", SCENARIOS, ids=lambda setup: setup.__name__)
def test_credentials(setup: Callable[[], None]) -> None:
    seen, rebuilt, _ = carry(setup, credentials)
    assert rebuilt == seen
    assert seen != credentials()


def test_many_groups() -> None:
    seen, rebuilt, _ = carry(lambda: os.setgroups(range(10, 1010)), os.getgroups)
    assert seen == rebuilt == list(range(10, 1010))


def test_each_thread_has_credentials_of_its_own() -> None:
    """The kernel keeps them by thread (a raw setresuid); dumpable, which each change resets, is the process's."""
    found: list[dict[str, Any]] = []
    go = threading.Event()

    def worker(uid: int, ready: threading.Event) -> None:
        if uid:
            checked(LIBC.syscall(117, uid, uid, uid))  # setresuid of this thread only
        ready.set()
        go.wait()
        found.append(credentials())

    def start(uids: list[int]) -> None:
        for uid in uids:
            ready = threading.Event()
            threading.Thread(target=worker, args=(uid, ready), daemon=True).start()
            ready.wait()
        prctl(PR_SET_DUMPABLE, 1)

    def observe() -> Any:
        go.set()
        while len(found) < 2:
            time.sleep(0.001)
        return sorted([*found, credentials()], key=lambda one: str(one["Uid"]))

    seen, rebuilt, _ = carry(lambda: start([3001, 3002]), observe, lambda: start([0, 0]))
    assert rebuilt == seen
    assert [one["Uid"].split()[0] for one in seen] == ["0", "3001", "3002"]
    assert {one["dumpable"] for one in seen} == {1}


def test_a_capability_that_phaul_lacks_here_is_refused_by_number() -> None:
    def change(carried: Carried) -> None:
        carried.cores[0].thread_core.creds.cap_prm[1] |= 1 << 31

    with pytest.raises(RebuildError, match=r"lacks on this host \(number 63\)"):
        carry(lambda: None, credentials, change=change)


def limits() -> list[tuple[int, int]]:
    return [resource.getrlimit(number) for number in range(16)]


def test_limits() -> None:
    def setup() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (123, 1234))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (1 << 45, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_NPROC, (50, 60))
        resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
        os.setresuid(2001, 2001, 2001)

    seen, rebuilt, carried = carry(setup, limits)
    assert rebuilt == seen
    assert seen[resource.RLIMIT_NOFILE] == (123, 1234)
    assert len(carried.cores[0].tc.rlimits.rlimits) == 16


def test_a_hard_limit_that_cannot_be_raised_is_refused_by_name() -> None:
    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 1000))
        have = permitted() & ~(1 << 24)
        capset(have, have, 0)

    with pytest.raises(RebuildError, match=r"hard limit Max core file size \d+|unlimited.*CAP_SYS_RESOURCE"):
        carry(lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 5000)), limits, prepare)


def deny(number: int, error: int) -> bytes:
    """Filter: system call `number` fails with `error`, all others are allowed."""
    instructions = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions)


def install(text: bytes, flags: int = 0) -> None:
    room = ctypes.create_string_buffer(text, len(text))
    head = struct.pack("<HxxxxxxQ", len(text) // 8, ctypes.addressof(room))
    checked(LIBC.syscall(NR_SECCOMP, 1, flags, head))


def errors() -> tuple[Any, ...]:
    found: list[Any] = []
    for number in (NR_GETPPID, NR_UNAME):
        ctypes.set_errno(0)
        result = LIBC.syscall(number, None)
        found.append(ctypes.get_errno() if result < 0 else 0)
    return (*found, prctl(PR_GET_SECCOMP), credentials()["Uid"].split()[0])


@pytest.mark.parametrize("privileged", [True, False], ids=["no_new_privs unset", "no_new_privs set"])
def test_seccomp_filters(privileged: bool) -> None:
    """Filters stack; they are there although the task may not install any (neither privileged nor no_new_privs)."""

    def setup() -> None:
        if not privileged:
            prctl(PR_SET_NO_NEW_PRIVS, 1)
        install(deny(NR_GETPPID, 101))
        install(deny(NR_UNAME, 102))
        install(deny(NR_UNAME, 103), SECCOMP_FILTER_FLAG_LOG)
        os.setresuid(2001, 2001, 2001)

    seen, rebuilt, carried = carry(setup, errors)
    assert seen == rebuilt == (101, 103, 2, "2001")  # of filters that return an errno the youngest wins
    entries = carried.collection.checkpoint.one("seccomp").seccomp_filters
    assert [entry.filter for entry in entries] == [
        deny(NR_GETPPID, 101),
        deny(NR_UNAME, 102),
        deny(NR_UNAME, 103),
    ]
    assert [entry.prev for entry in entries[1:]] == [0, 1]
    assert [entry.flags for entry in entries] == [0, 0, SECCOMP_FILTER_FLAG_LOG]
    assert carried.cores[0].thread_core.seccomp_filter == 2


def test_threads_that_inherited_filters_share_them_in_the_image() -> None:
    def setup() -> None:
        install(deny(NR_GETPPID, 101))
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        install(deny(NR_UNAME, 102))

    with Tracer() as tracer, subject(setup, errors) as source:
        carried = collect(tracer, source.pid)
    assert [core.thread_core.seccomp_filter for core in carried.cores] == [1, 0]
    assert len(carried.collection.checkpoint.one("seccomp").seccomp_filters) == 2


def test_a_filter_with_a_supervisor_is_a_blocker() -> None:
    notify = struct.pack("<HBBI", 0x20, 0, 0, 0) + struct.pack("<HBBI", 0x15, 0, 1, NR_UNAME)
    notify += struct.pack("<HBBI", 0x06, 0, 0, 0x7FC00000) + struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)

    with Tracer() as tracer, subject(lambda: install(notify), os.getpid) as source:
        (blocker,) = collect(tracer, source.pid).collection.blockers
    assert "asks a supervisor" in str(blocker)


def test_dumpable_by_root_only_needs_the_sysctl() -> None:
    """Mode 2 cannot be set by the task: where the kernel would not give it, the rebuild says which sysctl does."""

    def change(carried: Carried) -> None:
        (ident,) = carried.collection.checkpoint.idents("mm")
        carried.collection.checkpoint.one("mm", ident).dumpable = 2

    sysctl = Path("/proc/sys/fs/suid_dumpable")
    if sysctl.read_text().strip() == "2":
        _, rebuilt, _ = carry(lambda: None, credentials, change=change)
        assert rebuilt["dumpable"] == 2
    else:
        with pytest.raises(RebuildError, match="suid_dumpable"):
            carry(lambda: None, credentials, change=change)


def test_a_target_that_has_been_let_go_is_untraced() -> None:
    with Tracer() as tracer, subject(plain_user, os.getuid) as source, subject(lambda: None, os.getuid) as target:
        rebuild(tracer, target.pid, collect(tracer, source.pid))
        assert target.observe() == 2001
        proc = open_process(target.pid)
        assert read_status(proc).tracer_pid == 0
        os.close(proc)


def test_filters_that_do_not_fit_into_one_program() -> None:
    long = deny(NR_GETPPID, 99)[:-8] + struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000) * 3000

    def setup() -> None:
        install(long)
        install(deny(NR_UNAME, 102))
        install(long)

    seen, rebuilt, carried = carry(setup, errors)
    assert seen == rebuilt == (99, 102, 2, "0")
    assert [len(entry.filter) for entry in carried.collection.checkpoint.one("seccomp").seccomp_filters] == [
        len(long),
        32,
        len(long),
    ]

"""State that no descriptor and no area shows: carried, or found and refused by name before anything is touched."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from phaul_engine import features
from phaul_engine.collect import Collector
from phaul_engine.errors import BlockedError, Blocker
from phaul_engine.syscalls import NR
from phaul_engine.target import Tracer, stop_tree

from phaul import facts
from tests.kernel.carry import Subject, carry, subject
from tests.kernel.skeletons import collect, remake
from tests.subjects.programs import wait_until

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
_NOBODY = 65534


def checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def call(nr: NR, *args: int) -> int:
    return checked(LIBC.syscall(ctypes.c_long(nr), *map(ctypes.c_long, args)))


def survey(process: Subject) -> list[Blocker]:
    with Tracer() as tracer, Collector() as collector, stop_tree(tracer, process.pid, timeout_ms=1000) as tree:
        return collector.collect(tree, survey=True).blockers


def kinds(blockers: list[Blocker]) -> set[str]:
    """What is refused, but for what every fork of the test's has: its pipes, session and terminal."""
    return {one.kind for one in blockers if not re.search(r"^a pipe|session|terminal|group led", one.kind)}


# -- refused -----------------------------------------------------------------------------------------------------------


def no_new_privs() -> None:
    checked(LIBC.prctl(38, 1, 0, 0, 0))


def landlock() -> None:
    no_new_privs()
    rules = struct.pack("<QQ", 1 << 1, 0)  # LANDLOCK_ACCESS_FS_WRITE_FILE
    room = ctypes.create_string_buffer(rules, len(rules))
    fd = checked(LIBC.syscall(ctypes.c_long(NR.landlock_create_ruleset), room, ctypes.c_long(8), ctypes.c_long(0)))
    call(NR.landlock_restrict_self, fd, 0)
    os.close(fd)


def as_nobody(setup: Callable[[], None]) -> Callable[[], None]:
    def act() -> None:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        setup()

    return act


def process_keyring() -> None:
    call(NR.keyctl, 0, -2, 1)


def thread_keyring() -> None:
    call(NR.keyctl, 0, -1, 1)


def _landlock_version() -> int:
    return int(LIBC.syscall(ctypes.c_long(NR.landlock_create_ruleset), None, ctypes.c_long(0), ctypes.c_long(1)))


needs_landlock = pytest.mark.skipif(_landlock_version() < 1, reason="this kernel has no Landlock")


@pytest.mark.parametrize(
    ("setup", "kind"),
    [
        pytest.param(landlock, "in a Landlock domain", id="Landlock as root", marks=needs_landlock),
        pytest.param(as_nobody(landlock), "in a Landlock domain", id="Landlock as nobody", marks=needs_landlock),
        pytest.param(process_keyring, "a process keyring", id="process keyring"),
        pytest.param(thread_keyring, "a thread keyring", id="thread keyring"),
    ],
)
def test_what_cannot_be_carried_is_found(setup: Callable[[], None], kind: str) -> None:
    with subject(setup, lambda: None) as process:
        assert kinds(survey(process)) == {kind}
        assert kinds(survey(process)) == {kind}, "and found again"


@pytest.mark.parametrize(
    "setup", [lambda: None, no_new_privs, as_nobody(no_new_privs)], ids=["root", "confined", "nobody"]
)
def test_ordinary_programs_are_not_suspected(setup: Callable[[], None]) -> None:
    with subject(setup, lambda: None) as process:
        assert kinds(survey(process)) == set()


def test_dispatched_system_calls_are_found_before_any_is_made() -> None:
    """An injected system call would end in the program's handler."""

    def setup() -> None:
        selector = ctypes.create_string_buffer(1)  # 0: allow
        checked(LIBC.prctl(59, 1, 0, 0, selector))
        setup.selector = selector  # type: ignore[attr-defined]

    with subject(setup, lambda: "here") as process:
        with pytest.raises(BlockedError) as refused:
            survey(process)
        assert kinds(refused.value.blockers) == {"dispatching its system calls"}
        findings, *_ = facts.survey(process.pid, {})
        assert ["dispatching its system calls" in finding.text for finding in findings] == [True]
        assert process.observe() == "here"


# -- carried -----------------------------------------------------------------------------------------------------------


def test_locking_of_what_comes_later_is_carried() -> None:
    def lock() -> None:
        checked(LIBC.mlockall(2))

    def is_locked() -> bool:
        with mmap.mmap(-1, 1 << 16):
            return bool(re.search(r"VmFlags:.*\blo\b", Path("/proc/self/smaps").read_text()))

    seen, rebuilt, carried = carry(lock, is_locked)
    assert seen
    assert rebuilt
    assert carried.cores[0].tc.phaul.lock_future
    seen, rebuilt, _ = carry(lambda: None, is_locked)
    assert not seen
    assert not rebuilt


_PROGRAM = """
import ctypes, os, re, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
AT, SIZE = 0x20000000, 0x4000
assert libc.mmap(AT, SIZE, 3, 0x100022, -1, 0) == AT
ctypes.memset(AT, 7, 100)
assert libc.syscall(*map(ctypes.c_long, (int(sys.argv[2]), AT, SIZE, int(sys.argv[3])))) == 0
while True:
    text = open("/proc/self/smaps").read()
    end, flags = re.search(r"^20000000-([0-9a-f]+) .*?VmFlags:([^\\n]*)", text, re.M | re.S).groups()
    shown = [flag for flag in flags.split() if flag in ("lo", "lf", "sl")]
    held = libc.munmap(ctypes.c_void_p(AT), 4096) if "sl" in shown else 0
    with open(sys.argv[1] + ".new", "w") as out:
        out.write(" ".join([end, *shown, str(held), str(ctypes.string_at(AT, 1)[0])]))
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("how", "seen", "used"),
    [
        pytest.param((NR.mlock2, 1), "20004000 lo lf 0 7", set(), id="locked on fault"),
        pytest.param(
            (NR.mseal, 0),
            "20004000 sl -1 7",
            {"sealed areas (mseal)"},
            id="sealed",
            marks=pytest.mark.skipif(bool(features.missing(["sealed areas (mseal)"])), reason="no mseal(2) here"),
        ),
    ],
)
def test_what_smaps_says_of_an_area_is_carried(how: tuple[int, int], seen: str, used: set[str], tmp_path: Path) -> None:
    status = tmp_path / "status"
    command = [sys.executable, "-c", _PROGRAM, str(status), *(str(int(one)) for one in how)]
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    program.returncode = 0  # it is waited for by number: it ends, and comes again
    wait_until(status.exists, "the program begins")
    assert status.read_text() == seen
    with Tracer() as tracer, stop_tree(tracer, program.pid, timeout_ms=1000) as tree:
        checkpoint, pages = collect(tree, program.pid)
        os.kill(program.pid, signal.SIGKILL)
    os.waitpid(program.pid, 0)
    status.unlink()
    remake(program.pid, checkpoint, pages)
    try:
        wait_until(status.exists, "the program goes on")
        assert status.read_text() == seen
        assert set(features.needed(checkpoint)) == used
    finally:
        os.kill(program.pid, signal.SIGKILL)
        os.waitpid(program.pid, 0)

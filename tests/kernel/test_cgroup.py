"""The hold, with real processes. Each test leaves the cgroups as it found them; the fixture checks that."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from phaul_engine import cgroup
from phaul_engine.cgroup import FreezeTimeoutError, Hierarchy, Hold, HoldGoneError, OccupiedError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

COUNTER = """
import mmap, os, struct, sys
shared = mmap.mmap(int(sys.argv[1]), 8)
n = 0
print("up", flush=True)
while True:
    n += 1
    shared[:8] = struct.pack("Q", n)
"""

FORKER = """
import os, time
print("up", flush=True)
while True:
    pid = os.fork()
    if not pid:
        time.sleep(0.02)
        os._exit(0)
    time.sleep(0.002)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    except ChildProcessError:
        pass
"""

# A fault taken inside read(2) on a page that nobody fills is a wait that no signal but SIGKILL ends.
STUCK = """
import ctypes, mmap, os, struct
libc = ctypes.CDLL(None, use_errno=True)
uffd = libc.syscall(323, 0)
import fcntl
fcntl.ioctl(uffd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
area = mmap.mmap(-1, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
fcntl.ioctl(uffd, 0xC020AA00, bytearray(struct.pack("QQQQ", address, 4096, 1, 0)))
r, w = os.pipe()
os.write(w, b"x")
print("up", flush=True)
libc.read(r, ctypes.c_void_p(address), 1)
"""


class Subjects:
    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, source: str, *args: str, pass_fds: tuple[int, ...] = ()) -> int:
        child = subprocess.Popen([sys.executable, "-c", source, *args], stdout=subprocess.PIPE, pass_fds=pass_fds)
        self._started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        return child.pid

    def end(self) -> None:
        for child in self._started:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


@pytest.fixture
def subjects() -> Iterator[Subjects]:
    group = Subjects()
    yield group
    group.end()


@pytest.fixture
def hierarchy() -> Iterator[Hierarchy]:
    with Hierarchy.find() as found:
        yield found


@pytest.fixture
def hold(hierarchy: Hierarchy) -> Iterator[Hold]:
    made = Hold.create(hierarchy, cgroup.path_of(os.getpid()), f"phaul-test-{os.getpid()}")
    yield made
    with contextlib.suppress(HoldGoneError):
        again = Hold.open(hierarchy, made.path)
        again.kill(5)
        again.remove()
    with pytest.raises(HoldGoneError):
        hierarchy.open(made.path)


@pytest.fixture
def counter(subjects: Subjects) -> Iterator[tuple[int, Callable[[], int]]]:
    fd = os.memfd_create("counter")
    os.ftruncate(fd, 8)
    pid = subjects.start(COUNTER, str(fd), pass_fds=(fd,))
    yield pid, lambda: int.from_bytes(os.pread(fd, 8, 0), "little")
    os.close(fd)


def descendants(pid: int) -> Callable[[], set[int]]:
    def tree() -> set[int]:
        found, todo = set(), [pid]
        while todo:
            one = todo.pop()
            found.add(one)
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{one}/task").iterdir():
                    todo += [int(child) for child in (task / "children").read_text().split()]
        return found

    return tree


def goes_on(count: Callable[[], int]) -> bool:
    before = count()
    time.sleep(0.05)
    return count() > before


def test_frozen_stays_frozen_whatever_signals_arrive(hold: Hold, counter: tuple[int, Callable[[], int]]) -> None:
    pid, count = counter
    hold.gather(lambda: [pid])
    assert hold.members() == {pid}
    assert cgroup.path_of(pid) == hold.path
    assert goes_on(count)
    assert hold.freeze(1.0) < 1.0
    assert hold.frozen
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGCONT)
    assert not goes_on(count)
    hold.thaw()
    assert goes_on(count)


def test_disband_puts_the_processes_back(hold: Hold, counter: tuple[int, Callable[[], int]]) -> None:
    pid, count = counter
    home = cgroup.path_of(pid)
    hold.gather(lambda: [pid])
    hold.disband()
    assert cgroup.path_of(pid) == home
    assert goes_on(count)


def test_disband_refuses_what_is_frozen(hold: Hold, counter: tuple[int, Callable[[], int]]) -> None:
    pid, count = counter
    hold.gather(lambda: [pid])
    hold.freeze(1.0)
    with pytest.raises(cgroup.CgroupError, match="frozen"):
        hold.disband()
    assert not goes_on(count)


def test_gather_finds_children_forked_meanwhile(hold: Hold, subjects: Subjects) -> None:
    pid = subjects.start(FORKER)
    tree = descendants(pid)
    hold.gather(tree)
    hold.freeze(2.0)
    assert {one for one in tree() if cgroup._alive(one)} <= hold.members()
    assert pid in hold.members()


def test_kill_ends_frozen_processes(hold: Hold, counter: tuple[int, Callable[[], int]]) -> None:
    pid, _ = counter
    hold.gather(lambda: [pid])
    hold.freeze(1.0)
    hold.kill(5.0)
    assert not hold.populated
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    hold.remove()


def test_who_does_not_stop_is_named_and_all_run_on(
    hold: Hold, subjects: Subjects, counter: tuple[int, Callable[[], int]]
) -> None:
    pid, count = counter
    stuck = subjects.start(STUCK)
    time.sleep(0.1)
    hold.gather(lambda: [pid, stuck])
    with pytest.raises(FreezeTimeoutError) as caught:
        hold.freeze(0.05)
    assert len(caught.value.tasks) == 1
    assert f"pid {stuck} " in caught.value.tasks[0]
    assert not hold.frozen
    assert goes_on(count)


def test_remove_refuses_what_is_inhabited(hold: Hold, counter: tuple[int, Callable[[], int]]) -> None:
    pid, _ = counter
    hold.gather(lambda: [pid])
    with pytest.raises(OccupiedError):
        hold.remove(timeout=0.05)


def test_what_is_removed_is_closed_and_may_be_closed_again(hold: Hold) -> None:
    before = len(os.listdir("/proc/self/fd"))
    hold.remove()
    assert len(os.listdir("/proc/self/fd")) == before - 5
    hold.close()


def test_another_process_finds_the_hold_by_its_path(hierarchy: Hierarchy, hold: Hold) -> None:
    hold.freeze(1.0)
    again = Hold.open(hierarchy, hold.path)
    assert again.frozen
    again.remove()
    with pytest.raises(HoldGoneError):
        hold.thaw()
    with pytest.raises(HoldGoneError):
        Hold.open(hierarchy, hold.path)


def test_a_stopped_by_ptrace_task_freezes_too(hold: Hold, counter: tuple[int, Callable[[], int]]) -> None:
    pid, count = counter
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    hold.gather(lambda: [pid])
    assert libc.ptrace(0x4206, pid, None, None) == 0  # PTRACE_SEIZE
    assert libc.ptrace(0x4207, pid, None, None) == 0  # PTRACE_INTERRUPT
    os.waitpid(pid, 0x40000000)  # __WALL
    hold.freeze(1.0)
    assert libc.ptrace(17, pid, None, None) == 0  # PTRACE_DETACH
    assert not goes_on(count)
    hold.thaw()
    assert goes_on(count)


def test_a_private_mount_reaches_the_same_cgroups(
    hold: Hold, counter: tuple[int, Callable[[], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, count = counter
    hold.gather(lambda: [pid])
    monkeypatch.setattr(cgroup, "_mounts", lambda: iter(()))
    with Hierarchy.find() as private:
        again = Hold.open(private, hold.path)
        assert again.members() == {pid}
        again.freeze(1.0)
        assert not goes_on(count)
        again.thaw()
        again.close()


def test_examine_names_what_forbids(hierarchy: Hierarchy, hold: Hold, counter: tuple[int, Callable[[], int]]) -> None:
    pid, _ = counter
    assert cgroup.examine([pid, os.getpid()]) == []
    hold.gather(lambda: [pid])
    (spread,) = cgroup.examine([pid, os.getpid()])
    assert spread.kind == "spread over several cgroups"
    hold.freeze(1.0)
    (frozen,) = cgroup.examine([pid])
    assert (frozen.where, frozen.kind) == (f"cgroup {hold.path}", "frozen")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".x", "a\n"])
def test_names_that_are_paths_are_refused(hierarchy: Hierarchy, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        Hold.create(hierarchy, "/", name)


def test_a_tree_that_is_not_all_inside_is_not_held(
    hold: Hold, subjects: Subjects, counter: tuple[int, Callable[[], int]]
) -> None:
    inside, outside = counter[0], subjects.start(FORKER)
    hold.gather(lambda: [inside])
    with pytest.raises(cgroup.CgroupError, match=f"not in .*pid {outside} "):
        hold.freeze(5, [inside, outside])
    assert not hold.frozen
    hold.freeze(5, [inside])
    assert hold.frozen
    hold.thaw()

"""PID namespaces below that of a tree's first process: sandboxes in a program, on the host and in containers."""

from __future__ import annotations

from pathlib import Path
from shutil import which

import pytest
from phaul_engine.errors import BlockedError

from tests.kernel.namespaces.containers import container

_COMMON = """
import ctypes, json, threading, time
libc = ctypes.CDLL(None, use_errno=True)
NEWPID, NEWNS, NEWUSER = 0x20000000, 0x20000, 0x10000000

def call(name, *arguments):
    assert getattr(libc, name)(*arguments) >= 0, (name, os.strerror(ctypes.get_errno()))

class Child:
    # Looks at itself whenever it is asked. A fork of its maker, in whatever namespaces that says.
    def __init__(self, settle=lambda: None):
        (self.asked, self.ask), (self.told, self.tell) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.live(settle)
            except BaseException:
                os.write(self.tell, traceback.format_exc().encode())
            os._exit(1)
        self.expect(b"!")

    def live(self, settle):
        global children
        children = []
        settle()
        before = look()
        os.write(self.tell, b"!")
        while os.read(self.asked, 1):
            now = look()
            os.write(self.tell, json.dumps([pair for pair in zip(before, now) if pair[0] != pair[1]]).encode())

    def expect(self, wanted):
        got = os.read(self.told, 100000)
        assert got == wanted, got.decode()

    def check(self):
        os.write(self.ask, b"?")
        self.expect(b"[]")

def born(*arguments):
    # A child in a pid namespace of its own.
    call("unshare", NEWPID)
    return Child(*arguments)

def rest():
    threading.Thread(target=signal.pause, daemon=True).start()

def look():
    # What it is called, and those around it; each as it knows them.
    found = [os.getpid(), os.getppid(), os.getsid(0), os.getpgid(0), numbers()]
    for one in children:
        one.check()
        found.append(os.getpgid(one.pid))
    return found

def numbers():
    # Of its threads, as they know them themselves.
    files = [open(f"/proc/self/task/{tid}/status").read() for tid in os.listdir("/proc/self/task")]
    told = [[line.split()[1:] for line in text.split("\\n") if line.startswith("NS")] for text in files]
    return sorted([list(map(lambda one: one[-1], names)) for names in told])

children = []

def check():
    for one in children:
        one.check()
"""


def _carried(place: Path, text: str, *flags: str) -> None:
    """Twice."""
    with container(place, _COMMON + text, *flags) as subject:
        subject.check()
        for _ in range(2):
            subject.carry()
            subject.check()


_FLAGS = {
    "host": (),
    "container": ("--pid", "--mount-proc"),
    "user": ("--pid", "--user", "--map-root-user", "--mount-proc", "--cgroup"),
}
_NO_GROUPS = ("--pid", "--user", "--map-root-user", "--mount-proc")
"""Who is in there sees the host's cgroups, and may not mount them."""
_ANYWHERE = pytest.mark.parametrize("flags", _FLAGS.values(), ids=_FLAGS)

_SANDBOX = """
def setup():
    global children
    children = [born(rest)]
"""


@_ANYWHERE
def test_a_sandbox(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Its maker's children go on to be born in there."""
    later = "def check():\n    children.append(Child())\n    [one.check() for one in children]\n"
    text = _SANDBOX + "    assert children[0].pid != 1\n" + later
    _carried(tmp_path, text, *flags)


_PROC = """
def setup():
    global children
    call("unshare", NEWNS)
    children = [born(settle)]

def settle():
    global kept
    call("mount", b"proc", b"/proc", b"proc", 0, None)
    os.chdir("/proc/1/fdinfo")
    kept = open("/proc/1/status"), open("/proc/sys/kernel/ns_last_pid")
    rest()

seen = look
def look():
    kept[0].seek(0)
    tasks = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return seen() + [tasks, os.getcwd(), kept[0].read().split()[:2], os.readlink("/proc/self")]
"""


@_ANYWHERE
def test_a_proc_that_shows_the_sandbox_to_its_maker_too(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """As unshare(1) makes it: maker and sandbox have one mount namespace."""
    sees = "def check():\n    assert [name for name in os.listdir('/proc') if name.isdigit()] == ['1']\n"
    _carried(tmp_path, _PROC + sees + "    children[0].check()\n", *flags)


_OWN_PROC = """
def setup():
    global children
    children = [born(settle)]
    here = os.open("/proc/self/ns/pid", os.O_RDONLY)
    call("setns", here, NEWPID)
    os.close(here)
    children.append(Child())
    assert children[1].pid != 2

def settle():
    call("unshare", NEWNS)
    call("mount", None, b"/", None, 0x4000 | 0x40000, None)
    call("mount", b"proc", b"/proc", b"proc", 0, None)
    rest()

seen = look
def look():
    return seen() + [os.path.exists("/proc/1/mem"), len(open("/proc/self/mountinfo").readlines())]
"""


@_ANYWHERE
def test_a_maker_that_has_children_beside_it_again(tmp_path: Path, flags: tuple[str, ...]) -> None:
    _carried(tmp_path, _OWN_PROC, *flags)


_LEVELS = """
def setup():
    global children
    children = [born(lower)]

def lower():
    global children
    rest()
    children = [Child(), born(lowest)]

def lowest():
    global children
    os.setsid()
    for _ in range(3):
        rest()
    children = [Child(lambda: os.setpgid(0, 0))]
    leader = children[0].pid
    children.append(Child(lambda: os.setpgid(0, leader)))
"""


@_ANYWHERE
def test_several_levels(tmp_path: Path, flags: tuple[str, ...]) -> None:
    _carried(tmp_path, _LEVELS, *flags)


_JOINED = """
def setup():
    global children
    children = [born(), Child(rest)]
    assert call("setns", os.open("/proc/self/ns/pid", os.O_RDONLY), NEWPID) is None
    other = Child()
    theirs = os.open(f"/proc/{children[0].pid}/ns/pid", os.O_RDONLY)
    call("setns", theirs, NEWPID)
    children += [other, Child(lambda: os.setsid()), Child(orphan)]
    os.closerange(theirs, theirs + 1)
    call("setns", os.open("/proc/self/ns/pid", os.O_RDONLY), NEWPID)

def orphan():
    # Its parent is the sandbox's process 1 now.
    ready, tell = os.pipe()
    leaver = os.fork()
    if leaver == 0:
        leader = os.fork()
        if leader == 0:
            os.setsid()
            if os.fork() == 0:
                while os.getppid() != 1:
                    time.sleep(0.01)
                os.write(tell, b"!")
                signal.pause()
            os._exit(0)
        os.waitpid(leader, 0)
        os._exit(0)
    os.waitpid(leaver, 0)
    os.read(ready, 1)
"""


@_ANYWHERE
def test_processes_that_joined_a_sandbox(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Their parent is outside of it. One has left a process behind, whose session has no leader any more."""
    _carried(tmp_path, _JOINED, *flags)


_DEAD = """
def setup():
    global children, ended
    children = [born(settle)]
    call("setns", os.open("/proc/self/ns/pid", os.O_RDONLY), NEWPID)
    call("unshare", NEWPID)
    ended = os.fork()
    if ended == 0:
        os._exit(7)
    call("setns", os.open("/proc/self/ns/pid", os.O_RDONLY), NEWPID)
    while open(f"/proc/{ended}/stat").read().split()[2] != "Z":
        time.sleep(0.01)

def settle():
    # A dead child, one whose group has no leader, and one that waits for who is in its group.
    ready, tell = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        if os.fork() == 0:
            while os.getppid() != 1:
                time.sleep(0.01)
            os.write(tell, b"!")
            signal.pause()
        os._exit(0)
    os.waitpid(leader, 0)
    os.read(ready, 1)
    if os.fork() == 0:
        os._exit(3)
    time.sleep(0.2)

seen = look
def look():
    return seen() + [str(os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT))]

def check():
    children[0].check()
    assert os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT).si_status == 7
"""


@_ANYWHERE
def test_the_dead_of_a_sandbox(tmp_path: Path, flags: tuple[str, ...]) -> None:
    _carried(tmp_path, _DEAD, *flags)


_LEADERS = """
def setup():
    # A process in a session whose leader is dead, but not reaped: here, and in a sandbox.
    global children
    call("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    leave()
    children = [born(leave)]

def leave():
    ready, tell = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setsid()
        if os.fork() == 0:
            while os.getppid() == os.getsid(0):
                time.sleep(0.01)
            os.write(tell, b"!")
            signal.pause()
        os._exit(3)
    os.read(ready, 1)

seen = look
def look():
    found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    return seen() + [found.si_pid, found.si_status, len(open("/proc/thread-self/children").read().split())]

def check():
    children[0].check()
    dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT).si_pid
    led = [pid for pid in map(int, open("/proc/thread-self/children").read().split()) if os.getsid(pid) == dead]
    assert len(led) == 2, led
"""


@_ANYWHERE
def test_sessions_whose_leaders_are_zombies(tmp_path: Path, flags: tuple[str, ...]) -> None:
    _carried(tmp_path, _LEADERS, *flags)


_GROUPS = """
def setup():
    # A job of two processes: the second makes a sandbox, in which nobody sees the group's leader.
    global children
    children = [Child(lambda: os.setpgid(0, 0))]
    leader = children[0].pid
    children += [Child(lambda: (os.setpgid(0, leader), children.append(born(job))))]
    children += [born()]
    os.setpgid(children[2].pid, leader)

def job():
    assert os.getpgid(0) == 0
    children.append(Child())
    children.append(Child(lambda: os.setpgid(0, 0)))
"""


@_ANYWHERE
def test_groups_that_are_led_from_above(tmp_path: Path, flags: tuple[str, ...]) -> None:
    _carried(tmp_path, _GROUPS, *flags)


_KNOWN = """
import fcntl, socket, struct
def setup():
    global children, pair, pipe, pidfd
    pair, pipe = socket.socketpair(), os.pipe()
    children = [born(settle)]
    pidfd = os.pidfd_open(children[0].pid)

def settle():
    global inner, pidfd
    fcntl.fcntl(pipe[0], fcntl.F_SETOWN, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGCHLD})
    inner = socket.socketpair()
    children.append(Child())
    pidfd = os.pidfd_open(children[0].pid)
    if os.fork() == 0:
        os.kill(1, signal.SIGUSR2)
        os._exit(0)
    os.wait()

seen = look
def look():
    if not children:
        return seen()
    owner = fcntl.fcntl(pipe[0], fcntl.F_GETOWN)
    fds = [line for line in open(f"/proc/thread-self/fdinfo/{pidfd}") if line.startswith("NSpid")]
    peers = [struct.unpack("iII", one.getsockopt(1, 17, 12)) for one in (pair[0], inner[0])]  # SO_PEERCRED
    return seen() + [owner, [line.split()[-1] for line in fds], peers, sorted(signal.sigpending())]

def check():
    children[0].check()
    assert fcntl.fcntl(pipe[0], fcntl.F_GETOWN) == children[0].pid
    told = [line.split() for line in open(f"/proc/self/fdinfo/{pidfd}")]
    assert ["Pid:", str(children[0].pid)] in told, told
"""


@_ANYWHERE
def test_who_refers_to_whom(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Owners of signals, peers, pid descriptors, from within and without."""
    _carried(tmp_path, _KNOWN, *flags)


_UNBORN = """
def setup():
    call("unshare", NEWPID)

def check():
    assert not os.path.exists("/proc/self/ns/pid_for_children")
    child = os.fork()
    if child == 0:
        os._exit(os.getpid())
    assert os.waitpid(child, 0)[1] == 1 << 8
"""


@_ANYWHERE
def test_one_that_has_not_begun(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with container(tmp_path, _COMMON + _UNBORN, *flags) as subject:
        subject.carry()
        subject.carry()
        subject.check()
        with pytest.raises(BlockedError, match="its process 1 has ended"):
            subject.carry()
        with pytest.raises(AssertionError):  # for that reason nothing can be born any more
            subject.check()


_OWNED = """
def setup():
    global children
    children = [Child(outer)]

def outer():
    call("unshare", NEWUSER)
    for name, text in (("setgroups", "deny"), ("gid_map", "0 0 1"), ("uid_map", "0 0 1")):
        open("/proc/self/" + name, "w").write(text)
    rest()
    children.append(born(inner))

def inner():
    for _ in range(3):
        rest()
    children.append(Child(rest))
    children.append(born(rest))
"""


@_ANYWHERE
def test_those_that_belong_to_a_user_namespace_below(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """As `unshare --user --pid --fork` makes them."""
    _carried(tmp_path, _OWNED, *flags)


_OWNED_ABOVE = """
def setup():
    global children
    children = [Child(outer)]

def enter(maps="0 0 1"):
    call("unshare", NEWUSER)
    for name, text in (("setgroups", "deny"), ("gid_map", maps), ("uid_map", maps)):
        open("/proc/self/" + name, "w").write(text)

def outer():
    # Gone again is who made it all.
    ready, tell = os.pipe()
    if os.fork() == 0:
        try:
            enter()
            call("unshare", NEWPID | NEWNS)
            children.append(Child(inner))
            os.write(tell, b"!")
            signal.pause()
        except BaseException:
            os.write(tell, traceback.format_exc().encode())
        os._exit(1)
    got = os.read(ready, 10000)
    assert got == b"!", got.decode()

def inner():
    call("mount", None, b"/", None, 0x4000 | 0x40000, None)
    call("mount", b"proc", b"/proc", b"proc", 0, None)
    enter()
    for _ in range(3):
        rest()
    children.append(Child(rest))
    children.append(born(lambda: children.append(Child(rest))))

seen = look
def look():
    return seen() + [sorted(os.listdir("/proc/self/task")) if os.getpid() == 1 else []]
"""


@_ANYWHERE
def test_those_that_belong_to_a_user_namespace_that_nobody_is_in(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """The processes inside may choose no numbers at all."""
    text = _OWNED_ABOVE.replace(
        "signal.pause()\n        except", "os.execv('/bin/sleep', ['sleep', '600'])\n        except"
    )
    _carried(tmp_path, text, *flags)


_INSIDE = """
import os, socket, sys
def look():
    found = [os.getpid(), os.getppid(), os.getresuid(), os.getgroups(), sorted(os.listdir("/dev"))]
    found.append(socket.gethostname())
    found += [open("/proc/self/" + name).read() for name in ("uid_map", "gid_map", "setgroups", "cgroup")]
    found.append([line for line in open("/proc/self/status") if line.startswith(("Cap", "NoNew", "Seccomp:"))])
    found.append(sorted(line.split()[4] for line in open("/proc/self/mountinfo")))
    return found + [sorted(name for name in os.listdir("/proc") if name.isdigit()), open("/tmp/file").read()]
open("/tmp/file", "w").write("text")
before = look()
os.write(1, b"!")
while os.read(0, 1):
    now = look()
    os.write(1, repr([pair for pair in zip(before, now) if pair[0] != pair[1]]).encode())
"""
_BUBBLEWRAP = """
class Bubble(Child):
    def __init__(self, *options):
        (asked, self.ask), (self.told, tell) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(asked, 0)
            os.dup2(tell, 1)
            words = ["bwrap", "--unshare-all", *options, "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]
            os.execvp("bwrap", [*words, "--tmpfs", "/tmp", sys.executable, "-I", "-S", "-c", INSIDE])
        os.close(asked)
        os.close(tell)
        self.expect(b"!")

def setup():
    global children
    children = [Bubble(), Bubble("--uid", "0", "--gid", "0", "--hostname", "bubble")]
"""


@pytest.mark.skipif(not which("bwrap"), reason="there is no bwrap (Debian's bubblewrap)")
@pytest.mark.parametrize("flags", [*_FLAGS.values(), _NO_GROUPS], ids=(*_FLAGS, "user without cgroups"))
def test_bubblewrap(tmp_path: Path, flags: tuple[str, ...]) -> None:
    _carried(tmp_path, f"INSIDE = {_INSIDE!r}\n{_BUBBLEWRAP}", *flags)


_ZOMBIE_OF_GROUP = """
def setup():
    # A job whose first process has ended, but is not reaped.
    global children, leader
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(4)
    os.waitid(os.P_PID, leader, os.WSTOPPED)
    children = [Child(lambda: os.setpgid(0, leader))]
    os.kill(leader, signal.SIGCONT)
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)

def check():
    children[0].check()
    assert os.getpgid(children[0].pid) == leader
    assert os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT).si_status == 4
"""


@_ANYWHERE
def test_a_group_whose_leader_is_a_zombie(tmp_path: Path, flags: tuple[str, ...]) -> None:
    _carried(tmp_path, _ZOMBIE_OF_GROUP, *flags)

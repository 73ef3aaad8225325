"""Trees of processes are collected, killed and made again, and find each other as they were."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.collect import Collector
from phaul_engine.skeleton import Skeleton
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.skeletons import adopting, copy, fill_tree, kill_tree, reap, remake_tree

_HEAD = """
import ctypes, fcntl, json, mmap, os, select, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
handled = []
signal.signal(signal.SIGCHLD, lambda *args: handled.append("SIGCHLD"))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
def own():
    return {"pid": os.getpid(), "ppid": os.getppid(), "pgid": os.getpgrp(), "sid": os.getsid(0)}
def serve(sock):
    "Tell what is asked: each word is a function."
    while True:
        word = sock.recv(100)
        if word == b"end":
            os._exit(3)
        sock.send(json.dumps(globals()[word.decode()]()).encode())
def child(setup=lambda: None, then=lambda sock: serve(sock)):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ours.close()
        setup()
        theirs.send(b"ready")
        then(theirs)
        os._exit(0)
    theirs.close()
    assert ours.recv(100) == b"ready"
    return pid, ours
def ask(sock, word):
    sock.send(word)
    return json.loads(sock.recv(65536))
def ready():
    handled.clear()
    os.write(1, b"ready\\n")
    signal.sigwait([signal.SIGUSR1])
def change():
    os.write(1, b"ready\\n")
    signal.sigwait([signal.SIGUSR2])
def changed():
    handled.clear()
    os.write(1, b"changed\\n")
    signal.sigwait([signal.SIGUSR1])
def passed():
    os.write(1, b"passed\\n")
    signal.sigwait([signal.SIGUSR1])
"""


class Subject:
    """A program that says "ready", is made again, is told so by SIGUSR1, and says "passed" or why not."""

    def __init__(self, path: Path, text: str, *, session: bool = True) -> None:
        (path / "program.py").write_text(_HEAD + text)
        self.path = path
        with (path / "out").open("wb") as out, (path / "errors").open("wb") as errors:
            self.program = subprocess.Popen(
                [sys.executable, path / "program.py", path],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=session,
            )
        self.root = self.program.pid

    def wait_for(self, word: str, seconds: float = 10) -> None:
        """Until it has said something."""
        deadline = time.monotonic() + seconds
        while word not in (self.path / "out").read_text().split():
            errors = (self.path / "errors").read_text()
            assert not errors
            assert time.monotonic() < deadline, f"it does not say {word!r}"
            time.sleep(0.01)

    def carry(self) -> None:
        """Collect the tree, end it, make it again, and let it say whether it is well."""
        self.wait_for("ready")
        with Tracer() as tracer, Collector() as collector, stop_tree(tracer, self.root, timeout_ms=1000) as tree:
            memory = copy(tree, collector)
            kill_tree(tree)
        remake_tree(memory)
        os.kill(self.root, signal.SIGUSR1)
        self.wait_for("passed")

    def carry_changed(self) -> None:
        """The same, but what is made first is the tree as it was before SIGUSR2 had it change itself."""
        self.wait_for("ready")
        with Tracer() as tracer, Collector() as collector:
            with stop_tree(tracer, self.root, timeout_ms=1000) as tree:
                early = copy(tree, collector)
            os.kill(self.root, signal.SIGUSR2)
            self.wait_for("changed")
            with stop_tree(tracer, self.root, timeout_ms=1000) as tree:
                final = copy(tree, collector)
                kill_tree(tree)
        with Tracer() as tracer, Skeleton(tracer, early.checkpoint) as skeleton:
            skeleton.build()
            fill_tree(skeleton, early)
            skeleton.protect()
            skeleton.update(final.checkpoint)
            assert skeleton.pids().keys() == final.private.keys()
            fill_tree(skeleton, final)
            skeleton.finish(final.checkpoint)
            skeleton.release()
        os.kill(self.root, signal.SIGUSR1)
        self.wait_for("passed")

    def end(self) -> None:
        """Kill all of it."""
        with contextlib.suppress(Exception), Tracer() as tracer:
            kill_tree(stop_tree(tracer, self.root, timeout_ms=1000))
        self.program.poll()
        reap([self.root])


@contextlib.contextmanager
def subject(path: Path, text: str, *, session: bool = True) -> Iterator[Subject]:
    """One that is ended at last."""
    with adopting():
        made = Subject(path, text, session=session)
        try:
            yield made
        finally:
            made.end()


_FAMILY = """
def lead():
    os.setsid()
    global below, sibling
    below, sibling = child(), child(lambda: os.setpgid(0, 0))
def early_then_lead():
    global before, after
    before = child()
    os.setsid()
    after = child()
def with_threads():
    global threads
    threads = []
    def run():
        threads.append(threading.get_native_id())
        threading.Event().wait()
    for _ in range(3):
        threading.Thread(target=run, daemon=True).start()
    while len(threads) < 3: time.sleep(0.01)
def family():
    found = own()
    found["below"] = [ask(one[1], b"own") for one in
                      [globals()[name] for name in ("below", "sibling", "before", "after") if name in globals()]]
    return found
def tasks():
    return sorted(map(int, os.listdir("/proc/self/task"))), sorted([os.getpid(), *threads])
one, two, three = child(lead), child(early_then_lead), child(with_threads)
def look():
    return [own(), ask(one[1], b"family"), ask(two[1], b"family"), ask(three[1], b"family")]
seen = look()
ready()
assert look() == seen, (look(), seen)
listed, known = ask(three[1], b"tasks")
assert listed == known
three[1].send(b"end")
assert os.waitpid(three[0], 0) == (three[0], 3 << 8)
while "SIGCHLD" not in handled: time.sleep(0.01)
assert handled == ["SIGCHLD"], handled
passed()
"""

_DEAD_LEADERS = """
def group_leader():
    os.setpgid(0, 0)
first = child(group_leader)
second = child(lambda: os.setpgid(0, first[0]))
first[1].send(b"end")
os.waitpid(first[0], 0)
libc.prctl(36, 1, 0, 0, 0)
orphan = []
def session_leader():
    os.setsid()
    pid, sock = child(lambda: os.setpgid(0, 0))
    os.close(os.dup2(sock.fileno(), 100))
reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
pid = os.fork()
if pid == 0:
    os.setsid()
    for _ in range(2):
        if os.fork() == 0:
            writer.send(json.dumps(own()).encode())
            signal.pause()
    time.sleep(0.2)
    os._exit(0)
found = [json.loads(reader.recv(1000))["pid"] for _ in range(2)]
os.waitpid(pid, 0)
def look():
    where = [open(f"/proc/{one}/stat").read().rpartition(")")[2].split()[1:4] for one in found]
    return [own(), ask(second[1], b"own"), where]
seen = look()
assert seen[2] == [[str(os.getpid()), str(pid), str(pid)]] * 2, seen
ready()
assert look() == seen, (look(), seen)
assert handled == [], handled
for one in found:
    os.kill(one, 9)
    assert os.waitpid(one, 0) == (one, 9)
second[1].send(b"end")
assert os.waitpid(second[0], 0) == (second[0], 3 << 8)
try:
    assert os.wait() is None
except ChildProcessError:
    pass
passed()
"""

_ZOMBIES = """
expected = {}
for how in (0, 1, 42, 255, -9, -15, -6, -11, -34):
    pid = os.fork()
    if pid == 0:
        libc.prctl(4, 0, 0, 0, 0)
        if how >= 0:
            os._exit(how)
        signal.signal(-how, signal.SIG_DFL) if how != -9 else None
        os.kill(os.getpid(), -how)
    expected[pid] = how << 8 if how >= 0 else -how
for pid in expected:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
time.sleep(0.05)
ready()
assert handled == [], handled
for pid, status in reversed(expected.items()):
    assert os.waitpid(pid, 0) == (pid, status), (pid, status)
passed()
"""

_CONNECTED = """
reader, writer = os.pipe()
left, right = socket.socketpair()
log = os.open(sys.argv[1] + "/log", os.O_RDWR | os.O_CREAT)
shared = mmap.mmap(-1, 1 << 16)
def both():
    os.lseek(log, 10, os.SEEK_CUR)
    shared[100:105] = b"child"
    return [os.read(reader, 5).decode(), right.recv(5).decode(), os.lseek(log, 0, os.SEEK_CUR)]
def inherited():
    return sorted(map(int, os.listdir("/proc/self/fd")))
other = child(lambda: os.close(writer))
os.write(writer, b"parts of a pipe")
left.send(b"parts of a stream")
shared[0:6] = b"before"
os.lseek(log, 5, os.SEEK_SET)
seen = ask(other[1], b"inherited")
ready()
assert shared[0:6] == b"before"
assert ask(other[1], b"inherited") == seen
assert ask(other[1], b"both") == ["parts", "parts", 15]
assert os.lseek(log, 0, os.SEEK_CUR) == 15
assert shared[100:105] == b"child"
assert os.read(reader, 100) == b" of a pipe"
left.close()
assert os.read(other[1].fileno(), 0) == b""
other[1].send(b"end")
assert os.waitpid(other[0], 0) == (other[0], 3 << 8)
passed()
"""

_SHARED_TABLES = """
kept = []
def share(flags):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept.append(theirs)
    pid = libc.syscall(56, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        theirs.send(b"ready")
        serve(theirs)
    assert ours.recv(100) == b"ready"
    return pid, ours
def opened():
    return os.open("/proc/self/status", os.O_RDONLY)
def moved():
    os.chdir("/usr")
    os.umask(0o31)
def here():
    os.chdir("/")
    os.umask(0o22)
both, files, fs = share(0x600), share(0x400), share(0x200)
def check():
    for one, shares in ((both, True), (files, True), (fs, False)):
        number = ask(one[1], b"opened")
        assert os.path.exists(f"/proc/self/fd/{number}") == shares, (one, number)
        if shares:
            os.close(number)
    for one, shares in ((both, True), (files, False), (fs, True)):
        here()
        ask(one[1], b"moved")
        assert (os.getcwd() == "/usr") == shares, one
        assert (os.umask(0) == 0o31) == shares, one
check()
ready()
check()
passed()
"""

_DAEMON = """
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
seen = own()
assert seen["pid"] != seen["sid"]
seen.pop("ppid")
open(sys.argv[1] + "/pid", "w").write(str(os.getpid()))
ready()
assert own().items() >= seen.items(), (own(), seen)
passed()
"""

_CHANGING = """
def tasks():
    return sorted(map(int, os.listdir("/proc/self/task"))), sorted([os.getpid(), *threads])
threads = []
def run(until):
    threads.append(threading.get_native_id())
    until.wait()
    threads.remove(threading.get_native_id())
def grow():
    global more
    more = child()
    return more[0]
def start(until, count):
    some = [threading.Thread(target=run, args=(until,), daemon=True) for _ in range(count)]
    for one in some: one.start()
    return some
def lead():
    os.setsid()
    return grow()
def execute():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.set_inheritable(theirs.fileno(), True)
    program = "import json, os, socket, sys; sock = socket.socket(fileno=int(sys.argv[1])); sock.send(b'ready')"
    program += chr(10) + "while sock.recv(10): sock.send(json.dumps([os.getpid(), sys.argv[2]]).encode())"
    pid = os.fork()
    if pid == 0:
        theirs.send(b"forked")
        signal.sigwait([signal.SIGUSR2])
        os.execv(sys.executable, [sys.executable, "-c", program, str(theirs.fileno()), "again"])
    theirs.close()
    assert ours.recv(100) == b"forked"
    return pid, ours
short, long, leaver, parent, leader = threading.Event(), threading.Event(), child(), child(), child()
executed = execute()
some, others = start(short, 3), start(long, 2)
change()
short.set()
for one in some: one.join()
start(long, 4)
leaver[1].send(b"end")
os.waitpid(leaver[0], 0)
dead = child()
dead[1].send(b"end")
os.waitid(os.P_PID, dead[0], os.WEXITED | os.WNOWAIT)
grandchild = ask(parent[1], b"grow")
below = ask(leader[1], b"lead")
new = child(lambda: os.setpgid(0, 0))
os.kill(executed[0], signal.SIGUSR2)
assert executed[1].recv(100) == b"ready"
def look():
    executed[1].send(b"?")
    with open(f"/proc/{grandchild}/stat") as first, open(f"/proc/{below}/stat") as second:
        stats = [one.read().rpartition(")")[2].split()[1:4] for one in (first, second)]
    return [own(), ask(parent[1], b"own"), ask(leader[1], b"own"), ask(new[1], b"own"), stats,
            json.loads(executed[1].recv(1000)), os.readlink(f"/proc/{executed[0]}/exe"), tasks()]
while len(threads) < 6: time.sleep(0.01)
seen = look()
assert seen[2]["sid"] == leader[0]
assert seen[4] == [[str(parent[0]), str(os.getpgrp()), str(os.getpid())], [str(leader[0])] * 3], seen
assert seen[5] == [executed[0], "again"]
assert len(seen[7][0]) == 7 and seen[7][0] == seen[7][1], seen[7]
time.sleep(0.05)
changed()
assert look() == seen, (look(), seen)
assert handled == [], handled
assert os.waitpid(dead[0], 0) == (dead[0], 3 << 8)
new[1].send(b"end")
assert os.waitpid(new[0], 0) == (new[0], 3 << 8)
long.set()
while threads: time.sleep(0.01)
passed()
"""

_EXECUTING_ROOT = """
before = sys.argv[2:]
if not before:
    pid, sock = child(then=lambda sock: signal.pause())
    change()
    os.execv(sys.executable, [sys.executable, sys.argv[0], sys.argv[1], str(os.getpid()), str(pid)])
assert int(before[0]) == os.getpid()
heap = [bytes([number % 256]) * 5000 for number in range(1000)]
changed()
assert all(heap[number] == bytes([number % 256]) * 5000 for number in range(1000))
os.kill(int(before[1]), 9)
assert os.waitpid(int(before[1]), 0) == (int(before[1]), 9)
passed()
"""


@pytest.mark.parametrize("text", [pytest.param(_CHANGING, id="tasks"), pytest.param(_EXECUTING_ROOT, id="execve")])
def test_a_skeleton_follows_what_changes(text: str, tmp_path: Path) -> None:
    with subject(tmp_path, text) as made:
        made.carry_changed()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(_FAMILY, id="children, sessions, groups, threads"),
        pytest.param(_DEAD_LEADERS, id="dead leaders of a group and a session"),
        pytest.param(_ZOMBIES, id="zombies"),
        pytest.param(_CONNECTED, id="pipes, sockets and memory between processes"),
        pytest.param(_SHARED_TABLES, id="shared tables"),
    ],
)
def test_a_tree_finds_itself_as_it_was(text: str, tmp_path: Path) -> None:
    with subject(tmp_path, text) as made:
        made.carry()


def test_a_daemon_keeps_its_dead_session_leader(tmp_path: Path) -> None:
    with subject(tmp_path, _DAEMON) as made:
        made.wait_for("ready")
        made.program.wait()
        made.root = int((tmp_path / "pid").read_text())
        reap([os.getsid(made.root)])
        made.carry()

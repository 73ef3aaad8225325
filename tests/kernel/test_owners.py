"""Who stands behind a descriptor: makers of sockets, receivers of signals, holders of leases, watched processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from phaul_engine.collect import Collector
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.test_tree import subject

_MAKERS = """
def cred(sock):
    return struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
def by_user(act):
    os.setegid(77); os.seteuid(1234)
    try:
        return act()
    finally:
        os.seteuid(0); os.setegid(0)
passage = socket.socketpair()
def make_and(end):
    def run(sock):
        pair = by_user(socket.socketpair)
        socket.send_fds(passage[1], [b"x"], [one.fileno() for one in pair])
        end(sock)
    return run
pairs = [socket.socketpair(), by_user(socket.socketpair)]
makers = []
for end in (serve, lambda sock: os._exit(0)):
    makers.append(child(then=make_and(end)))
    pairs.append([socket.socket(fileno=fd) for fd in socket.recv_fds(passage[0], 1, 2)[1]])
os.waitpid(makers[1][0], 0)
listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
listener.bind(f"{sys.argv[1]}/socket")
by_user(listener.listen)
os.chmod(f"{sys.argv[1]}/socket", 0o777)
os.chmod(sys.argv[1], 0o711)
os.chdir(sys.argv[1])
by_user(lambda: client.connect("socket"))
server, _ = listener.accept()
before = [[cred(one) for one in pair] for pair in pairs]
me, maker = os.getpid(), makers[0][0]
assert before[:3] == [[(me, 0, 0)] * 2, [(me, 1234, 77)] * 2, [(maker, 1234, 77)] * 2], before
assert cred(server) == (me, 1234, 77), cred(server)
ready()
after = [[cred(one) for one in pair] for pair in pairs]
assert after[:3] == before[:3], after
assert [one[1:] for one in after[3]] == [(1234, 77)] * 2, after  # its maker is no more
assert cred(server) == (me, 1234, 77), cred(server)
assert cred(listener)[1:] == (1234, 77), cred(listener)
assert os.geteuid() == os.getegid() == 0
passed()
"""

_RECEIVERS = """
got = []
for number in (signal.SIGIO, signal.SIGURG, signal.SIGRTMIN + 3):
    signal.signal(number, lambda number, frame: got.append(number))
to_us, to_thread, leased = socket.socketpair(), socket.socketpair(), os.open(f"{sys.argv[1]}/leased", os.O_RDONLY)
def ask_for(fd, owner, number):
    fcntl.fcntl(fd, 10, number)  # F_SETSIG
    fcntl.fcntl(fd, 15, struct.pack("ii", *owner))  # F_SETOWN_EX
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
ask_for(to_us[0].fileno(), (1, os.getpid()), signal.SIGURG)
ask_for(to_thread[0].fileno(), (0, threading.get_native_id()), signal.SIGRTMIN + 3)
fcntl.fcntl(leased, 1024, fcntl.F_RDLCK)  # F_SETLEASE
watched, sock = child()
pidfd = os.pidfd_open(watched)
ready()
to_us[1].send(b"x")
while signal.SIGURG not in got: time.sleep(0.01)
to_thread[1].send(b"x")
while signal.SIGRTMIN + 3 not in got: time.sleep(0.01)
assert fcntl.fcntl(leased, 1025) == fcntl.F_RDLCK
if os.fork() == 0:
    try:
        os.open(f"{sys.argv[1]}/leased", os.O_WRONLY | os.O_NONBLOCK)
    except BlockingIOError:
        os._exit(0)
    os._exit(1)
while signal.SIGIO not in got: time.sleep(0.01)  # the lease is to be given up
assert os.wait()[1] == 0
assert select.select([pidfd], [], [], 0)[0] == []
signal.pidfd_send_signal(pidfd, signal.SIGKILL)
assert os.waitid(os.P_PIDFD, pidfd, os.WEXITED).si_pid == watched
passed()
"""

_NAMED = """
import ctypes, fcntl, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
what = sys.argv[1]
if what == "fanotify":
    fd = libc.fanotify_init(0, os.O_RDONLY)
elif what == "dnotify":
    fd = os.open(sys.argv[2], os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_NOTIFY, fcntl.DN_CREATE | fcntl.DN_MULTISHOT)
    except OSError:
        fd = -1
elif what == "pidfd":
    fd = os.pidfd_open(int(sys.argv[2]))
print(fd, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("text", [_MAKERS, _RECEIVERS], ids=["makers-of-sockets", "receivers-of-signals"])
def test_who_stands_behind_a_descriptor(tmp_path: Path, text: str) -> None:
    (tmp_path / "leased").write_bytes(b"")
    with subject(tmp_path, text) as made:
        made.carry()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("fanotify", "a fanotify group"),
        ("dnotify", "a directory with a receiver of signals"),
        ("pidfd", "a pid descriptor of process"),
    ],
)
def test_what_cannot_be_carried_is_named(tmp_path: Path, what: str, words: str) -> None:
    outsider = subprocess.Popen(["sleep", "100"])
    argument = outsider.pid if what == "pidfd" else tmp_path
    program = subprocess.Popen(
        [sys.executable, "-c", _NAMED, what, str(argument)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert program.stdout is not None
        fd = int(program.stdout.readline())
        if fd < 0:
            pytest.skip(f"this kernel has no {what}")
        with Tracer() as tracer, Collector() as collector, stop_tree(tracer, program.pid, timeout_ms=2000) as tree:
            blockers = [str(one) for one in collector.collect(tree, survey=True).blockers]
        assert any(one.startswith(f"fd {fd} of pid {program.pid}") and words in one for one in blockers), blockers
    finally:
        for process in (program, outsider):
            process.kill()
            process.wait()

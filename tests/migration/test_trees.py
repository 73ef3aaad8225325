"""Trees of processes in states that make them hard to catch: restless, crowded, stopped, orphaned, dead."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from subprocess import CalledProcessError

import pytest

from tests.hosts import Host
from tests.migration.conftest import Mover
from tests.subjects import jobs
from tests.subjects.jobs import Job
from tests.subjects.programs import wait_until

PATIENT = ["--max-downtime", "5000"]
"""What is tested is what arrives, on a machine that may be busy."""
_HEAD = """
import ctypes, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def tell(count, verdict="ok"):
    with open("/srv/shared/tree.new", "w") as file:
        file.write(f"{count} {verdict}")
    os.rename("/srv/shared/tree.new", "/srv/shared/tree.status")
def stat(pid):
    "State, parent, group and session."
    with open(f"/proc/{pid}/stat") as file:
        state, *numbers = file.read().rpartition(")")[2].split()[:4]
    return state, *map(int, numbers)
"""
FORK = """
def fork(count, depth):
    pid = os.fork()
    if pid == 0:
        if depth:
            fork(count, depth - 1)
        os._exit(count % 100)
    waited, status = os.waitpid(pid, 0)
    if (waited, status) != (pid, count % 100 << 8):
        tell(count, f"wrong: {waited} for {pid}, status {status}")
        os._exit(1)
"""
FORKER = (
    FORK
    + """
count = 0
while True:
    count += 1
    fork(count, 2)
    tell(count)
"""
)
LOOK = (
    FORK
    + """
def map_root():
    for name, text in (("setgroups", "deny"), ("gid_map", "0 0 1"), ("uid_map", "0 0 1")):
        open("/proc/self/" + name, "w").write(text)
def watch():
    before, count = look(), 0
    while True:
        count += 1
        fork(count, 1)
        thread = threading.Thread(target=time.sleep, args=(0.01,))
        thread.start()
        thread.join()
        now = look()
        tell(count, "ok" if now == before else f"wrong: {now} after {before}")
"""
)
SANDBOX = (
    LOOK
    + """
def sandbox():
    assert libc.unshare(0x10000000) == 0  # CLONE_NEWUSER
    map_root()
    threading.Thread(target=signal.pause, daemon=True).start()
    watch()
def look():
    names = ("uid_map", "gid_map", "setgroups")
    capabilities = [line for line in open("/proc/self/status") if line.startswith("Cap")]
    return [open("/proc/self/" + name).read() for name in names], capabilities, os.getresuid(), os.getresgid()
if os.fork() == 0:
    sandbox()
while True:
    signal.pause()
"""
)
NUMBERS = (
    LOOK
    + """
def look():
    return os.getpid(), os.getppid(), os.readlink("/proc/self"), open("/proc/1/comm").read()
def nest(flags):
    assert libc.unshare(flags) == 0
    if flags & 0x10000000:  # CLONE_NEWUSER
        map_root()
    if os.fork() == 0:
        assert os.getpid() == 1
        assert libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None) == 0  # MS_REC | MS_PRIVATE
        assert libc.mount(b"proc", b"/proc", b"proc", 0, None) == 0
        return
    while True:
        signal.pause()
if os.fork() == 0:
    nest(0x20020000 | int(sys.argv[1], 16))  # CLONE_NEWPID | CLONE_NEWNS
    nest(0x20020000)
    watch()
while True:
    signal.pause()
"""
)
IN_BUBBLEWRAP = """
def look():
    files = [open("/proc/self/" + name).read() for name in ("uid_map", "gid_map", "cgroup")]
    mounts = sorted(line.split()[4] for line in open("/proc/self/mountinfo"))
    return os.getpid(), os.getppid(), os.getresuid(), sorted(os.listdir("/dev")), files, mounts, os.listdir("/tmp")
open("/tmp/file", "w").write("text")
before, count = look(), 0
while True:
    count += 1
    fork(count, 1)
    time.sleep(0.02)
    now = look()
    tell(count, "ok" if now == before else f"wrong: {now} after {before}")
"""
BUBBLEWRAP = (
    *("bwrap", "--unshare-all", "--ro-bind", "/", "/", "--bind", "/srv", "/srv"),
    *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
)
EXECUTER = """
count = int(sys.argv[1]) + 1
assert os.environ["STEPS"] == str(count - 1)
tell(count)
held = bytearray(os.urandom(1 << 20))
time.sleep(0.03)
os.environ["STEPS"] = str(count)
os.execv(sys.executable, [sys.executable, "-c", open("/srv/shared/tree.py").read(), str(count)])
"""
THREADS = """
counts, together = [0] * 200, threading.Barrier(201)
def run(index):
    while True:
        counts[index] += 1
        together.wait()
for index in range(len(counts)):
    threading.Thread(target=run, args=(index,), daemon=True).start()
count = 0
while True:
    together.wait()
    count += 1
    time.sleep(0.02)
    wrong = [n for n in counts if n not in (count, count + 1)]
    tell(count, f"wrong: {wrong}" if wrong or threading.active_count() != 201 else "ok")
"""
FAMILY = """
assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
def child(run):
    pid = os.fork()
    if pid == 0:
        run()
        while True: signal.pause()
    return pid
def session_of_its_own():
    os.setsid()
    job = child(lambda: os.setpgid(0, 0))
    open("/srv/shared/tree.job", "w").write(str(job))
    time.sleep(0.3)
    os.kill(job, signal.SIGTSTP if sys.argv[1] == "tstp" else signal.SIGSTOP)
def parent_of_an_orphan():
    pid = child(lambda: None)
    open("/srv/shared/tree.orphan", "w").write(str(pid))
    os._exit(0)
def member_of(group):
    return lambda: os.setpgid(0, group)
def number(name):
    while True:
        try:
            return int(open(f"/srv/shared/tree.{name}").read())
        except (OSError, ValueError):
            time.sleep(0.01)
leader = child(session_of_its_own)
job = number("job")
middle = child(parent_of_an_orphan)
assert os.waitpid(middle, 0) == (middle, 0)
orphan = number("orphan")
group = child(lambda: os.setpgid(0, 0))
time.sleep(0.1)
rest = child(member_of(group))
time.sleep(0.1)
os.kill(group, signal.SIGKILL)
assert os.waitpid(group, 0) == (group, signal.SIGKILL)
zombie = child(lambda: os._exit(7))
stopped = child(lambda: os.kill(os.getpid(), signal.SIGSTOP))
me, session = os.getpid(), os.getsid(0)
expected = {
    leader: ("S", me, leader, leader), job: ("T", leader, job, leader), orphan: ("S", me, os.getpgid(0), session),
    rest: ("S", me, group, session), zombie: ("Z", me, os.getpgid(0), session),
    stopped: ("T", me, os.getpgid(0), session)}
while any(stat(pid) != wanted for pid, wanted in expected.items()): time.sleep(0.01)
asked = []
signal.signal(signal.SIGUSR1, lambda *args: asked.append(True))
count = 0
while not asked:
    count += 1
    found = {pid: stat(pid) for pid in expected}
    tell(count, "ok" if found == expected else f"wrong: {found} in place of {expected}")
    time.sleep(0.02)
problems = []
if os.waitpid(stopped, os.WUNTRACED) != (stopped, signal.SIGSTOP << 8 | 0x7f):
    problems.append("the stop of the child is not told")
if os.waitpid(zombie, 0) != (zombie, 7 << 8):
    problems.append("the end of the child is not told")
os.kill(stopped, signal.SIGCONT)
if os.waitpid(stopped, os.WCONTINUED) != (stopped, 0xffff):
    problems.append("the stopped child does not go on")
os.killpg(group, signal.SIGTERM)
if os.waitpid(rest, 0) != (rest, signal.SIGTERM):
    problems.append("the group without leader is not there")
os.kill(job, signal.SIGCONT)
while stat(job)[0] == "T": time.sleep(0.01)
for pid in (stopped, orphan, leader, job):
    os.kill(pid, signal.SIGKILL)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
while True:
    count += 1
    tell(count, "; ".join(problems) or "ok")
    time.sleep(0.02)
"""


@contextmanager
def running(host: Host, text: str, *args: str, around: Sequence[str] = ()) -> Iterator[Job]:
    """The program on a host; all of it is ended in the end, wherever it is. `around` is a command that starts it."""
    for name in ("job", "orphan", "status"):
        host.path(f"/srv/shared/tree.{name}").unlink(missing_ok=True)
    host.path("/srv/shared/tree.py").write_text(_HEAD + text)
    words = [*around, "/usr/bin/env", "STEPS=0", "/usr/bin/python3", "-c", _HEAD + text, *args]
    yield jobs.start(host, "tree", words)


def end(host: Host, pid: int) -> None:
    """Kill a tree, the root first, so that nobody starts anything any more."""
    found = [pid]
    for one in found:
        _signal(host, one, signal.SIGSTOP)
        with suppress(OSError):  # it has ended
            for thread in host.path(f"/proc/{one}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    for one in found:
        _signal(host, one, signal.SIGKILL)


def _signal(host: Host, pid: int, number: int) -> None:
    """Which may have ended."""
    with suppress(CalledProcessError):
        host.kill(pid, number)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        pytest.param(FORKER, (), id="forks-constantly"),
        pytest.param(EXECUTER, ("0",), id="executes-itself"),
        pytest.param(THREADS, (), id="200-threads"),
        pytest.param(SANDBOX, (), id="forks-in-a-user-namespace"),
        pytest.param(NUMBERS, ("0",), id="forks-in-pid-namespaces"),
        pytest.param(NUMBERS, ("10000000",), id="forks-in-pid-namespaces-of-a-user-namespace"),
    ],
)
def test_a_restless_tree(mover: Mover, text: str, options: tuple[str, ...]) -> None:
    hosts = mover.hosts
    with running(hosts.a, text, *options) as job:
        migration = mover.try_to_move(job.pid, hosts.a, PATIENT)
        where = hosts.b if migration.outcome == "migrated" else hosts.a
        try:
            assert migration.outcome == "migrated", str(migration)
            job.goes_on()
        finally:
            end(where, job.pid)


_USER = ["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]


@pytest.mark.parametrize("user", [[], _USER], ids=["root", "user"])
def test_a_sandbox_of_bubblewrap(mover: Mover, user: list[str]) -> None:
    """An ordinary user's has two user namespaces: nobody is in the outer one, which the others belong to."""
    where = mover.hosts.a
    where.path("/srv/shared").chmod(0o777)
    with running(where, FORK + IN_BUBBLEWRAP, around=[*user, *BUBBLEWRAP]) as job:
        try:
            for _ in range(2):
                migration = mover.try_to_move(job.pid, where, PATIENT)
                assert migration.outcome == "migrated", str(migration)
                job.host = where = mover.hosts.other(where)
                job.goes_on()
        finally:
            end(where, job.pid)


@pytest.mark.parametrize("how", ["stop", "tstp"])
def test_a_family_with_stopped_dead_and_orphaned_members(mover: Mover, how: str) -> None:
    hosts = mover.hosts
    with running(hosts.a, FAMILY, how) as job:
        migration = mover.try_to_move(job.pid, hosts.a, PATIENT)
        where = hosts.b if migration.outcome == "migrated" else hosts.a
        try:
            assert migration.outcome == "migrated", str(migration)
            job.goes_on()
            where.kill(job.pid, signal.SIGUSR1)
            job.goes_on()
            wait_until(lambda: not where.path(f"/proc/{job.pid}/task/{job.pid}/children").read_text(), "all have ended")
            job.goes_on()
        finally:
            end(where, job.pid)


def test_a_traced_process_is_refused(mover: Mover) -> None:
    """By name of its tracer, without being touched."""
    hosts = mover.hosts
    tracer = """
libc.ptrace(0x4206, int(sys.argv[1]), 0, 0)  # PTRACE_SEIZE
libc.ptrace(0x4207, int(sys.argv[1]), 0, 0)  # PTRACE_INTERRUPT
os.write(1, b"seized")
time.sleep(1000)
"""
    counter = "count = 0\nwhile True:\n    count += 1\n    tell(count)\n    time.sleep(0.01)\n"
    before = hosts.a.processes()
    with running(hosts.a, counter) as job:
        words = ["python3", "-c", _HEAD + "libc.ptrace.argtypes = [ctypes.c_long] * 4\n" + tracer, str(job.pid)]
        with hosts.a.popen(words, stdout="/srv/shared/tracer.out") as process:
            wait_until(lambda: hosts.a.path("/srv/shared/tracer.out").read_text() == "seized", "it is traced")
            migration = mover.try_to_move(job.pid, hosts.a, PATIENT)
            assert migration.outcome == "refused", str(migration)
            assert f"is traced by pid {process.pid} (python3)" in migration.reason
            process.kill()
        job.goes_on()
        end(hosts.a, job.pid)
    wait_until(lambda: hosts.a.processes() == before, "the agents have ended")

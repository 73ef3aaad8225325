"""A program with much task state is killed and made again, and finds everything as it was."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.kernel.skeletons import remake, take

_SUBJECT = r"""
import ctypes, json, os, re, resource, signal, struct, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def ok(result):
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result
def prctl(*args):
    return libc.prctl(*args, *(0,) * (5 - len(args)))
def pointed(option):
    room = ctypes.c_long(0)
    ok(libc.prctl(option, ctypes.byref(room), 0, 0, 0))
    return room.value
handled = []
PENDING = (signal.SIGRTMIN + 2, signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR2)
STACK = ctypes.create_string_buffer(1 << 16)
def own():
    names = ("Name", "Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd", "Cap",
             "NoNewPrivs", "Seccomp", "Cpus_allowed:")
    lines = open("/proc/thread-self/status").read().splitlines()
    stack = ctypes.create_string_buffer(24)
    ok(libc.syscall(131, None, stack))
    room = ctypes.create_string_buffer(56)
    ok(libc.syscall(315, 0, room, 56, 0))
    robust, size = ctypes.c_long(), ctypes.c_long()
    ok(libc.syscall(274, 0, ctypes.byref(robust), ctypes.byref(size)))
    ctypes.set_errno(0)
    return {"status": [line for line in lines if line.startswith(names)], "stack": stack.raw.hex(),
            "scheduling": room.raw.hex(), "ioprio": libc.syscall(252, 1, 0), "slack": prctl(30),
            "robust": (robust.value, size.value), "tid address": pointed(40), "death signal": pointed(2),
            "personality": libc.personality(0xffffffff), "tid": threading.get_native_id(),
            "getppid": (libc.syscall(110), ctypes.get_errno())}
def actions():
    found = []
    for number in range(1, 65):
        room = ctypes.create_string_buffer(32)
        libc.syscall(13, number, None, room, 8)
        found.append(room.raw.hex())
    return found
def timers():
    text = open("/proc/self/timers").read()
    left = {}
    for number in re.findall("^ID: (\\d+)", text, re.M):
        room = ctypes.create_string_buffer(32)
        ok(libc.syscall(224, int(number), room))
        isec, insec, vsec, vnsec = struct.unpack("<4q", room.raw)
        left[number] = (isec, insec, vsec > 0 or vnsec > 0)
    return sorted(text.split("ID: ")), left, [(left > 0, period) for left, period in map(signal.getitimer, range(3))]
def everything():
    return {"main": own(), "worker": asked(), "actions": actions(), "timers": timers(), "subreaper": pointed(37),
            "limits": [resource.getrlimit(n) for n in range(16)], "dumpable": prctl(3), "thp": prctl(42),
            "mdwe": prctl(66), "securebits": prctl(27), "membarrier": libc.syscall(324, 512, 0, 0),
            "files": [open("/proc/self/" + name).read() for name in ("oom_score_adj", "coredump_filter", "loginuid")],
            "ids": (os.getpid(), os.getsid(0), os.getpgrp())}
question, answer, answers = threading.Event(), threading.Event(), []
def asked():
    answer.clear()
    question.set()
    answer.wait()
    return answers.pop()
def worker():
    libc.prctl(15, b"worker", 0, 0, 0)
    ok(libc.syscall(131, struct.pack("<QI4xQ", ctypes.addressof(STACK), 0, 1 << 15), None))
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
    signal.pthread_kill(threading.get_ident(), signal.SIGRTMIN + 2)
    ok(libc.syscall(117, 3001, 3001, 3001))
    while True:
        question.wait()
        question.clear()
        answers.append(own())
        answer.set()
def timer(clock, notify, signo, value, period, tid=0):
    made = ctypes.c_int(-1)
    ok(libc.syscall(222, clock, struct.pack("<Qiii44x", 77, signo, notify, tid), ctypes.byref(made)))
    ok(libc.syscall(223, made, 0, struct.pack("<4q", period, 0, value, 0), None))
    return made.value
signal.pthread_sigmask(signal.SIG_BLOCK, PENDING)
os.umask(0o137)
open("/proc/self/oom_score_adj", "w").write("555")
open("/proc/self/coredump_filter", "w").write("0x7b")
ok(libc.syscall(324, 16, 0, 0))
ok(prctl(36, 1)); ok(prctl(41, 1))
signal.signal(signal.SIGUSR1, lambda *args: handled.append(args[0]))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
first = timer(1, 0, signal.SIGRTMIN + 3, 1000, 5)
ok(libc.syscall(226, timer(1, 1, 0, 1, 0)))
timer(7, 4, signal.SIGRTMIN + 3, 2000, 0, threading.get_native_id())
timer(-6, 1, 0, 3000, 6)
signal.setitimer(signal.ITIMER_VIRTUAL, 1000, 3)
signal.setitimer(signal.ITIMER_REAL, 0.001, 4000)
if os.fork() == 0:
    os._exit(9)
os.waitid(os.P_ALL, 0, os.WEXITED)
for value in (5, 4, 6):
    info = struct.pack("<iii4xIIQ", signal.SIGRTMIN + 2, 0, -1, os.getpid(), 0, value).ljust(128, b"\0")
    ok(libc.syscall(129, os.getpid(), signal.SIGRTMIN + 2, info))
threading.Thread(target=worker, daemon=True).start()
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.sched_setaffinity(0, {0})
os.setpriority(os.PRIO_PROCESS, 0, 3)
ok(libc.syscall(251, 1, 0, 2 << 13 | 6)); ok(prctl(29, 77777))
ok(prctl(8, 1))
ok(libc.syscall(116, 2, struct.pack("<II", 11, 22)))  # of this thread only
ok(libc.syscall(119, 1001, 1002, 1003)); ok(libc.syscall(117, 2001, 2002, 2003))
caps = (1 << 10, 1 << 10 | 1 << 13, 1 << 10)
ok(libc.syscall(126, struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *caps, 0, 0, 0)))
ok(prctl(47, 2, 10)); ok(prctl(1, signal.SIGUSR1)); ok(prctl(38, 1)); ok(prctl(4, 1))
filters = [(0x20, 0, 0, 0), (0x15, 0, 1, 110), (0x06, 0, 0, 0x50000 | 123), (0x06, 0, 0, 0x7fff0000)]
code = b"".join(struct.pack("<HBBI", *one) for one in filters)
room = ctypes.create_string_buffer(code)
ok(libc.syscall(317, 1, 0, struct.pack("<HxxxxxxQ", 4, ctypes.addressof(room))))
time.sleep(0.1)
before = everything()
os.write(1, b"ready\n")
signal.sigwait([signal.SIGUSR2])
after = everything()
os.kill(os.getpid(), signal.SIGUSR1)
waiting = []
while True:
    room = ctypes.create_string_buffer(128)
    mask = struct.pack("<Q", sum(1 << (number - 1) for number in PENDING))
    if libc.syscall(128, mask, room, struct.pack("<QQ", 0, 0), 8) < 0:
        break
    number, _, code = struct.unpack_from("<iii", room.raw)
    waiting.append((number, code, struct.unpack_from("<Q", room.raw, 24)[0] if number > 32 else 0))
os.write(1, json.dumps({"before": before, "after": after, "waiting": waiting, "handled": handled}).encode() + b"\n")
time.sleep(1000)
"""


def _wait_for_lines(path: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 20
    while path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, f"the subject says no more than {path.read_text()!r}"
        time.sleep(0.02)
    return path.read_text().splitlines()


def test_a_program_finds_its_task_state_as_it_was(tmp_path: Path) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors"
    with out.open("wb") as stdout, errors.open("wb") as stderr:
        command = [sys.executable, "-c", _SUBJECT]
        program = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True, cwd="/"
        )
    pid = program.pid
    try:
        _wait_for_lines(out, 1)
        checkpoint, pages = take(program)
        remake(pid, checkpoint, pages)
        os.kill(pid, signal.SIGUSR2)
        told: dict[str, Any] = json.loads(_wait_for_lines(out, 2)[1])
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert told["before"]["main"].pop("death signal") == signal.SIGUSR1
    assert told["after"]["main"].pop("death signal") == 0  # its parent has stayed behind
    for part, seen in told["before"].items():
        assert told["after"][part] == seen, part
    assert told["handled"] == [signal.SIGUSR1]
    realtime = [value for number, _, value in told["waiting"] if number > 32]
    assert realtime == [5, 4, 6]
    assert {number for number, _, _ in told["waiting"]} == {signal.SIGRTMIN + 2, signal.SIGCHLD, signal.SIGALRM}
    assert told["after"]["main"]["getppid"] == [-1, 123]
    assert errors.read_text() == ""


_STRICT = r"""
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main (void)
{
	if (prctl (PR_SET_SECCOMP, 1, 0, 0, 0) != 0)
		return 1;
	for (volatile unsigned long step = 0;; step++)
		if (step % 20000000 == 0 && syscall (SYS_write, 1, "x\n", 2) != 2)
			syscall (SYS_exit, 2);
}
"""


def test_a_program_in_strict_seccomp_mode_goes_on(tmp_path: Path) -> None:
    """It may read, write and end, and nothing else would it survive: what is injected must not count as its doing."""
    source, binary, out = tmp_path / "strict.c", tmp_path / "strict", tmp_path / "out"
    source.write_text(_STRICT)
    subprocess.run(["cc", "-O1", "-o", binary, source], check=True)
    with out.open("wb") as stdout:
        program = subprocess.Popen([binary], stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True)
    pid = program.pid
    try:
        _wait_for_lines(out, 2)
        checkpoint, pages = take(program)
        assert checkpoint.one("core", pid).thread_core.seccomp_mode == 1
        remake(pid, checkpoint, pages)
        _wait_for_lines(out, out.read_text().count("\n") + 3)
        assert "Seccomp:\t1\n" in Path(f"/proc/{pid}/status").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

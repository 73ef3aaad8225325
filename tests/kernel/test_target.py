"""Seizing, injecting and letting go of running programs that check themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.gadgets import find_gadgets
from phaul_engine.program import Program
from phaul_engine.syscalls import NR
from phaul_engine.target import Tracer, stop_tree

_SLEEPER = """
import ctypes, os, select, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
errors = []
def poller():
    epoll = select.epoll()
    buffer = ctypes.create_string_buffer(16)
    while True:
        if libc.epoll_wait(epoll.fileno(), buffer, 1, 300) < 0:
            errors.append(("epoll_wait", ctypes.get_errno()))
def sleeper():
    spec = (ctypes.c_long * 2)(0, 300_000_000)
    while True:
        if libc.nanosleep(spec, None) < 0:
            errors.append(("nanosleep", ctypes.get_errno()))
for target in (poller, sleeper):
    threading.Thread(target=target, daemon=True).start()
print("ready", flush=True)
sys.stdin.readline()
print(errors, flush=True)
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def _tracer_pid(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("TracerPid"))


def _verdict(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate("\n", timeout=10)
    return out.strip()


def test_injection_answers_and_leaves_no_trace(sleeper: subprocess.Popen[str]) -> None:
    with open(f"/proc/{sleeper.pid}/maps") as maps:
        before = maps.read()
    with Tracer() as tracer:
        for _ in range(20):
            with stop_tree(tracer, sleeper.pid, timeout_ms=1000) as tree:
                process = tree.processes[sleeper.pid]
                tree.read_states()
                areas = process.areas()
                programs, asked = {}, {}
                for thread in process.threads:
                    programs[thread.tid] = program = Program()
                    asked[thread.tid] = (program.call(NR.gettid), program.call(NR.getpid))
                with tree.interpreter(process, find_gadgets(process.pid, areas), areas) as interpreter:
                    results = interpreter.run(programs)
                    again = interpreter.run(programs)
                for tid, (own, group) in asked.items():
                    assert (results[tid].value(own), results[tid].value(group)) == (tid, sleeper.pid)
                    assert again[tid].value(own) == tid
            time.sleep(0.02)
        assert _tracer_pid(sleeper.pid) == 0
    with open(f"/proc/{sleeper.pid}/maps") as maps:
        assert maps.read() == before
    assert _verdict(sleeper) == "[]"


def test_a_failing_call_is_named(sleeper: subprocess.Popen[str]) -> None:
    with Tracer() as tracer, stop_tree(tracer, sleeper.pid, timeout_ms=1000) as tree:
        process = tree.processes[sleeper.pid]
        tree.read_states()
        areas = process.areas()
        program = Program()
        program.call(NR.getpid)
        program.call(NR.close, 99999, label="close of nothing")
        with tree.interpreter(process, find_gadgets(process.pid, areas), areas) as interpreter:
            with pytest.raises(Exception, match=r"close of nothing.*EBADF"):
                interpreter.run({process.pid: program})
    assert _verdict(sleeper) == "[]"


def test_a_stopped_program_stays_stopped(sleeper: subprocess.Popen[str]) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    time.sleep(0.05)
    with Tracer() as tracer, stop_tree(tracer, sleeper.pid, timeout_ms=1000) as tree:
        assert tree.processes[sleeper.pid].threads[0].stop_signal == signal.SIGSTOP
    time.sleep(0.05)
    with open(f"/proc/{sleeper.pid}/stat") as stat:
        assert stat.read().rsplit(")", 1)[1].split()[0] == "T"
    os.kill(sleeper.pid, signal.SIGCONT)
    # a stop by SIGSTOP does show as EINTR in epoll_wait (signal(7)); the kernel's, not ours
    assert _verdict(sleeper) in ("[]", "[('epoll_wait', 4)]")


@pytest.mark.parametrize("stage", ["injected", "running"])
def test_the_program_survives_its_tracer(sleeper: subprocess.Popen[str], stage: str) -> None:
    """A tracer killed while its interpreter sits in the program: the program goes on by itself."""
    child = os.fork()
    if child == 0:
        tracer = Tracer()
        tree = stop_tree(tracer, sleeper.pid, timeout_ms=1000)
        tree.read_states()
        process = tree.processes[sleeper.pid]
        areas = process.areas()
        with tree.interpreter(process, find_gadgets(process.pid, areas), areas) as interpreter:
            if stage == "running":
                program = Program()
                program.call(NR.getpid)
                interpreter.run({thread.tid: program for thread in process.threads})
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert _verdict(sleeper) == "[]"


_DEEP = r"""
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static volatile char *lowest;

static __attribute__ ((noinline)) void
touch (size_t size)
{
	volatile char room[size];

	for (size_t at = 0; at < size; at += 512)
		room[at] = 1;
	lowest = room;
}

static void *
idle (void *unused)
{
	for (;;)
		pause ();
	return unused;
}

/* Go down into the last `left` bytes of the stack's area, which is as large as the stack ever was. */
int
main (int argc, char **argv)
{
	volatile char frame[1 << 20];
	pthread_t thread;
	char byte;

	memset ((char *) frame, 7, sizeof (frame));
	if (argc > 2 && pthread_create (&thread, NULL, idle, NULL) != 0)
		return 1;
	touch (atoi (argv[1]));
	if (write (1, "ready\n", 6) != 6 || read (0, &byte, 1) != 0)
		return 2;
	for (size_t at = 0; at < sizeof (frame); at++)
		if (frame[at] != 7)
			return 3;
	return 0;
}
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that waits deep down in its stack."""
    directory = tmp_path_factory.mktemp("deep")
    (directory / "deep.c").write_text(_DEEP)
    command = [
        "cc",
        "-O1",
        "-fno-stack-protector",
        "-pthread",
        "-o",
        str(directory / "deep"),
        str(directory / "deep.c"),
    ]
    subprocess.run(command, check=True)
    return directory / "deep"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["16384"], id="right below the stack pointer"),
        pytest.param(["16", "thread"], id="with another thread's stack"),
    ],
)
def test_a_deep_stack_has_a_place_for_the_injection(deep: Path, arguments: list[str]) -> None:
    process = subprocess.Popen([deep, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with Tracer() as tracer, stop_tree(tracer, process.pid, timeout_ms=1000) as tree:
            tree.read_states()
            stopped = tree.processes[process.pid]
            areas = stopped.areas()
            stack = next(area for area in areas if area.path == "[stack]")
            assert stopped.driver.state.regs[19] - stack.start < 48 * 1024, "it is not deep in its stack"
            with tree.interpreter(stopped, find_gadgets(process.pid, areas), areas) as interpreter:
                program = Program()
                pid = program.ask(NR.getpid)
                assert interpreter.run({process.pid: program})[process.pid].answer(pid) == process.pid
        process.communicate("", timeout=10)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()

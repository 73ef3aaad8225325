"""Programs whose own code has no way in for an injection: without a C library, without a vDSO, with another library."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from phaul_engine.collect import Collector
from phaul_engine.proc.access import open_process
from phaul_engine.proc.maps import Area, read_maps
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.skeletons import private_pages, remake
from tests.subjects.programs import build, wait_until

_BARE = ("-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fcf-protection=none", "-fno-builtin")
_MUSL = r"""
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
static int step;
static void *count (void *unused) { for (;;) { __atomic_fetch_add (&step, 1, 5); usleep (1000); } return unused; }
int main (int argc, char **argv)
{
	pthread_t thread;
	int fd = open (argv[1], O_WRONLY | O_CREAT, 0644);
	if (pthread_create (&thread, 0, count, 0))
		return 2;
	for (;;) {
		char text[20];
		int size = sprintf (text, "%010d\n", step);
		if (pwrite (fd, text, size, 0) != size)
			return 3;
		usleep (5000);
	}
	return argc;
}
"""


def _areas(pid: int) -> list[Area]:
    proc = open_process(pid)
    try:
        return read_maps(proc)
    finally:
        os.close(proc)


def _code(pid: int) -> list[bytes]:
    """All executable memory."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        found = []
        for area in _areas(pid):
            if area.prot & 4 and area.path != "[vsyscall]":
                mem.seek(area.start)
                found.append(mem.read(area.size))
    return found


def _number(out: Path) -> int:
    return int(out.read_text() or 0)


def _counts(out: Path) -> None:
    before = _number(out)
    wait_until(lambda: _number(out) > before + 5, "the program counts")


def _moves(pid: int, out: Path) -> bool:
    """Survey it twice, collect it, end it and make it again; whether a way in had to be made."""
    with Tracer() as tracer:
        before = _code(pid)
        with Collector() as collector:
            for _ in range(2):
                with stop_tree(tracer, pid, timeout_ms=1000) as tree:
                    survey = collector.collect(tree, survey=True)
                    assert [str(one) for one in survey.blockers] == []
                _counts(out)
            with stop_tree(tracer, pid, timeout_ms=1000) as tree:
                collection = collector.collect(tree, survey=False)
                made = _code(pid) != before
                pages = private_pages(pid, collection.checkpoint)
            _counts(out)
        assert _code(pid) == before, "what was put there is gone again"
        with stop_tree(tracer, pid, timeout_ms=1000) as tree, Collector() as collector:
            collection = collector.collect(tree, survey=False)
            pages = private_pages(pid, collection.checkpoint)
            last = _number(out)
            os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    remake(pid, collection.checkpoint, pages)
    wait_until(lambda: _number(out) > last + 5, "the program goes on")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return made


def _start(*words: object) -> int:
    process = subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, start_new_session=True)
    process.returncode = 0  # it is waited for by number: it ends, and comes again
    return process.pid


@pytest.mark.parametrize("more", [[], ["unmap"]], ids=["with a vDSO", "without"])
def test_a_program_without_a_library_moves(more: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pid = _start(build("bare", *_BARE), out, *more)
    wait_until(lambda: out.exists() and _number(out) > 2, "the program begins")
    assert any(area.path == "[vdso]" for area in _areas(pid)) is not bool(more)
    assert _moves(pid, out)


@pytest.mark.skipif(not shutil.which("musl-gcc"), reason="needs musl-tools")
@pytest.mark.parametrize("how", [["-static"], []], ids=["static", "shared"])
def test_a_program_with_musl_moves(how: list[str], tmp_path: Path) -> None:
    (tmp_path / "musl.c").write_text(_MUSL)
    subprocess.run(["musl-gcc", "-O2", *how, "-o", tmp_path / "musl", tmp_path / "musl.c"], check=True)
    out = tmp_path / "out"
    pid = _start(tmp_path / "musl", out)
    wait_until(lambda: out.exists() and _number(out) > 2, "the program begins")
    _moves(pid, out)


def test_a_program_goes_on_when_its_tracer_dies_in_the_middle(tmp_path: Path) -> None:
    """With what was put into its code: the bytes stay, and are used the next time."""
    out = tmp_path / "out"
    pid = _start(build("bare", *_BARE), out)
    wait_until(lambda: out.exists() and _number(out) > 2, "the program begins")
    for turn in range(8):
        agent = os.fork()
        if agent == 0:
            tracer = Tracer()
            collector = Collector()
            while True:
                with stop_tree(tracer, pid, timeout_ms=1000) as tree:
                    collector.collect(tree, survey=True)
        time.sleep(0.3 + turn * 0.0037)
        os.kill(agent, signal.SIGKILL)
        os.waitpid(agent, 0)
        _counts(out)
    assert _moves(pid, out) is False, "the way in is there already"


_GO = """
package main
import ("fmt"; "os"; "time"; "sync/atomic")
func main() {
	var step int64
	for i := 0; i < 4; i++ { go func() { for { atomic.AddInt64(&step, 1); time.Sleep(time.Millisecond) } }() }
	out, err := os.Create(os.Args[1])
	if err != nil { os.Exit(2) }
	for { fmt.Fprintf(out, "%010d\\n", atomic.LoadInt64(&step)); out.Seek(0, 0); time.Sleep(5 * time.Millisecond) }
}
"""


@pytest.mark.skipif(not shutil.which("go"), reason="needs golang-go")
def test_a_program_in_go_moves(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(_GO)
    environment = os.environ | {"CGO_ENABLED": "0", "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod"}
    command = ["go", "build", "-o", str(tmp_path / "program"), str(tmp_path / "main.go")]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    out = tmp_path / "out"
    pid = _start(tmp_path / "program", out)
    wait_until(lambda: out.exists() and _number(out) > 2, "the program begins")
    _moves(pid, out)

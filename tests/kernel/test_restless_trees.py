"""Trees of which something always ends: surveys find them whole, or look again, and never trip over what is gone."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from phaul_engine import calls
from phaul_engine.departure import Departure
from phaul_engine.errors import GoneError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.memory import objects
from phaul_engine.proc.access import looking
from phaul_engine.target import Asking, Tracer

from phaul import facts
from tests.page_streams import TIMEOUT, page_pair
from tests.subjects.programs import wait_until

_SURVEYS = 8

# Threads that start children, threads, and watched descriptors, all of which end at once.
_PROGRAM = """
import os, select, socket, sys, threading, time
def children():
    pid = os.fork()
    if pid == 0:
        time.sleep(0.002)
        os._exit(0)
    os.waitpid(pid, 0)
def threads():
    some = [threading.Thread(target=time.sleep, args=(0.001,)) for _ in range(3)]
    for one in some: one.start()
    for one in some: one.join()
epoll = select.epoll()
def descriptors():
    pairs = [socket.socketpair() for _ in range(10)]
    for left, right in pairs:
        epoll.register(left, select.EPOLLIN)
        right.send(b"word")
    for left, right in pairs:
        left.close()
        right.close()
def files():
    some = [os.open(sys.argv[0], os.O_RDONLY), *os.pipe(), os.eventfd(0)]
    for fd in some: os.close(fd)
def forever(act):
    while True: act()
for act in children, threads, descriptors, files:
    threading.Thread(target=forever, args=(act,)).start()
open(sys.argv[1], "w").close()
"""


@pytest.fixture
def restless(tmp_path: Path) -> Iterator[int]:
    program, begun = tmp_path / "program.py", tmp_path / "begun"
    program.write_text(_PROGRAM)
    quiet = subprocess.DEVNULL
    command = [sys.executable, str(program), str(begun)]
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True) as process:
        wait_until(begun.exists, "the program begins")
        yield process.pid
        process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_surveys_of_a_tree_that_never_rests(restless: int) -> None:
    with Tracer() as tracer, Departure(tracer, restless) as departure:
        for _ in range(_SURVEYS):
            survey = departure.survey(timeout_ms=8000)
            assert [str(one) for one in survey.blockers if not one.passing] == []


# A process with many children, the last of them with threads. Each death is a line in the second file.
_PARENT = """
import os, signal, sys, threading, time
def started(threads):
    pid = os.fork()
    if pid: return pid
    for _ in range(threads): threading.Thread(target=time.sleep, args=(600,)).start()
    print(end="x", file=open(sys.argv[1], "a"))
    time.sleep(600)
for number in range(20): started(0 if number < 16 else 4)
while True:
    pid, status = os.wait()
    print(signal.Signals(status).name, file=open(sys.argv[2], "a"))
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    begun, deaths, quiet = tmp_path / "begun", tmp_path / "deaths", subprocess.DEVNULL
    command = [sys.executable, "-c", _PARENT, str(begun), str(deaths)]
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True) as process:
        wait_until(lambda: begun.exists() and begun.stat().st_size == 20, "all children begin")
        yield process.pid
        os.killpg(process.pid, signal.SIGKILL)
    assert set(deaths.read_text().split()) == {"SIGKILL"}, "nobody else dies of it"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_task_that_is_killed_while_the_preflight_looks_takes_nobody_along(
    parent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first looks, while programs run inside all of them; it is looked again then."""
    begin, looks = Asking.__init__, 0

    def begin_and_kill(self: Asking, *rest: Any) -> None:
        nonlocal looks
        begin(self, *rest)
        looks += 1
        if looks <= 4:
            time.sleep(random.uniform(0, 0.003))
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)  # before those with threads in all lists

    monkeypatch.setattr(Asking, "__init__", begin_and_kill)
    for _ in range(4):
        looks = 0
        found, _, size = facts.survey(parent, {})
        assert found == []
        assert size is not None


def test_a_program_that_is_gone_is_no_mistake_of_ours() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(GoneError):
        facts.survey(process.pid, {})


def test_a_registration_that_is_gone_is_of_nothing() -> None:
    left, right = socket.socketpair()
    with left, right, select.epoll() as epoll:
        epoll.register(left, select.EPOLLIN)
        assert calls.is_epoll_target(left.fileno(), epoll.fileno(), left.fileno(), 0)
        assert not calls.is_epoll_target(right.fileno(), epoll.fileno(), left.fileno(), 0)
        epoll.unregister(left)
        assert not calls.is_epoll_target(left.fileno(), epoll.fileno(), left.fileno(), 0)


def test_whatever_is_asked_of_a_process_that_has_ended_says_so() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    for look in (
        lambda: calls.kcmp(os.getpid(), process.pid, calls.KCMP_FILES),
        lambda: os.pidfd_open(process.pid),
        lambda: os.readlink(f"/proc/{process.pid}/exe"),
    ):
        with pytest.raises(GoneError), looking():
            look()
    with pytest.raises(IsADirectoryError), looking():
        os.open("/proc", os.O_RDWR)


_LOG = """
import os, sys
log = os.open(sys.argv[1] + "/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
if os.fork() and os.fork():
    open(sys.argv[1] + "/begun", "w").close()
while True:
    os.write(log, b"line\\n")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_file_that_all_have_open_is_one_though_its_offset_moves(tmp_path: Path) -> None:
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", _LOG, str(tmp_path)]
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        wait_until((tmp_path / "begun").exists, "the program begins")
        try:
            with Tracer() as tracer, Departure(tracer, process.pid) as departure:
                found = [_holders(departure.survey(timeout_ms=8000).checkpoint, b"/log") for _ in range(_SURVEYS)]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert found == [[3]] * _SURVEYS


def _holders(checkpoint: Checkpoint, name: bytes) -> list[int]:
    """How many descriptors each description of a file of such a name has."""
    ids = [record.message.id for record in checkpoint.records("files") if record.message.reg.name.endswith(name)]
    held = [one.message.id for table in checkpoint.idents("fdinfo") for one in checkpoint.records("fdinfo", table)]
    return [held.count(number) for number in ids]


_GROWING = """
import mmap, os, sys, time
name = "child" if os.fork() == 0 else "parent"
open(f"{sys.argv[1]}/{name}.begun", "w").close()
while not os.path.exists(sys.argv[1] + "/grow"): time.sleep(0.01)
new = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
new.write(os.urandom(1 << 20))
open(f"{sys.argv[1]}/{name}.grown", "w").close()
time.sleep(600)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_processes_that_have_all_got_new_areas(tmp_path: Path) -> None:
    """The pages of one are not sent yet when those of the next begin."""
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", _GROWING, str(tmp_path)]
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True) as process:
        try:
            wait_until(lambda: len(list(tmp_path.glob("*.begun"))) == 2, "both begin")
            with ExitStack() as stack:
                departure = stack.enter_context(Departure(stack.enter_context(Tracer()), process.pid))
                source, sink = page_pair(1)
                stack.callback(source.close)
                stack.callback(sink.close)
                for pid in departure.survey(timeout_ms=8000).inner_pids.values():
                    file = os.memfd_create("image")
                    stack.callback(os.close, file)
                    sink.add_image(objects.address_space(pid), file)
                departure.connect(source)
                sink.allow(1)
                departure.send_round(0)
                sink.wait(0, TIMEOUT)
                (tmp_path / "grow").touch()
                wait_until(lambda: len(list(tmp_path.glob("*.grown"))) == 2, "both grow")
                departure.survey(timeout_ms=8000)
                before = source.statistics().pages_data
                source.set_bandwidth(1 << 20)
                departure.send_round(1)
                source.set_bandwidth(0)
                sink.wait(1, TIMEOUT)
                assert source.statistics().pages_data - before >= 2 * 256
        finally:
            os.killpg(process.pid, signal.SIGKILL)

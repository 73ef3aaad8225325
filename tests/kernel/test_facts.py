"""Facts about a real tree of processes, and the destination's answers (here: this very host's)."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from phaul_engine.collect import Collector

from phaul import facts
from phaul.errors import UsageError
from phaul.guests import guests
from phaul.preflight import Answers, Endpoint, NeededFile, Questions, WrittenFile
from tests.subjects.programs import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PROGRAM = """
import mmap, os, socket, sys, threading, time
directory = sys.argv[1]
log = open(directory + "/log", "w")
data = open(directory + "/data")
gone = open(directory + "/gone", "w")
os.unlink(directory + "/gone")
server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
if os.fork() == 0:
    time.sleep(600)
print(server.getsockname()[1], flush=True)
time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    (tmp_path / "data").write_text("content")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    try:
        yield process, port
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_memory_shared_since_a_fork_is_counted_for_each() -> None:
    text = """
import os, time
block = b"x" * (32 << 20)
for _ in range(3):
    if os.fork() == 0:
        time.sleep(100)
print(flush=True)
time.sleep(100)
"""
    program = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert program.stdout is not None
        assert program.stdout.readline()
        found = facts.program_facts(program.pid)
    finally:
        os.killpg(program.pid, 9)
        program.communicate()
    assert found.memory >= 4 * 32 << 20
    assert 3 * 32 << 20 <= found.copies < found.memory


def test_who_came_into_a_container_is_named() -> None:
    outer = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", "sleep", "600"])
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    wait_until(lambda: bool(children.read_text()), "it has a first process")
    first = int(children.read_text())
    guest = subprocess.Popen(["nsenter", "--target", str(first), "--pid", "sleep", "600"])
    try:
        wait_until(lambda: bool(list(guests(first))), "the other one is there")
        (finding,) = guests(first)
        assert "(sleep) came into the container from outside" in finding.text
        assert finding in facts.program_facts(first).findings
    finally:
        outer.kill()  # and with it all in the namespace
        outer.wait()
        guest.wait()


def test_a_program_runs_again_before_its_files_are_looked_at(
    program: tuple[subprocess.Popen[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = program
    states = []
    look = Collector._look_outside

    def seen(self: Collector, *rest: Any) -> None:
        states.append(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0])
        look(self, *rest)

    monkeypatch.setattr(Collector, "_look_outside", seen)
    (blocker,) = facts.survey(process.pid, {})[0]  # it writes to us
    assert "pipe" in blocker.text
    assert states[0] in ("S", "R"), "it runs"
    assert states[1:] == ["t"], "what is in the way is looked at again while it stands"


def test_a_program_is_described_and_goes_on(program: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    process, port = program
    found = facts.program_facts(process.pid)
    questions = found.questions
    (child,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    threads = {int(tid) for tid in os.listdir(f"/proc/{process.pid}/task")}
    assert set(questions.numbers) == threads | {child}
    assert len(threads) == 2
    needed = {file.path: file for file in questions.needed}
    assert needed[f"{tmp_path}/data"].sha256 == facts.file_hash(f"{tmp_path}/data")
    assert os.path.realpath(sys.executable) in needed
    assert any("libc" in path for path in needed)
    assert [file.path for file in questions.written] == [f"{tmp_path}/log"]
    assert questions.endpoints == (Endpoint("tcp", "127.0.0.1", port),)
    assert found.memory > 1 << 20
    pipe, parent = found.findings
    assert pipe.text.startswith(f"fd 1 of pid {process.pid} ("), "the pipe that we read from"
    assert (parent.severity, parent.check) == ("warning", "parent")
    assert parent.text.startswith(f"pid {os.getpid()} (")


def test_a_session_led_from_outside_is_found() -> None:
    shell = "sleep 60 >/dev/null 2>&1 & echo $!; read end; kill $!"
    leader = subprocess.Popen(
        ["sh", "-c", shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert leader.stdout
    try:
        found = facts.program_facts(int(leader.stdout.readline())).findings
    finally:
        leader.communicate("\n")
    finding = next(one for one in found if "session led by pid" in one.text)
    assert (finding.severity, finding.check) == ("blocker", "state")


def test_a_tracer_is_found() -> None:
    process = subprocess.Popen(["setsid", "sleep", "60"])
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.ptrace(0x4206, process.pid, 0, 0) == 0  # PTRACE_SEIZE
        finding = facts.program_facts(process.pid).findings[0]
    finally:
        process.kill()
        process.wait()
    assert finding.check == "traced"
    assert f"traced by pid {os.getpid()} (" in finding.text


def test_a_process_that_is_not_there() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(UsageError, match=f"no process {process.pid}"):
        facts.program_facts(process.pid)


def test_what_is_taken_here_is_answered(program: tuple[subprocess.Popen[str], int], tmp_path: Path) -> None:
    """Asked about itself, this host has every number, file and port in use."""
    process, port = program
    questions = facts.program_facts(process.pid).questions
    with facts.tokens(questions) as asked:
        answers = facts.answer(asked)
    assert set(answers.taken) == set(questions.numbers)
    assert answers.taken[process.pid].startswith(f"pid {process.pid} (python")
    assert all(answers.files[file.path].sha256 == file.sha256 for file in questions.needed)
    assert answers.shared == (f"{tmp_path}/log",)
    assert answers.occupied == (Endpoint("tcp", "127.0.0.1", port),)
    assert sorted(os.listdir(tmp_path)) == ["data", "log"]  # tokens are gone


def test_a_free_number_a_missing_file_and_another_storage(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / "log").touch()
    inode = (tmp_path / "log").stat().st_ino
    questions = Questions(
        {process.pid: "nobody"},
        (NeededFile("/no/such/file", 1, "", ""),),
        (WrittenFile(f"{tmp_path}/log", inode, ""),),
        (Endpoint("udp", "0.0.0.0", _free_port()),),
    )
    assert facts.answer(questions) == Answers(existing=(f"{tmp_path}/log", str(tmp_path)))
    with facts.tokens(questions) as asked:
        (file,) = asked.written
        Path(file.token).write_text("something else")  # what another host would have there
        assert facts.answer(asked).shared == ()
    with facts.tokens(questions) as asked:
        (file,) = asked.written
        elsewhere = replace(asked, written=(replace(file, inode=inode + 1),))
        assert facts.answer(elsewhere).shared == ()
        assert facts.answer(asked).shared == (f"{tmp_path}/log",)


def test_files_of_several_directories_in_any_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one/a", "two/b", "one/c")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    questions = Questions({}, (), tuple(WrittenFile(str(path), path.stat().st_ino, "") for path in paths), ())
    with facts.tokens(questions) as asked:
        assert facts.answer(asked).shared == tuple(map(str, paths))


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_host_facts_name_addresses_and_probes() -> None:
    here = facts.host_facts()
    assert ("127.0.0.1", "lo") in here.addresses
    assert "lo" in here.devices
    assert {"kernel", "dirty tracking", "TCP_REPAIR"} <= {probe.name for probe in here.probes}
    assert here.memory_available > 0

"""Programs go to disk and come back, by the commands themselves; each round is held against the one before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.images.pages import PageImages
from phaul_engine.images.verify import verify

# Counts in a file, and looks at a mapping shared with a child, one of its own and a memory file at each step.
_PROGRAM = """
import hashlib, mmap, os, sys, time
shared = mmap.mmap(-1, 1 << 16)
own = mmap.mmap(-1, 1 << 22, flags=mmap.MAP_PRIVATE)
for page in range(0, 1 << 22, 4096):
    own[page:page + 8] = page.to_bytes(8, "little")
memory = os.memfd_create("memory"); os.write(memory, b"memory" * 1000)
out = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
child = os.fork()
step = 0
while True:
    step += 1
    if child:
        shared[:8] = step.to_bytes(8, "little")
        for page in step % 7, 100 + step // 4 % 900:  # some again and again, and others once
            own[4096 * page:4096 * page + 8] = step.to_bytes(8, "little")
        os.pwrite(memory, str(step).encode(), 0)
    else:
        sums = hashlib.md5(own).hexdigest()
        ahead = int.from_bytes(shared[:8], "little")
        os.write(out, f"{step} {ahead} {sums} {os.pread(memory, 6, 6).decode()} {os.getppid()}\\n".encode())
    time.sleep(0.02)
"""


def _phaul(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "phaul", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL)


def _dump(command: str, pid: int, images: Path, *more: object) -> dict[str, int]:
    result = _phaul(command, "--pid", pid, "--images", images, "--json", *more)
    assert result.returncode == 0, result.stderr
    told: dict[str, int] = json.loads(result.stdout)
    return told


def _wait_until_free(pid: int) -> None:
    """Until nothing bears a number of the program's session any more: process 1 may be slow to reap an orphan."""
    deadline = time.monotonic() + 20
    while any(_session(entry) == pid for entry in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline, "something of the program is left"
        time.sleep(0.02)


def _session(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[3])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _restore(images: Path, pidfile: Path) -> int:
    result = _phaul("restore", "--images", images, "--detach", "--pidfile", pidfile)
    assert result.returncode == 0, result.stderr
    return int(pidfile.read_text())


def _wait_for_lines(out: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 20
    while not out.exists() or out.read_text().count("\n") < count:
        assert time.monotonic() < deadline, "the program does not go on"
        time.sleep(0.02)
    return out.read_text().splitlines()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The program, in a session of its own; what is left of it in the end is killed."""
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    _wait_for_lines(tmp_path / "out", 2)
    yield process
    if process.poll() is None or Path(f"/proc/{process.pid}").exists():
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_program_goes_to_disk_and_comes_back(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    _dump("dump", program.pid, tmp_path / "images")
    assert program.wait(5) == -signal.SIGKILL
    _wait_until_free(program.pid)
    before = out.read_text().splitlines()
    assert verify(tmp_path / "images") == []
    assert _restore(tmp_path / "images", tmp_path / "pid") == program.pid
    after = _wait_for_lines(out, len(before) + 10)
    steps = [int(line.split()[0]) for line in after]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or done twice"
    assert {tuple(line.split()[2:]) for line in after} == {tuple(before[0].split()[2:])}
    ahead = [int(line.split()[1]) for line in after]
    assert ahead == sorted(ahead), "shared memory is still shared, and goes on"
    assert ahead[-1] > ahead[len(before) - 1]


def test_each_round_stores_what_differs(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    rounds = [tmp_path / name for name in ("one", "two", "last")]
    first = _dump("pre-dump", program.pid, rounds[0])
    second = _dump("pre-dump", program.pid, rounds[1], "--parent", rounds[0])
    last = _dump("dump", program.pid, rounds[2], "--parent", rounds[1])
    program.wait(5)
    _wait_until_free(program.pid)
    assert first["pages_in_parent"] == 0
    assert first["pages"] > 2000
    for later in (second, last):
        assert later["pages"] < first["pages"] / 10
        assert later["pages_in_parent"] > first["pages"] * 9 // 10
    assert verify(rounds[2]) == []
    with PageImages(rounds[2]) as images:
        files = {extent.fd for extent in images.extents("pagemap", program.pid)}
    assert len(files) == 3, "pages stand in all rounds"
    lines = len((tmp_path / "out").read_text().splitlines())
    _restore(rounds[2], tmp_path / "pid")
    after = _wait_for_lines(tmp_path / "out", lines + 5)
    assert {tuple(line.split()[2:]) for line in after} == {tuple(after[0].split()[2:])}


_SLEEPER = """
import os, select, sys, time
begun = time.monotonic()
open(sys.argv[1], "w").close()
select.poll().poll(9000)
with open(sys.argv[1], "w") as out:
    out.write(f"{time.monotonic() - begun}\\n")
time.sleep(1000)
"""


def test_a_sleep_lasts_as_long_as_it_should_over_all_rounds(tmp_path: Path) -> None:
    """Each command stops the program anew, and the kernel tells none of them how long it has slept."""
    out, quiet = tmp_path / "out", subprocess.DEVNULL
    command = [sys.executable, "-c", _SLEEPER, str(out)]
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        while not out.exists():
            time.sleep(0.02)
        time.sleep(1)
        _dump("pre-dump", process.pid, tmp_path / "one")
        _dump("pre-dump", process.pid, tmp_path / "two", "--parent", tmp_path / "one")
        assert out.read_text() == "", "the rounds took longer than the sleep"
        _dump("dump", process.pid, tmp_path / "last", "--parent", tmp_path / "two")
        process.wait(5)
        _wait_until_free(process.pid)
        _restore(tmp_path / "last", tmp_path / "pid")
        (took,) = _wait_for_lines(out, 1)
        assert 9 <= float(took) < 9.9
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_it_may_run_on(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    _dump("dump", program.pid, tmp_path / "images", "--leave-running")
    assert verify(tmp_path / "images") == []
    lines = len((tmp_path / "out").read_text().splitlines())
    _wait_for_lines(tmp_path / "out", lines + 5)
    assert program.poll() is None


def test_what_cannot_be_stored_is_named_and_runs_on(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(["sleep", "1000"], stdin=reading, start_new_session=True)
    try:
        result = _phaul("dump", "--pid", process.pid, "--images", tmp_path / "images")
        assert result.returncode == 20
        assert f"fd 0 of pid {process.pid} (sleep) is a pipe" in result.stderr
        assert not (tmp_path / "images" / "inventory.img").exists()
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)


def test_a_failed_write_leaves_the_program_running(program: subprocess.Popen[bytes], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "core-1.img").mkdir()  # nothing to do with it
    (images / f"core-{program.pid}.img").mkdir()
    (images / f"core-{program.pid}.img" / "full").touch()
    result = _phaul("dump", "--pid", program.pid, "--images", images)
    assert result.returncode == 1
    assert f"process {program.pid} runs on here" in result.stderr
    lines = len((tmp_path / "out").read_text().splitlines())
    _wait_for_lines(tmp_path / "out", lines + 5)
    assert program.poll() is None


def test_the_restored_programs_end_is_told(tmp_path: Path) -> None:
    code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\nsys.exit(7)"
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", code, str(tmp_path / "end")]
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    _dump("dump", process.pid, tmp_path / "images")
    process.wait(5)
    (tmp_path / "end").touch()
    assert _phaul("restore", "--images", tmp_path / "images").returncode == 7


def test_a_program_that_has_ended_is_not_stored(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"], start_new_session=True)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    result = _phaul("dump", "--pid", process.pid, "--images", tmp_path / "images")
    process.wait()
    assert result.returncode == 1
    assert "has ended" in result.stderr


_ECHO = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
os.dup2(0, 1)
connection, _ = listener.accept()
while content := connection.recv(4096):
    connection.sendall(content)
"""


@pytest.fixture
def echo() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A server with one connection, and its client."""
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", _ECHO]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=quiet, stdout=pipe, stderr=quiet, start_new_session=True)
    assert process.stdout is not None
    client = socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=30)
    yield process, client
    client.close()
    process.stdout.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answer(client: socket.socket, question: bytes) -> bytes:
    client.sendall(question)
    return client.recv(len(question), socket.MSG_WAITALL)


def test_a_connection_outlives_the_time_on_disk(
    echo: tuple[subprocess.Popen[bytes], socket.socket], tmp_path: Path
) -> None:
    """What its peer sends meanwhile is answered when the program is back."""
    process, client = echo
    assert _answer(client, b"before") == b"before"
    _dump("dump", process.pid, tmp_path / "images", "--tcp", "established")
    process.wait(5)
    client.sendall(b"meanwhile")
    _wait_until_free(process.pid)
    _restore(tmp_path / "images", tmp_path / "pid")
    assert client.recv(9, socket.MSG_WAITALL) == b"meanwhile"
    assert _answer(client, b"after") == b"after"


def test_connections_end_when_they_shall_not_come_back(
    echo: tuple[subprocess.Popen[bytes], socket.socket], tmp_path: Path
) -> None:
    process, client = echo
    _dump("dump", process.pid, tmp_path / "images", "--tcp", "established")
    process.wait(5)
    _wait_until_free(process.pid)
    result = _phaul("restore", "--images", tmp_path / "images", "--tcp", "close")
    assert result.returncode == 0, result.stderr  # it reads the end of the connection, and ends
    with pytest.raises(ConnectionResetError):
        _answer(client, b"x")


def test_a_dump_that_fails_lifts_its_lock(echo: tuple[subprocess.Popen[bytes], socket.socket], tmp_path: Path) -> None:
    process, client = echo
    images = tmp_path / "images"
    (images / f"core-{process.pid}.img").mkdir(parents=True)
    (images / f"core-{process.pid}.img" / "full").touch()
    assert _phaul("dump", "--pid", process.pid, "--images", images, "--tcp", "established").returncode == 1
    assert _answer(client, b"it runs on") == b"it runs on"


def test_a_job_of_a_shell_lives_on_in_another_session(tmp_path: Path) -> None:
    """Its session's leader stays: it is refused, and with --shell-job becomes one of who restores it."""
    images = tmp_path / "images"
    words = "sleep 1000 </dev/null >/dev/null 2>&1 & echo $!; wait; sleep 1000"
    shell = subprocess.Popen(
        ["bash", "-c", words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert shell.stdout is not None
    pid = int(shell.stdout.readline())
    try:
        refused = _phaul("dump", "--pid", pid, "--images", images)
        assert refused.returncode == 20
        assert f"a session led by pid {shell.pid} (bash), outside of the tree" in refused.stderr
        _dump("dump", pid, images, "--shell-job")
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert _phaul("restore", "--images", images, "--detach").returncode == 1
        done = _phaul("restore", "--images", images, "--detach", "--shell-job")
        assert done.returncode == 0, done.stderr
        assert os.getsid(pid) == os.getsid(0)
        os.kill(pid, signal.SIGKILL)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        shell.stdout.close()

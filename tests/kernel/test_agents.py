"""Both agents under their keepers, with a real program: source here, destination in a PID namespace and cgroup beside.

The test plays phaul: it holds the two connections that SSH and sudo would give it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from phaul_engine.cgroup import Hierarchy, Hold, HoldGoneError, path_of

from phaul.events import Event, Result
from phaul.journal import Store
from phaul.migration import Role, Row
from phaul.preflight import Wishes
from phaul.session import Client, Request
from phaul.transport.control import ChannelClosed, StreamLink

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

COUNTER = """
import os, threading, time
data = bytearray(32 << 20)
def count(which):
    step = 0
    while True:
        time.sleep(0.005)
        step += 1
        data[(step * 4096 * 7 + which) % len(data)] = step % 251
        os.write(1, f"{which} {step} {os.getpid()} {time.monotonic():.4f}\\n".encode())
for which in range(2):
    threading.Thread(target=count, args=(which,)).start()
"""


@dataclass
class Pair:
    """Two agents' worth of hosts. `start` gives the agents of one migration."""

    directory: Path
    cgroup: Hold
    init: subprocess.Popen[bytes]
    agents: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def store(self, role: Role) -> Store:
        return Store(self.directory / role.value)

    def start(self, role: Role, migration: str) -> Path:
        """A keeper with its agent; the socket that the agent accepts on."""
        path = self.directory / f"{migration}.{role}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(4)
            fd = listener.fileno()
            store = str(self.store(role).directory)
            command = [sys.executable, "-P", "-m", "phaul.keeper", role.value, migration, str(fd), store]
            if role is Role.DESTINATION:
                command = ["nsenter", f"--target={self.init.pid}", "--pid", "--mount", *command]

            def enter() -> None:
                if role is Role.DESTINATION:
                    self.cgroup.gather(lambda: [os.getpid()])

            log = (self.directory / f"{role}.log").open("ab")
            self.agents.append(subprocess.Popen(command, pass_fds=(fd,), preexec_fn=enter, stdout=log, stderr=log))
            log.close()
        return path

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self.directory.glob("*.log"))


@pytest.fixture
def pair() -> Iterator[Pair]:
    init = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child", "sleep", "600"],
        start_new_session=True,
    )
    short = tempfile.TemporaryDirectory(prefix="phaul-")  # the names of sockets have 108 bytes at most
    with short as directory, Hierarchy.find() as hierarchy:
        cgroup = Hold.create(hierarchy, "/", f"phaul-test-{os.getpid()}")
        time.sleep(0.3)
        inner = int(Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()[0])
        made = Pair(Path(directory), cgroup, init)
        made.init = subprocess.Popen(["true"])
        made.init.wait()
        made.init.pid = inner
        yield made
        init.kill()
        init.wait()
        for agent in made.agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(5)
            agent.kill()
            agent.wait()
        for child in hierarchy_children(cgroup):
            left = Hold.open(hierarchy, f"{cgroup.path}/{child}")
            left.kill(5)
            left.remove()
        cgroup.kill(5)
        cgroup.remove()


def hierarchy_children(hold: Hold) -> list[str]:
    fd = os.open(".", os.O_RDONLY, dir_fd=hold.directory)
    try:
        return [name for name in os.listdir(fd) if name.startswith("phaul-")]
    finally:
        os.close(fd)


@dataclass
class Program:
    """A program that counts into a file."""

    process: subprocess.Popen[bytes]
    out: Path

    def steps(self) -> dict[str, list[list[str]]]:
        lines = [line.split() for line in self.out.read_text().splitlines()]
        return {which: [line for line in lines if line[0] == which] for which in "01"}

    def check(self) -> None:
        """Every step once, in order, under one PID, the clock never back."""
        for lines in self.steps().values():
            assert [int(line[1]) for line in lines] == list(range(1, len(lines) + 1))
            assert {line[2] for line in lines} == {str(self.process.pid)}
            clock = [float(line[3]) for line in lines]
            assert clock == sorted(clock)

    def counts(self) -> bool:
        before = len(self.steps()["0"])
        time.sleep(0.3)
        return len(self.steps()["0"]) > before


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    out = tmp_path / "out"
    with out.open("ab") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-c", COUNTER], stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True, cwd="/"
        )
    time.sleep(0.4)
    yield Program(process, out)
    process.kill()
    process.wait()


def request(pid: int, migration: str, **changes: object) -> Request:
    wishes = Wishes("there")
    base = Request(
        migration, "pid", str(pid), "there", "127.0.0.1", wishes, 500.0, 10, 0, "none", 2, False, False, False
    )
    return Request(**{**base.__dict__, **changes})


async def link_to(path: Path) -> StreamLink:
    reader, writer = await asyncio.open_unix_connection(str(path))
    return StreamLink(reader, writer)


def migrate(pair: Pair, asked: Request, seen: list[Event] | None = None) -> Result:
    async def no_tunnel(host: str, port: int) -> int:
        raise AssertionError("no tunnel was asked for")

    async def main() -> Result:
        source = await link_to(pair.start(Role.SOURCE, asked.migration))
        destination = await link_to(pair.start(Role.DESTINATION, asked.migration))
        client = Client(source, destination, no_tunnel)
        async with asyncio.timeout(60):
            return await client.run(asked, (seen if seen is not None else []).append)

    return asyncio.run(main())


def row(pair: Pair, role: Role, migration: str) -> Row | None:
    journal = pair.store(role).open(migration, role)
    if journal is None:
        return None
    with journal:
        return journal.row.state


def eventually(condition: object, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def test_a_program_moves_and_goes_on(pair: Pair, program: Program) -> None:
    migration = uuid.uuid4().hex
    seen: list[Event] = []
    result = migrate(pair, request(program.process.pid, migration), seen)
    assert result.outcome == "migrated", f"{result}\n{pair.logs()}"
    assert program.process.wait(5) == -signal.SIGKILL, "the source's copy is gone"
    assert program.counts()
    program.check()
    assert result.downtime_ms is not None
    assert result.downtime_ms < 1000
    assert eventually(lambda: row(pair, Role.SOURCE, migration) is Row.RELEASED)
    assert eventually(lambda: row(pair, Role.DESTINATION, migration) is Row.RELEASED)
    assert result.reason == "", f"{result}\n{pair.logs()}"
    assert [event.name for event in seen if event.name in ("committed", "resumed", "released")] == [
        "committed",
        "resumed",
        "released",
    ]
    with Hierarchy.find() as hierarchy, pytest.raises(HoldGoneError):
        hierarchy.open(f"/phaul-{migration}")


def test_what_cannot_be_moved_is_refused_untouched(pair: Pair, tmp_path: Path) -> None:
    """A program in the process group of its test: it moves only with the group's leader."""
    out = tmp_path / "out"
    with out.open("ab") as stdout:
        process = subprocess.Popen([sys.executable, "-c", COUNTER], stdin=subprocess.DEVNULL, stdout=stdout, cwd="/")
    program = Program(process, out)
    time.sleep(0.4)
    migration = uuid.uuid4().hex
    result = migrate(pair, request(process.pid, migration))
    try:
        assert (result.outcome, "outside of the tree" in result.reason) == ("refused", True), f"{result}\n{pair.logs()}"
        assert program.counts()
        assert row(pair, Role.SOURCE, migration) is None
        assert row(pair, Role.DESTINATION, migration) is None
    finally:
        process.kill()
        process.wait()
    program.check()


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("role", list(Role))
def test_an_agent_killed_before_the_commit_leaves_the_program_here(pair: Pair, program: Program, role: Role) -> None:
    """It dies while rounds are sent; its keeper, or the other side, puts everything back."""
    migration = uuid.uuid4().hex
    asked = request(program.process.pid, migration, bandwidth=4_000_000)

    def kill() -> None:
        assert eventually(lambda: row(pair, Role.DESTINATION, migration) is Row.PREPARED, 30.0), pair.logs()
        time.sleep(0.5)
        keeper = pair.agents[0].pid if role is Role.SOURCE else children(pair.agents[1].pid)[0]  # below nsenter
        os.kill(children(keeper)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    if role is Role.SOURCE:
        with pytest.raises(ChannelClosed):
            migrate(pair, asked)
    else:
        result = migrate(pair, asked)
        assert result.outcome == "stayed", f"{result}\n{pair.logs()}"
    killer.join()
    assert eventually(lambda: row(pair, Role.SOURCE, migration) is Row.ABORTED), pair.logs()
    assert eventually(lambda: row(pair, Role.DESTINATION, migration) is Row.DISCARDED), pair.logs()
    assert program.process.poll() is None
    assert program.counts()
    program.check()
    assert path_of(program.process.pid) == path_of(os.getpid())
    assert eventually(lambda: len(children(pair.init.pid)) == 0), "nothing of the copy is left there"

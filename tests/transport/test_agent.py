"""`phaul agent --stdio` as SSH starts it, and the relay's way to an agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from phaul import keeper
from phaul.desk import Desk, Kind, Standing, Visitor
from phaul.errors import PhaulError, UsageError
from phaul.journal import Row, Store, Task, boot_id
from phaul.migration import Role
from phaul.migration import Row as State
from phaul.preflight import Questions
from phaul.transport import hello, relay
from phaul.transport.control import ChannelClosed, ControlError, Frame, StreamLink

from .conftest import Server

PHAUL = str(Path(sys.executable).with_name("phaul"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a login that may become root without a password")
def test_check_asks_the_other_host(server: Server) -> None:
    options = [part for option in server.options().options for part in ("-o", option)]
    done = subprocess.run(
        [PHAUL, "check", "--json", "-F", "none", "-i", server.key, *options, str(server.destination)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PHAUL_SSH_REMOTE_COMMAND": PHAUL},
    )
    assert done.returncode == 0, done.stderr
    here, there, findings = map(json.loads, done.stdout.splitlines())
    assert (here["name"], there["name"]) == ("this host", str(server.destination))
    assert here["boot_id"] == there["boot_id"]
    assert here["probes"] == there["probes"]
    assert {finding["severity"] for finding in findings["findings"]} <= {"warning"}


def test_check_of_a_host_without_phaul_is_12(server: Server) -> None:
    options = [part for option in server.options().options for part in ("-o", option)]
    done = subprocess.run(
        [PHAUL, "check", "-F", "none", "-i", server.key, *options, str(server.destination)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PHAUL_SSH_REMOTE_COMMAND": "no-such-phaul"},
    )
    assert done.returncode == 12
    assert "phaul deploy" in done.stderr
    assert done.stdout == ""


def test_an_agent_that_is_left_ends_quietly() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([PHAUL, "agent", "--stdio"], stdin=pipe, stdout=pipe, stderr=pipe) as agent:
        assert agent.stdin
        assert agent.stdout
        agent.stdin.write(agent.stdout.readline())  # what it says of itself could be said by any other
        assert agent.communicate(timeout=60)[1] == b""
    assert agent.returncode == 0


Act = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def with_relay(run_directory: Path, launch: relay.Launcher, act: Act) -> None:
    """A relay on one end of a socket pair, `act` on the other."""

    async def serve(end: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=end)
        desk, features = Desk(run_directory / "state", run_directory), frozenset({"a"})
        try:
            await relay.serve(reader, writer, desk=desk, run_directory=run_directory, features=features, launch=launch)
        finally:
            writer.close()

    async def main() -> None:
        ours, theirs = socket.socketpair()
        serving = asyncio.create_task(serve(theirs))
        our_reader, our_writer = await asyncio.open_connection(sock=ours)
        try:
            await asyncio.wait_for(act(our_reader, our_writer), 10)
        finally:
            our_writer.close()
            await asyncio.wait_for(serving, 10)

    asyncio.run(main())


class Agents:
    """Launches "agents" that prefix what they get with a number of theirs; one at a time has a connection."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, str]] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, role: str, migration: str, listener: socket.socket) -> None:
        self.launched.append((role, migration))
        thread = threading.Thread(target=self._serve, args=(listener.dup(), len(self.launched)), daemon=True)
        thread.start()
        self.threads.append(thread)

    def _serve(self, listener: socket.socket, number: int) -> None:
        with listener, contextlib.suppress(TimeoutError):
            listener.settimeout(10)
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(10)
                    while data := connection.recv(65536):
                        connection.sendall(b"%d:%s" % (number, data))
                        if data == b"end":
                            return


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Visitor:
    theirs = await hello.receive(reader)
    assert theirs.features == frozenset({"a"})
    writer.write(hello.local().line())
    return Visitor(StreamLink(reader, writer), "here")


def test_the_desk_answers_before_there_is_an_agent(tmp_path: Path) -> None:
    agents = Agents()

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        desk = await greet(reader, writer)
        assert (await desk.host()).kernel == os.uname().release
        process = subprocess.Popen(["true"])
        process.wait()
        answers = await desk.answer(Questions({os.getpid(): "us", process.pid: "nobody"}))
        assert list(answers.taken) == [os.getpid()]
        with pytest.raises(PhaulError, match="here: there is no process"):
            await desk.program("pid", str(process.pid), {}, haul=False)
        with pytest.raises(PhaulError, match="not Questions"):
            await desk._ask(Kind.QUESTIONS, {"numbers": "all"}, dict)
        await desk.forget()
        await desk.attach("source", "0123456789")
        writer.write(b"one")
        assert await reader.readexactly(5) == b"1:one"

    with_relay(tmp_path / "run", agents, act)
    assert agents.launched == [("source", "0123456789")]


def test_the_desk_reads_journals(tmp_path: Path) -> None:
    row = Row(migration="m0123456", role=Role.SOURCE, boot=boot_id(), owner=Task.of(os.getpid()))
    with Store(tmp_path / "state").create(row) as journal:
        journal.transition(State.PREPARED, State.ABORTED, why="the link broke")
        journal.end()

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        desk = await greet(reader, writer)
        assert await desk.journal("m0123456", "source") == Standing(
            "aborted", True, "the link broke", owner=os.getpid(), owned=True
        )
        assert await desk.journal("m0123456", "destination") == Standing()

    with_relay(tmp_path, Agents(), act)


def test_tokens_live_as_long_as_they_are_needed(tmp_path: Path) -> None:
    program = "import sys, time; f = open(sys.argv[1] + '/log', 'w'); print(flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        desk = await greet(reader, writer)
        found = await desk.program("pid", str(process.pid), {}, haul=False)
        assert [file.path for file in found.questions.written] == [f"{tmp_path}/log"]
        assert len(os.listdir(tmp_path)) == 2
        assert (await desk.answer(found.questions)).shared == (f"{tmp_path}/log",)
        await desk.forget()
        assert os.listdir(tmp_path) == ["log"]
        await desk.program("pid", str(process.pid), {}, haul=False)

    try:
        with_relay(tmp_path / "run", Agents(), act)
        assert os.listdir(tmp_path) == ["log"]  # the end of the stream removes them, too
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("frame", [Frame(99, b"{}"), Frame(2, b"["), Frame(1, b"[]")])
def test_what_the_desk_does_not_understand_ends_it(tmp_path: Path, frame: Frame) -> None:
    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        desk = await greet(reader, writer)
        await desk.link.send(frame)
        with pytest.raises(ChannelClosed):
            await desk.link.receive()

    with pytest.raises(ControlError):
        with_relay(tmp_path / "run", Agents(), act)


def test_an_agent_outlives_its_relay_and_is_found_again(tmp_path: Path) -> None:
    agents, run = Agents(), tmp_path / "run"

    def act(data: bytes, answer: bytes) -> Act:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await (await greet(reader, writer)).attach("destination", "0123456789")
            writer.write(data)
            assert await reader.readexactly(len(answer)) == answer

        return talk

    with_relay(run, agents, act(b"one", b"1:one"))
    with_relay(run, agents, act(b"two", b"1:two"))
    assert agents.launched == [("destination", "0123456789")]
    assert run.stat().st_mode & 0o777 == 0o700

    with_relay(run, agents, act(b"end", b"1:end"))  # that agent ends and leaves its socket's name behind
    agents.threads[0].join(5)
    with_relay(run, agents, act(b"one", b"2:one"))
    assert len(agents.launched) == 2
    with_relay(run, agents, act(b"end", b"2:end"))


def test_the_agents_end_is_the_end_of_the_stream(tmp_path: Path) -> None:
    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (await greet(reader, writer)).attach("source", "0123456789")
        writer.write(b"end")
        assert await reader.read() == b"1:end"
        with pytest.raises(ChannelClosed):
            await StreamLink(reader, writer).receive()

    with_relay(tmp_path / "run", Agents(), act)


def test_an_agent_that_was_started_early_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    agents, run = Agents(), tmp_path / "run"

    async def twice_and_ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        desk = await greet(reader, writer)
        await desk.start("source", "0123456789")
        await desk.start("source", "0123456789")
        assert agents.launched == [("source", "0123456789")]
        assert await desk.host()  # other questions go on
        await desk.attach("source", "0123456789")
        writer.write(b"end")
        assert await reader.read() == b"1:end"

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (await greet(reader, writer)).start("source", "9876543210")

    with_relay(run, agents, twice_and_ask)
    assert len(agents.launched) == 1
    with_relay(run, agents, leave)  # the connection that was held for it has ended: the agent accepts again
    with contextlib.closing(relay.Agents(run, agents)) as later, later.take("source", "9876543210") as connection:
        connection.sendall(b"end")
        assert connection.recv(100) == b"2:end"


@pytest.mark.parametrize("role", ["source", "destination"])
def test_an_agent_that_nobody_asks_for_ends_without_a_word(tmp_path: Path, role: str) -> None:
    """Under its keeper: no log, no row and no socket's name is left."""
    run, state = tmp_path / "run", tmp_path / "state"
    with contextlib.closing(relay.Agents(run, partial(keeper.launch, state_directory=state))) as agents:
        agents.start(role, "0123456789")
    deadline = time.monotonic() + 60
    while list(run.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(run.iterdir()) == []
    assert not list(state.glob("**/*0123456789*"))


@pytest.mark.parametrize(
    ("role", "migration"),
    [("", ""), ("root", "0123456789"), ("source", ""), ("source", "../../../x"), ("source", "A123456789")],
)
def test_roles_and_ids_are_checked(tmp_path: Path, role: str, migration: str) -> None:
    agents = Agents()

    async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (await greet(reader, writer)).attach(role, migration)

    with pytest.raises(UsageError):
        with_relay(tmp_path / "run", agents, act)
    assert agents.launched == []


def test_credentials_of_the_other_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert relay.peer_is_root(ours) == (os.geteuid() == 0)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_keeper_removes_the_name_of_its_agents_socket_and_no_others(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "0123456789.source.sock"
    with relay._listener(path) as listener:
        with keeper._named(listener.fileno(), path.name):
            assert path.exists()
            if replaced:
                later = relay._listener(path)
        assert path.exists() == replaced
    if replaced:
        later.close()

"""SSH against a real sshd: the ways in, and each way of failing with its own error."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import stat
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from phaul.errors import AuthenticationError, ConnectError, PhaulError, UsageError, VersionError
from phaul.transport import hello, ssh
from phaul.transport.control import ChannelClosed, Frame
from phaul.transport.ssh_config import Destination, SshOptions, resolve

from .conftest import Server, make_key

T = TypeVar("T")


def through(server: Server, options: SshOptions, act: Callable[[ssh.Connection], Awaitable[T]]) -> T:
    async def main() -> T:
        async with ssh.connect(server.destination, options) as connection:
            return await act(connection)

    return asyncio.run(main())


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("db2", Destination("db2")),
        ("db2:22", Destination("db2", None, 22)),
        ("bob@db2.example", Destination("db2.example", "bob")),
        ("bob@db2:2222", Destination("db2", "bob", 2222)),
        ("bob@ads.example@db2", Destination("db2", "bob@ads.example")),
        ("bob@[2001:db8::1]:22", Destination("2001:db8::1", "bob", 22)),
        ("2001:db8::1", Destination("2001:db8::1")),
        ("[fe80::1%eth0]", Destination("fe80::1%eth0")),
        ("", None),
        ("@db2", None),
        ("db2:", None),
        ("db2:0", None),
        ("db2:65536", None),
        ("-oProxyCommand=touch /tmp/x", None),
        ("-db2", None),
        ("bob@-db2", None),
        ("db2 rm", None),
        ("db2;rm", None),
    ],
)
def test_destinations(text: str, expected: Destination | None) -> None:
    if expected is None:
        with pytest.raises(UsageError, match=r"HOST|port"):
            Destination.parse(text)
    else:
        assert Destination.parse(text) == expected
        assert Destination.parse(str(expected)) == expected


def test_configuration_is_read_as_ssh_reads_it(tmp_path: Path) -> None:
    config, key = tmp_path / "config", tmp_path / "key"
    key.touch()
    config.write_text(
        f"Host db2\n HostName 192.0.2.7\n User alice\n Port 2222\n IdentityFile {key}\n IdentityFile /no/such\n"
        " ProxyJump bob@gate:99\n HostKeyAlias db\n StrictHostKeyChecking yes\n UserKnownHostsFile ~/kh\n"
        " Ciphers aes256-gcm@openssh.com,aes128-ctr\nHost *\n User nobody\n"
    )
    options = SshOptions(config=str(config), options=("BindAddress=127.0.0.9",))
    resolved = asyncio.run(resolve(Destination("db2"), options))
    assert (resolved.host, resolved.port, resolved.user) == ("192.0.2.7", 2222, "alice")
    assert resolved.identities == (str(key),)
    assert resolved.host_key_alias == "db"
    assert resolved.strict == "yes"
    assert resolved.known_hosts[0] == Path.home() / "kh"
    assert resolved.ciphers == ("aes256-gcm@openssh.com", "aes128-ctr")
    assert resolved.bind_address == "127.0.0.9"
    assert resolved.proxy_command == (
        *("ssh", "-F", str(config), "-l", "bob", "-p", "99", "-W", "[192.0.2.7]:2222", "--", "gate"),
    )
    other = asyncio.run(resolve(Destination("web", "carol", 23), options))
    assert (other.host, other.port, other.user) == ("web", 23, "carol")


def test_options_that_ssh_does_not_know_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"(?i)bad configuration option: nosuchthing"):
        asyncio.run(resolve(Destination("db2"), SshOptions(options=("NoSuchThing=1",), config="none")))


def test_commands_run_there(server: Server) -> None:
    async def act(connection: ssh.Connection) -> tuple[int, bytes, bytes]:
        assert connection.addresses == ("127.0.0.1", "127.0.0.1")
        return await connection.run("cat; echo oops >&2; exit 3", stdin=b"in", timeout=10)

    assert through(server, server.options(), act) == (3, b"in", b"oops\n")


def test_a_proxy_command_is_used(server: Server, tmp_path: Path) -> None:
    """The host is one that only the proxy can reach."""
    relay = tmp_path / "relay.py"
    relay.write_text(
        "import os, select, socket, sys\n"
        f"s = socket.create_connection(('127.0.0.1', {server.port}))\n"
        "while True:\n"
        "    for f in select.select([0, s], [], [])[0]:\n"
        "        data = os.read(0, 65536) if f == 0 else s.recv(65536)\n"
        "        if not data: sys.exit()\n"
        "        s.sendall(data) if f == 0 else os.write(1, data)\n"
    )
    options = server.options(f"ProxyCommand={sys.executable} {relay} %h %p", "HostKeyAlias=hidden")
    known = Path(options.options[0].partition("=")[2])
    known.write_text(known.read_text().replace(f"[127.0.0.1]:{server.port}", f"hidden,[hidden]:{server.port}"))

    async def main() -> tuple[int, bytes, bytes]:
        destination = dataclasses.replace(server.destination, host="hidden.example")
        async with ssh.connect(destination, options) as connection:
            return await connection.run("echo there", timeout=10)

    assert asyncio.run(main())[1] == b"there\n"


async def nothing(_: ssh.Connection) -> None:
    pytest.fail("connected")


def test_a_closed_port_is_10() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        destination = Destination("127.0.0.1", "root", unused.getsockname()[1])

        async def main() -> None:
            async with ssh.connect(destination, SshOptions(config="none")):
                pytest.fail("connected")

        with pytest.raises(ConnectError, match=r"port \d+: Connection refused") as raised:
            asyncio.run(main())
    assert raised.value.exit_status == 10
    assert raised.value.advice


def test_a_host_that_says_nothing_is_10() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        destination = Destination("127.0.0.1", "root", silent.getsockname()[1])

        async def main() -> None:
            async with ssh.connect(destination, SshOptions(config="none", connect_timeout=0.5)):
                pytest.fail("connected")

        with pytest.raises(ConnectError, match=r"did not answer within 0\.5 s"):
            asyncio.run(main())


def test_an_unknown_host_key_is_11_and_told(server: Server, tmp_path: Path) -> None:
    with pytest.raises(AuthenticationError, match=r"is not known: ssh-ed25519 SHA256:") as raised:
        through(server, server.options(known=tmp_path / "empty"), nothing)
    assert raised.value.exit_status == 11
    assert "accept-new" in raised.value.advice


@pytest.mark.parametrize("strict", ["yes", "ask", "accept-new", "no"])
def test_a_changed_host_key_is_11_whatever_strictness(server: Server, tmp_path: Path, strict: str) -> None:
    known = server.known_hosts(make_key(tmp_path / "other"))
    with pytest.raises(AuthenticationError, match="not the known one") as raised:
        through(server, server.options(f"StrictHostKeyChecking={strict}", known=known), nothing)
    assert f"ssh-keygen -R '[127.0.0.1]:{server.port}'" in raised.value.advice


def test_accept_new_remembers(server: Server, tmp_path: Path) -> None:
    async def act(connection: ssh.Connection) -> bytes:
        return (await connection.run("echo yes", timeout=10))[1]

    known = tmp_path / "new" / "known_hosts"
    assert through(server, server.options("StrictHostKeyChecking=accept-new", known=known), act) == b"yes\n"
    assert through(server, server.options("StrictHostKeyChecking=yes", known=known), act) == b"yes\n"
    assert len(known.read_text().splitlines()) == 1


def test_a_key_that_is_not_authorized_is_11(server: Server, tmp_path: Path) -> None:
    options = server.options(identity=(str(make_key(tmp_path / "stranger")),))
    with pytest.raises(AuthenticationError, match=r"does not let .* in: .*stranger") as raised:
        through(server, options, nothing)
    assert "ssh-copy-id" in raised.value.advice


def test_an_agent_greets_and_speaks_frames(server: Server, tmp_path: Path) -> None:
    theirs = hello.local(frozenset({"a", "b"}))
    (tmp_path / "hello").write_bytes(theirs.line())
    # Noise of a login shell first; then our hello is read (one line), and every byte after it comes back.
    command = script(tmp_path / "phaul", f"echo Welcome; cat {tmp_path}/hello; read -r line; exec cat\n")

    async def act(connection: ssh.Connection) -> None:
        ours = hello.local(frozenset({"b", "c"}))
        agent = await connection.start_agent(ours)
        assert agent.hello == theirs
        assert agent.agreement.features == frozenset({"b"})
        link = agent.link()
        frame = Frame(3, os.urandom(300_000), 7)
        await link.send(frame)
        assert await link.receive() == frame
        await link.close()

    through(server, server.options(remote_command=command), act)


def test_the_end_of_the_connection_is_the_end_of_the_link(server: Server, tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(hello.local().line())
    command = script(tmp_path / "phaul", f"cat {tmp_path}/hello; exec sleep 60\n")

    async def act(connection: ssh.Connection) -> None:
        agent = await connection.start_agent(hello.local())
        await connection.close()
        with pytest.raises(ChannelClosed):
            await asyncio.wait_for(agent.link().receive(), 5)

    through(server, server.options(remote_command=command), act)


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ("exit 87", VersionError, "is not installed"),
        ("exit 88", AuthenticationError, "may not become root.*there is no sudo"),
        ("echo 'sudo: a password is required' >&2; exit 1", AuthenticationError, "a password is required"),
        ("echo 'no module named phaul' >&2; exit 1", VersionError, "exit status 1; it said 'no module"),
        ("echo 'phaul, version 0'; exec sleep 0.1", VersionError, "did not start: exit status 0"),
        ("sleep 30", ConnectError, "said nothing within"),
    ],
)
def test_what_comes_in_place_of_an_agent(
    server: Server, tmp_path: Path, text: str, error: type[PhaulError], why: str
) -> None:
    command = script(tmp_path / "phaul", text)
    wait = 1.5 if "sleep 30" in text else 10

    async def act(connection: ssh.Connection) -> None:
        connection.options = dataclasses.replace(connection.options, connect_timeout=wait)
        await connection.start_agent(hello.local())

    with pytest.raises(error, match=why):
        through(server, server.options(remote_command=command), act)


def test_phaul_that_is_not_there_names_the_way_to_put_it_there(server: Server) -> None:
    async def act(connection: ssh.Connection) -> None:
        await connection.start_agent(hello.local())

    with pytest.raises(VersionError, match="not installed") as raised:
        through(server, server.options(remote_command="/no/such/phaul"), act)
    assert raised.value.exit_status == 12
    assert "phaul deploy" in raised.value.advice


def test_an_agent_of_another_age_is_12(server: Server, tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(dataclasses.replace(hello.local(), version="9.9", protocols=(8, 9)).line())
    command = script(tmp_path / "phaul", f"cat {tmp_path}/hello; exec cat\n")

    async def act(connection: ssh.Connection) -> None:
        await connection.start_agent(hello.local())

    with pytest.raises(VersionError, match=r"phaul 9\.9 on .* speaks protocols 8 to 9"):
        through(server, server.options(remote_command=command), act)


def test_ports_are_forwarded(server: Server) -> None:
    async def act(connection: ssh.Connection) -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            port = await connection.forward("127.0.0.1", listener.getsockname()[1])
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            loop = asyncio.get_running_loop()
            accepted, _ = await asyncio.wait_for(loop.sock_accept(listener), 5)
            writer.write(b"through")
            with accepted:
                data = await asyncio.wait_for(loop.sock_recv(accepted, 100), 5)
            writer.close()
            return data

    assert through(server, server.options(), act) == b"through"

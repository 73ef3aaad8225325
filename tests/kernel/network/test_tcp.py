"""TCP sockets move between two network namespaces with a live peer in a third, which must not notice."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import core_pb2, fdinfo_pb2
from phaul_engine.network import undo
from phaul_engine.objects import socket_options, tcp, tcp_stream, waking  # noqa: F401 (tcp registers its kind)
from phaul_engine.objects.tcp_stream import State

from .lab import SERVICE, Host, Lab, Move, ip

BOTH = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])


def listen(host: Host, family: int, port: int = 7000, backlog: int = 50) -> socket.socket:
    """A listener at the service address."""
    sock = host.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((SERVICE[family], port))
    sock.listen(backlog)
    return sock


def connect(lab: Lab, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A client and the connection that the listener accepted from it."""
    client = lab.client.socket(listener.family, socket.SOCK_STREAM)
    client.settimeout(10)
    client.connect(listener.getsockname()[:2])
    server, _ = listener.accept()
    return client, server


def state(sock: socket.socket) -> State:
    return State(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0])


def retransmits(sock: socket.socket) -> int:
    """Retransmitted segments in a connection's life (tcpi_total_retrans)."""
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for(sock: socket.socket, wanted: State) -> None:
    deadline = time.monotonic() + 5
    while state(sock) is not wanted:
        assert time.monotonic() < deadline, f"{state(sock).name}, not {wanted.name}"
        time.sleep(0.005)


def receive(sock: socket.socket, length: int) -> bytes:
    sock.settimeout(10)
    got = b""
    while len(got) < length and (piece := sock.recv(length - len(got))):
        got += piece
    return got


def carry(lab: Lab, move: Move, sockets: list[socket.socket], *, early: bool = True) -> list[socket.socket]:
    """The whole way, early build included; the originals die as they would, silently."""
    if early:
        assert not move.collect(sockets, survey=True).blockers
        move.rebuild()
    collection = move.collect(sockets, survey=False)
    assert [str(blocker) for blocker in collection.blockers] == []
    if not early:
        move.rebuild()
    move.settle()
    lab.move_address(sockets[0].family)
    made = move.release()
    for sock in sockets:
        sock.close()
    return made


@BOTH
def test_connection_with_both_queues(lab: Lab, move: Move, family: int) -> None:
    with closing(listen(lab.source, family)) as listener:
        client, server = connect(lab, listener)
        to_server, to_client = bytes(range(256)) * 40, b"0123456789abcdef" * 600
        client.sendall(to_server)
        server.sendall(to_client)
        time.sleep(0.05)
        new_listener, new_server = carry(lab, move, [listener, server])
        assert new_server.getpeername() == client.getsockname()
        assert receive(new_server, len(to_server)) == to_server
        assert receive(client, len(to_client)) == to_client
        for _ in range(20):
            client.sendall(b"ping")
            assert receive(new_server, 4) == b"ping"
            new_server.sendall(b"pong")
            assert receive(client, 4) == b"pong"
        assert retransmits(client) == 0
        later, accepted = connect(lab, new_listener)
        later.sendall(b"new")
        assert receive(accepted, 3) == b"new"
        for sock in (client, new_listener, new_server, later, accepted):
            sock.close()


@BOTH
def test_unsent_data_follows(lab: Lab, move: Move, family: int) -> None:
    """A peer that does not read closes its window: what stands behind it was never sent."""
    with closing(listen(lab.source, family)) as listener:
        client = lab.client.socket(family, socket.SOCK_STREAM)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((SERVICE[family], 7000))
        server, _ = listener.accept()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
        server.setblocking(False)
        content = b"".join(struct.pack(">I", number) for number in range(60_000))
        sent = 0
        while sent < len(content):
            try:
                sent += server.send(content[sent:])
            except BlockingIOError:
                break
        time.sleep(0.05)
        (new_server,) = carry(lab, move, [server])
        stream = move.checkpoint.records("tcp-stream", move.checkpoint.records("files")[0].message.isk.ino)[0].message
        assert stream.unsq_len > 0
        assert new_server.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 800_000
        assert not os.get_blocking(new_server.fileno())
        assert receive(client, sent) == content[:sent]
        new_server.setblocking(True)
        new_server.sendall(b"end")
        assert receive(client, 3) == b"end"
        for sock in (client, new_server):
            sock.close()


@BOTH
@pytest.mark.parametrize("wanted", [State.CLOSE_WAIT, State.FIN_WAIT2, State.FIN_WAIT1, State.LAST_ACK, State.CLOSING])
def test_half_closed(lab: Lab, move: Move, family: int, wanted: State) -> None:
    with closing(listen(lab.source, family)) as listener:
        client, server = connect(lab, listener)
        client.sendall(b"question")
        server.sendall(b"answer")
        time.sleep(0.02)
        mute = wanted in (State.FIN_WAIT1, State.LAST_ACK, State.CLOSING)
        if wanted is State.CLOSING:
            link_down(lab)
            server.shutdown(socket.SHUT_WR)
            client.shutdown(socket.SHUT_WR)
            play_client_fin(lab, client, server)
        else:
            if wanted in (State.CLOSE_WAIT, State.LAST_ACK):
                client.shutdown(socket.SHUT_WR)
                wait_for(server, State.CLOSE_WAIT)
            if mute:
                link_down(lab)
            if wanted is not State.CLOSE_WAIT:
                server.shutdown(socket.SHUT_WR)
        wait_for(server, wanted)
        (new_server,) = carry(lab, move, [server])
        assert receive(new_server, 8) == b"question"
        assert receive(client, 6) == b"answer"
        if wanted in (State.CLOSE_WAIT, State.LAST_ACK, State.CLOSING):
            assert new_server.recv(1) == b""
        if wanted is State.CLOSE_WAIT:
            assert state(new_server) is wanted
            new_server.sendall(b"late")
            assert receive(client, 4) == b"late"
            new_server.shutdown(socket.SHUT_WR)
        else:
            with pytest.raises(BrokenPipeError):
                new_server.send(b"x", socket.MSG_NOSIGNAL)
        assert client.recv(1) == b""
        if wanted in (State.FIN_WAIT1, State.FIN_WAIT2):
            wait_for(new_server, State.FIN_WAIT2)
            client.sendall(b"more")
            assert receive(new_server, 4) == b"more"
            client.shutdown(socket.SHUT_WR)
            assert new_server.recv(1) == b""
        wait_for(new_server, State.CLOSE)
        new_server.close()
        client.close()


@BOTH
@pytest.mark.parametrize("how", ["reset", "reset with bytes", "closed with bytes"])
def test_an_end_that_the_program_has_not_noticed(lab: Lab, move: Move, family: int, how: str) -> None:
    with closing(listen(lab.source, family)) as listener:
        client, server = connect(lab, listener)
        assert not move.collect([server], survey=True).blockers
        move.rebuild()
        content = bytes(range(256)) * 400 if "bytes" in how else b""
        client.sendall(content)
        wait_until(lambda: tcp_stream.unread(server) == len(content))
        if "reset" in how:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        else:
            server.shutdown(socket.SHUT_WR)
            client.close()
        wait_for(server, State.CLOSE)
        assert not move.collect([server], survey=False).blockers
        move.settle()
        lab.move_address(family)
        (made,) = move.release()
        server.close()
        assert receive(made, len(content)) == content
        if "reset" in how:
            with pytest.raises(ConnectionResetError):
                made.recv(1)
        assert made.recv(1) == b""
        made.close()


def test_a_refusal_that_the_program_has_not_noticed(lab: Lab, move: Move) -> None:
    asking = lab.source.socket(socket.AF_INET, socket.SOCK_STREAM)
    asking.setblocking(False)
    with pytest.raises(BlockingIOError):
        asking.connect(("10.99.0.9", 9))
    wait_for(asking, State.CLOSE)
    (made,) = carry(lab, move, [asking])
    assert made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
    made.close()


@BOTH
def test_a_request_for_a_connection_is_made_again(lab: Lab, move: Move, family: int) -> None:
    """The peer has not heard the first one; it hears the second, from the same port."""
    here = "10.99.0.9" if family == socket.AF_INET else "fd99::9"
    with closing(lab.client.socket(family, socket.SOCK_STREAM)) as deaf:
        deaf.bind((here, 7000))
        deaf.listen()
        socket_options.write_filter(deaf, struct.pack("HBBI", 6, 0, 0, 0))
        asking = lab.source.socket(family, socket.SOCK_STREAM)
        asking.bind((SERVICE[family], 0))
        asking.setblocking(False)
        with pytest.raises(BlockingIOError):
            asking.connect((here, 7000))
        port = asking.getsockname()[1]
        assert not move.collect([asking], survey=True).blockers
        move.rebuild()
        assert not move.collect([asking], survey=False).blockers
        move.settle()
        asking.close()
        lab.move_address(family)
        socket_options.write_filter(deaf, b"")
        (made,) = move.release()
        deaf.settimeout(10)
        accepted, address = deaf.accept()
        assert address[:2] == (SERVICE[family], port)
        wait_for(made, State.ESTABLISHED)
        assert not os.get_blocking(made.fileno())
        accepted.sendall(b"welcome")
        assert receive(made, 7) == b"welcome"
        made.close()
        accepted.close()


def link_down(lab: Lab) -> None:
    """Packets between source and client are lost from now on."""
    ip("link", "set", "p1", "down", ns=lab.client.name)


def play_client_fin(lab: Lab, client: socket.socket, server: socket.socket) -> None:
    """The client's FIN reaches the server though the link is down, and says nothing of the server's FIN."""
    stream = tcp_stream.read(client)
    assert stream is not None
    fin = (stream.written_to - 1) & 0xFFFFFFFF
    replayer = lab.source.inside(lambda: tcp_stream.Replayer(server.family))
    here, there = client.getsockname(), server.getsockname()
    replayer.play(tcp_stream.Played(here[:2], there[:2], fin, stream.received_to, 0x11, 500))
    replayer.close()
    tcp_stream.resume_source(client, reuse=False)


@BOTH
def test_options_arrive(lab: Lab, move: Move, family: int) -> None:
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 7),
        (socket.SOL_SOCKET, socket.SO_PRIORITY, 3),
        (socket.SOL_SOCKET, socket.SO_MARK, 99),
        (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 11),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12345),
        (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 16384),
        (socket.IPPROTO_TCP, socket.TCP_LINGER2, 17),
    ]
    with closing(listen(lab.source, family)) as listener:
        client, server = connect(lab, listener)
        for level, name, value in options:
            server.setsockopt(level, name, value)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 9))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 3, 500_000))
        program = struct.pack("HBBI", 6, 0, 0, 0xFFFF) * 2
        socket_options.write_filter(server, program)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        before = [socket_options.read(sock) for sock in (listener, server)]
        made = carry(lab, move, [listener, server])
        for was, sock in zip(before, made, strict=True):
            now = socket_options.read(sock)
            different = {
                key: (value, now.values.get(key))
                for key, value in was.values.items()
                if now.values.get(key) != value and key not in ((6, 2), (6, 10), (1, 7), (1, 8))
            }
            assert different == {}
            assert now.filter == was.filter
        client.sendall(b"1234567")
        assert receive(made[1], 7) == b"1234567"
        for sock in (client, *made):
            sock.close()


def test_a_hundred_connections(lab: Lab, move: Move, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(listen(lab.source, socket.AF_INET, backlog=200)) as listener:
        pairs = [connect(lab, listener) for _ in range(100)]
        for number, (client, server) in enumerate(pairs):
            client.sendall(b"c%03d" % number)
            server.sendall(b"s%03d" % number)
        time.sleep(0.05)
        servers = [server for _, server in pairs]
        move.collect([listener, *servers], survey=True)
        move.rebuild()
        started = time.perf_counter()
        move.collect([listener, *servers], survey=False)
        read = time.perf_counter()
        move.settle()
        settled = time.perf_counter()
        lab.move_address(socket.AF_INET)
        about_to = time.perf_counter()
        made = move.release()
        released = time.perf_counter()
        for sock in (listener, *servers):
            sock.close()
        with capsys.disabled():
            print(
                f"\n100 connections: read {10_000 * (read - started):.0f} us each, settled"
                f" {10_000 * (settled - read):.0f}, released {10_000 * (released - about_to):.0f}"
            )
        for number, ((client, _), server) in enumerate(zip(pairs, made[1:], strict=True)):
            assert receive(server, 4) == b"c%03d" % number
            assert receive(client, 4) == b"s%03d" % number
            server.sendall(b"x")
            assert receive(client, 1) == b"x"
        assert sum(retransmits(client) for client, _ in pairs) == 0
        for sock in (*made, *(client for client, _ in pairs)):
            sock.close()


@BOTH
def test_source_goes_on_after_an_abort(lab: Lab, move: Move, family: int) -> None:
    with closing(listen(lab.source, family)) as listener:
        client, server = connect(lab, listener)
        client.sendall(b"question")
        time.sleep(0.02)
        move.collect([listener, server], survey=False)
        move.rebuild()
        move.settle()
        with pytest.raises(PermissionError):
            server.recv(1)
        assert tcp_stream.resume_source(server, reuse=True)
        assert not tcp_stream.resume_source(server, reuse=True)
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
        restoration = move.restoration
        assert restoration is not None
        for fd in restoration.made.values():
            socket.socket(fileno=fd).close()
        assert receive(server, 8) == b"question"
        server.sendall(b"answer")
        assert receive(client, 6) == b"answer"
        client.close()
        server.close()


def test_listener_is_deaf_until_the_commit(lab: Lab, move: Move) -> None:
    """A listener on every address: the destination's own address works before, and must not answer."""
    listener = lab.source.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("0.0.0.0", 7001))
    listener.listen(5)
    move.collect([listener], survey=True)
    move.rebuild()
    client = lab.client.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.connect(("10.99.0.2", 7001))
    client.close()
    move.collect([listener], survey=False)
    move.settle()
    (made,) = move.release()
    listener.close()
    client = lab.client.socket(socket.AF_INET, socket.SOCK_STREAM)
    client.settimeout(5)
    client.connect(("10.99.0.2", 7001))
    accepted, _ = made.accept()
    for sock in (client, accepted, made):
        sock.close()


@pytest.mark.parametrize("choice", ["close", "refuse"])
def test_connections_that_shall_not_move(lab: Lab, move: Move, choice: str) -> None:
    with closing(listen(lab.source, socket.AF_INET)) as listener:
        client, server = connect(lab, listener)
        collection = move.collect([server], survey=False, tcp=choice)
        assert bool(collection.blockers) == (choice == "refuse")
        if choice == "close":
            move.rebuild()
            move.settle()
            (made,) = move.release()
            assert made.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                made.send(b"x", socket.MSG_NOSIGNAL)
            made.close()
        client.close()
        server.close()


def test_a_taken_port_is_found_early(lab: Lab, move: Move) -> None:
    with closing(listen(lab.source, socket.AF_INET)) as listener:
        other = lab.destination.socket(socket.AF_INET, socket.SOCK_STREAM)
        other.bind(("0.0.0.0", 7000))
        other.listen()
        move.collect([listener], survey=True)
        with pytest.raises(RebuildError, match="7000"):
            move.rebuild()
        other.close()


@pytest.mark.parametrize("wanted", [State.ESTABLISHED, State.CLOSE_WAIT])
def test_whoever_comes_later_can_wake_it(lab: Lab, move: Move, tmp_path: Path, wanted: State) -> None:
    """The agent died after the commit: the journal's entry is enough to let the sockets be heard of."""
    with closing(listen(lab.source, socket.AF_INET)) as listener:
        client, server = connect(lab, listener)
        client.sendall(b"question")
        if wanted is State.CLOSE_WAIT:
            client.shutdown(socket.SHUT_WR)
            wait_for(server, wanted)
        time.sleep(0.02)
        move.collect([listener, server], survey=False)
        restoration = move.rebuild()
        move.settle()
        checkpoint = restoration.checkpoint
        checkpoint.put("ids", 1, core_pb2.task_kobj_ids_entry(vm_id=1, files_id=1, fs_id=1, sighand_id=1))
        for file_id, fd in restoration.made.items():
            checkpoint.put("fdinfo", 1, fdinfo_pb2.fdinfo_entry(id=file_id, flags=0, type=fdinfo_pb2.INETSK, fd=fd))
        entry = json.loads(json.dumps(waking.entry(restoration, str(tmp_path / "wake"))))
        lab.move_address(socket.AF_INET)
        lab.destination.inside(lambda: undo.redo(entry))
        undo.redo(entry)
        assert os.listdir(tmp_path) == []
        made_listener, made = (socket.socket(fileno=fd) for fd in restoration.made.values())
        server.close()
        assert receive(made, 8) == b"question"
        assert state(made) is wanted
        made.sendall(b"answer")
        assert receive(client, 6) == b"answer"
        later, accepted = connect(lab, made_listener)
        for sock in (client, made, later, accepted, made_listener):
            sock.close()

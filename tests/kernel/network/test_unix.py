"""Unix sockets with their peers, names, queues and descriptors on the way."""

from __future__ import annotations

import array
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.network import undo
from phaul_engine.objects import pipe, regular_file, unix_socket  # noqa: F401 (kinds register themselves)
from phaul_engine.proc.sock_diag import DiagSocket

from .lab import Lab, Move

KINDS = pytest.mark.parametrize(
    "kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET], ids=["stream", "dgram", "seqpacket"]
)


def carry(move: Move, sockets: list[socket.socket]) -> list[socket.socket]:
    """The whole way; the originals are gone before anything is published, as on a host of their own."""
    assert move.collect(sockets, survey=True).blockers == []
    move.rebuild()
    assert move.collect(sockets, survey=False).blockers == []
    move.settle()
    for sock in sockets:
        sock.close()
    return move.release()


def pair(lab: Lab, kind: int) -> tuple[socket.socket, socket.socket]:
    return lab.source.inside(lambda: socket.socketpair(socket.AF_UNIX, kind))


@KINDS
def test_pair_with_queues(lab: Lab, move: Move, kind: int) -> None:
    left, right = pair(lab, kind)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    left.sendall(b"one")
    left.sendall(b"two")
    right.sendall(b"three")
    a, b = carry(move, [left, right])
    if kind == socket.SOCK_STREAM:
        assert b.recv(100) == b"onetwo"
    else:
        assert [b.recv(100), b.recv(100)] == [b"one", b"two"]
    assert a.recv(100) == b"three"
    assert a.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
    a.sendall(b"on")
    assert b.recv(100) == b"on"
    b.close()
    a.close()


@KINDS
def test_peer_is_gone(lab: Lab, move: Move, kind: int) -> None:
    left, right = pair(lab, kind)
    right.sendall(b"last words")
    right.close()
    (a,) = carry(move, [left])
    assert a.recv(100) == b"last words"
    if kind == socket.SOCK_DGRAM:
        with pytest.raises(ConnectionRefusedError):
            a.send(b"x")
    else:
        assert a.recv(100) == b""
        with pytest.raises(BrokenPipeError):
            a.send(b"x", socket.MSG_NOSIGNAL)
    a.close()


def test_peer_left_without_reading(lab: Lab, move: Move) -> None:
    left, right = pair(lab, socket.SOCK_STREAM)
    left.sendall(b"never read")
    right.close()
    (a,) = carry(move, [left])
    with pytest.raises(ConnectionResetError):
        a.recv(1)
    assert a.recv(1) == b""
    a.close()


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR])
def test_half_closed(lab: Lab, move: Move, how: int) -> None:
    left, right = pair(lab, socket.SOCK_STREAM)
    left.sendall(b"before")
    right.sendall(b"back")
    left.shutdown(how)
    a, b = carry(move, [left, right])
    if how == socket.SHUT_WR:
        assert b.recv(10) == b"before"
        assert b.recv(10) == b""
        assert a.recv(10) == b"back"
    else:
        assert b.recv(10) == b"before"
        with pytest.raises(BrokenPipeError):
            b.send(b"x", socket.MSG_NOSIGNAL)
    a.close()
    b.close()


@pytest.mark.parametrize("spelling", ["absolute", "relative", "renamed", "abstract"])
def test_listener_and_connections(
    lab: Lab, move: Move, tmp_path: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "service.sock"
    name = {"relative": "service.sock", "abstract": f"\0phaul-{os.getpid()}"}.get(spelling, str(path))
    monkeypatch.chdir(tmp_path)
    listener = lab.source.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(name)
    listener.listen(7)
    if spelling != "abstract":
        os.chmod(path, 0o620)
        os.chown(path, 123, 456)
    if spelling == "renamed":
        path = path.rename(tmp_path / "elsewhere.sock")
    reach = name if spelling == "abstract" else str(path)
    client = lab.source.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(reach)
    server, _ = listener.accept()
    server_name = server.getsockname()
    client.sendall(b"question")
    waiting = lab.source.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    waiting.connect(reach)
    new_listener, new_server, new_client, new_waiting = carry(move, [listener, server, client, waiting])
    assert new_listener.getsockname() == new_server.getsockname() == server_name == new_client.getpeername()
    assert new_server.recv(100) == b"question"
    new_server.sendall(b"answer")
    assert new_client.recv(100) == b"answer"
    new_waiting.sendall(b"hello")
    accepted, _ = new_listener.accept()
    assert accepted.recv(100) == b"hello"
    if spelling != "abstract":
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o620, 123, 456)
        assert os.listdir(tmp_path) == [path.name]
    with DiagSocket(lab.destination.net) as diag:
        assert 7 in {found.send_queue for found in diag.unix().values() if found.state == 10}
    late = lab.destination.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    late.connect(reach)
    for sock in (late, accepted, new_listener, new_server, new_client, new_waiting):
        sock.close()


def test_a_discarded_tree_leaves_no_file(lab: Lab, move: Move, tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = lab.source.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    before = path.stat().st_ino
    move.collect([listener], survey=True)
    restoration = move.rebuild()
    (entry,) = unix_socket.staged_entries(restoration)
    assert len(os.listdir(tmp_path)) == 2
    undo.undo(entry)
    undo.undo(entry)
    assert os.listdir(tmp_path) == ["s"]
    assert path.stat().st_ino == before
    for made in move.release():
        made.close()
    listener.close()


def test_path_of_another_program(lab: Lab, move: Move, tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = lab.source.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    move.collect([listener], survey=True)
    path.unlink()
    other = lab.destination.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    other.bind(str(path))
    with pytest.raises(RebuildError, match="another program"):
        move.rebuild()
    other.close()
    listener.close()


@KINDS
def test_descriptors_on_the_way(lab: Lab, move: Move, kind: int, tmp_path: Path) -> None:
    """A pipe is sent through a socket and in no table any more: both ends come out at the destination."""
    left, right = pair(lab, kind)
    reading, writing = os.pipe()
    os.write(writing, b"in the pipe")
    message = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reading, writing]))]
    left.sendmsg([b"a"], message)
    left.sendmsg([b"b"])
    os.close(reading)
    os.close(writing)
    move.collect([left, right], survey=True)
    move.rebuild()
    collection = move.collect([left, right], survey=False)
    assert collection.blockers == []
    move.settle()
    left.close()
    right.close()
    a, b = move.release()
    content, ancillary, _, _ = b.recvmsg(1, 1024)
    assert content == b"a"
    got = struct.unpack("ii", ancillary[0][2])
    assert os.read(got[0], 100) == b"in the pipe"
    os.write(got[1], b"again")
    assert os.read(got[0], 100) == b"again"
    assert b.recv(100) == b"b"
    for fd in got:
        os.close(fd)
    a.close()
    b.close()


def test_datagram_sockets(lab: Lab, move: Move, tmp_path: Path) -> None:
    """A named receiver with datagrams from several senders, one of which is connected to it and nameless."""
    path = str(tmp_path / "receiver")
    receiver = lab.source.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(path)
    named = lab.source.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    named.bind(f"\0phaul-sender-{os.getpid()}")
    named.sendto(b"from a name", path)
    sender = lab.source.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.connect(path)
    sender.send(b"connected")
    gone = lab.source.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    gone.bind(str(tmp_path / "gone"))
    gone.sendto(b"from the dead", path)
    gone.close()
    sender_name = named.getsockname()
    new_receiver, new_named, new_sender = carry(move, [receiver, named, sender])
    assert new_receiver.recvfrom(100) == (b"from a name", sender_name)
    assert new_receiver.recvfrom(100)[0] == b"connected"
    assert new_receiver.recvfrom(100) == (b"from the dead", str(tmp_path / "gone"))
    new_sender.send(b"still connected")
    assert new_receiver.recv(100) == b"still connected"
    assert new_named.getsockname() == sender_name
    for sock in (new_receiver, new_named, new_sender):
        sock.close()


def test_datagram_sockets_connected_to_themselves_or_to_the_dead(lab: Lab, move: Move, tmp_path: Path) -> None:
    own = lab.source.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    own.bind(str(tmp_path / "own"))
    own.connect(str(tmp_path / "own"))
    own.send(b"to myself")
    dead = lab.source.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    dead.bind(str(tmp_path / "dead"))
    mourner = lab.source.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    mourner.bind(f"\0phaul-mourner-{os.getpid()}")
    dead.sendto(b"last words", mourner.getsockname())
    mourner.connect(str(tmp_path / "dead"))
    dead.close()
    new_own, new_mourner = carry(move, [own, mourner])
    new_own.send(b"again")
    assert [new_own.recv(100), new_own.recv(100)] == [b"to myself", b"again"]
    assert new_mourner.recvfrom(100) == (b"last words", str(tmp_path / "dead"))
    assert new_mourner.getpeername() == str(tmp_path / "dead")
    with pytest.raises(ConnectionRefusedError):
        new_mourner.send(b"x")
    new_own.close()
    new_mourner.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory that is a mount of its own, as one that hosts share is."""
    made = tmp_path / "place"
    made.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", made], check=True)
    yield made
    if made.exists():
        subprocess.run(["umount", "-l", made], check=True)


@pytest.mark.parametrize("state", ["listening", "its file is gone", "its directory is gone", "longest name"])
def test_a_name_moves_twice(lab: Lab, move: Move, place: Path, state: str) -> None:
    """What the kernel tells of a socket that was rebuilt has to be enough to rebuild it again."""
    if "directory" in state:
        place = place / "below"
        place.mkdir()
    path = place / ("s" * (107 - len(str(place)) - 1) if state == "longest name" else "s")
    listener = lab.source.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    client = lab.source.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(path))
    server, _ = listener.accept()
    if "gone" in state:
        path.unlink()
    if "directory" in state:
        place.rmdir()
    first = carry(move, [listener, server, client])
    back = Move(lab.destination.net, lab.source.net)
    try:
        listener, server, client = carry(back, first)
        assert {listener.getsockname(), server.getsockname(), client.getpeername()} == {str(path)}
        server.send(b"hello")
        assert client.recv(10) == b"hello"
        if "gone" not in state:
            late = lab.source.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            late.connect(str(path))
            late.close()
            assert os.listdir(place) == [path.name]
    finally:
        back.close()
        for sock in (listener, server, client):
            sock.close()


def test_log_daemon(lab: Lab, move: Move, tmp_path: Path) -> None:
    """A datagram socket connected to a program that stays finds the one of that name at the destination."""
    path = tmp_path / "log"
    daemon = lab.source.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    daemon.bind(str(path))
    sender = lab.source.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.connect(str(path))
    assert move.collect([sender], survey=True).blockers == []
    path.unlink()
    with pytest.raises(RebuildError, match="log"):
        move.rebuild()
    other = lab.destination.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    other.bind(str(path))
    move.rebuild()
    move.collect([sender], survey=False)
    move.settle()
    (made,) = move.release()
    made.send(b"line")
    assert other.recv(100) == b"line"
    for sock in (daemon, sender, other, made):
        sock.close()


def test_the_other_end_stays(lab: Lab, move: Move) -> None:
    left, right = pair(lab, socket.SOCK_STREAM)
    (blocker,) = move.collect([left], survey=True).blockers
    assert f"of pid {os.getpid()} (" in str(blocker)
    assert f"fd {right.fileno()} " in str(blocker)
    left.close()
    right.close()

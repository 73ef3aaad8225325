"""What of sockets cannot be carried is named before anything is touched; what passes by itself can be tried again."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest
from phaul_engine.errors import Blocker, BusyError, refusal
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.objects import udp, unix_socket, unsupported  # noqa: F401 (two register their kinds)
from phaul_engine.objects.base import Collection, kind_of

from .lab import SERVICE, Lab, Move
from .test_tcp import BOTH, carry, connect, listen

_MPTCP, _SCTP = 262, 132
_TCP_MD5SIG, _TCP_ULP = 14, 31
_UDP_CORK = 1
_IPV6_FLOWLABEL_MGR, _IPV6_FLOWINFO_SEND = 32, 33
_CREATE, _EXCLUSIVE = 1, 1


def blockers(move: Move, *socks: socket.socket, survey: bool = True) -> list[Blocker]:
    return move.collect(list(socks), survey=survey).blockers


@pytest.mark.parametrize(
    ("family", "kind", "protocol", "name"),
    [
        pytest.param(socket.AF_PACKET, socket.SOCK_RAW, 0, "a packet socket", id="packet"),
        pytest.param(socket.AF_INET, socket.SOCK_STREAM, _SCTP, "an SCTP socket", id="sctp"),
        pytest.param(socket.AF_VSOCK, socket.SOCK_STREAM, 0, "a socket to a virtual machine", id="vsock"),
        pytest.param(socket.AF_ALG, socket.SOCK_SEQPACKET, 0, "a socket of the kernel's cryptography", id="alg"),
    ],
)
def test_sockets_that_are_not_carried(lab: Lab, move: Move, family: int, kind: int, protocol: int, name: str) -> None:
    try:
        sock = lab.source.socket(family, kind, protocol)
    except OSError as error:
        pytest.skip(f"this kernel has no such sockets: {error}")
    with closing(sock):
        descriptor = move.descriptor(sock.fileno())
        assert kind_of(descriptor) is None
        collection = Collection(Checkpoint(), survey=True)
        unsupported.block(descriptor, collection)
        assert name in collection.blockers[0].kind


def test_mptcp(lab: Lab, move: Move) -> None:
    with closing(lab.source.socket(socket.AF_INET, socket.SOCK_STREAM, _MPTCP)) as listener:
        listener.bind((SERVICE[socket.AF_INET], 7000))
        listener.listen()
        client = lab.client.socket(socket.AF_INET, socket.SOCK_STREAM, _MPTCP)
        client.connect((SERVICE[socket.AF_INET], 7000))
        server, _ = listener.accept()
        assert [one.kind for one in blockers(move, listener, server)] == ["an MPTCP socket"] * 2
        server.close()
        client.close()


@BOTH
def test_keys(lab: Lab, move: Move, family: int) -> None:
    """A listener with an MD5 key for a peer, and a connection that uses it (RFC 2385)."""
    peer = socket.inet_pton(family, "10.99.0.9" if family == socket.AF_INET else "fd99::9")
    here = socket.inet_pton(family, SERVICE[family])
    with closing(listen(lab.source, family)) as listener, closing(listen(lab.source, family, port=7001)) as other:
        listener.setsockopt(socket.IPPROTO_TCP, _TCP_MD5SIG, signature(family, peer))
        client = lab.client.socket(family, socket.SOCK_STREAM)
        client.settimeout(5)
        client.setsockopt(socket.IPPROTO_TCP, _TCP_MD5SIG, signature(family, here))
        client.connect(listener.getsockname()[:2])
        server, _ = listener.accept()
        assert ["with keys" in one.kind for one in blockers(move, listener, server)] == [True, True]
        plain, answer = connect(lab, other)
        assert blockers(move, other, answer) == []
        for sock in (client, server, plain, answer):
            sock.close()


def signature(family: int, address: bytes) -> bytes:
    """struct tcp_md5sig."""
    place = struct.pack("=HH", family, 0) + (bytes(4) if family == socket.AF_INET6 else b"") + address
    return place.ljust(128, b"\0") + struct.pack("=BBHI80s", 0, 0, 6, 0, b"secret")


def test_kernel_tls(lab: Lab, move: Move) -> None:
    with closing(listen(lab.source, socket.AF_INET)) as listener:
        client, server = connect(lab, listener)
        with closing(client), closing(server):
            try:
                server.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                pytest.skip("this kernel has no kTLS")
            assert "the kernel runs tls on it" in blockers(move, server)[0].why


def test_a_flow_label_of_its_own(lab: Lab, move: Move) -> None:
    label = 0x12345
    there = socket.inet_pton(socket.AF_INET6, "fd99::9")
    with closing(lab.source.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as sock:
        sock.connect(("fd99::9", 9))
        assert blockers(move, sock) == []
        request = struct.pack("=16sIBBHHHI", there, socket.htonl(label), 0, _EXCLUSIVE, _CREATE, 0, 0, 0)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FLOWLABEL_MGR, request)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FLOWINFO_SEND, 1)
        sock.connect(("fd99::9", 9, label, 0))
        assert ["flow label" in one.kind for one in blockers(move, sock)] == [True]


def test_a_datagram_that_is_being_put_together(lab: Lab, move: Move) -> None:
    with closing(lab.source.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.connect(("10.99.0.9", 9))  # whose answer, that nobody is there, is no error of ours
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_CORK, 1)
        sock.send(b"half of it")
        assert blockers(move, sock) == []
        assert isinstance(refusal(blockers(move, sock, survey=False)), BusyError)
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_CORK, 0)
        assert blockers(move, sock, survey=False) == []
        sock.send(b"without the option", socket.MSG_MORE)
        assert isinstance(refusal(blockers(move, sock, survey=False)), BusyError)


def test_sockets_that_share_a_port(lab: Lab, move: Move) -> None:
    """Bound together, whatever SO_REUSEPORT says since; all of the group are served."""
    group = []
    for _ in range(3):
        sock = lab.source.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((SERVICE[socket.AF_INET], 7000))
        sock.listen(20)
        group.append(sock)
    group[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    made = carry(lab, move, group)
    assert [sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for sock in made] == [0, 1, 1]
    clients = []
    for _ in range(30):
        client = lab.client.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(5)
        client.connect((SERVICE[socket.AF_INET], 7000))
        clients.append(client)
    accepted = []
    for sock in made:
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                accepted.append(sock.accept()[0])
    assert len(accepted) == len(clients)
    for sock in (*made, *clients, *accepted):
        sock.close()


@pytest.mark.parametrize("named", [False, True], ids=["pair", "listener"])
def test_credentials_of_a_peer(lab: Lab, move: Move, named: bool) -> None:
    """Users and groups arrive; whose process it was does not."""

    name = f"\0phaul-credentials-{os.getpid()}"
    if named:
        listener, client = (lab.source.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
        listener.bind(name)
        with somebody(10, 20):
            listener.listen()
        with somebody(12, 22):
            client.connect(name)
        socks = [listener, client, listener.accept()[0]]
    else:
        socks = list(lab.source.inside(a_pair_of_somebody))
    before = [peer(sock) for sock in socks]
    assert before == ([(10, 20), (10, 20), (12, 22)] if named else [(10, 20)] * 2)
    move.collect(socks, survey=True)
    move.rebuild()
    move.collect(socks, survey=False)
    for sock in socks:
        sock.close()
    move.settle()
    made = move.release()
    assert [peer(sock) for sock in made] == before
    for sock in made:
        sock.close()


@contextmanager
def somebody(uid: int, gid: int) -> Iterator[None]:
    """With these effective ids."""
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def a_pair_of_somebody() -> tuple[socket.socket, socket.socket]:
    with somebody(10, 20):
        return socket.socketpair()


def peer(sock: socket.socket) -> tuple[int, int]:
    """User and group of SO_PEERCRED."""
    _, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid, gid

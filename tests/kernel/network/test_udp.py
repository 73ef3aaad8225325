"""Datagram, raw and netlink sockets."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from phaul_engine.objects import netlink_socket, socket_options, udp  # noqa: F401 (they register their kinds)

from .lab import SERVICE, Lab, Move, ip
from .test_tcp import BOTH


def carry(lab: Lab, move: Move, sockets: list[socket.socket], family: int = socket.AF_INET) -> list[socket.socket]:
    assert move.collect(sockets, survey=True).blockers == []
    move.rebuild()
    assert move.collect(sockets, survey=False).blockers == []
    move.settle()
    for sock in sockets:
        sock.close()
    lab.move_address(family)
    made = move.release()
    for sock in made:
        sock.settimeout(5)
    return made


@BOTH
@pytest.mark.parametrize("wildcard", [False, True], ids=["address", "wildcard"])
def test_bound_socket_with_a_queue(lab: Lab, move: Move, family: int, wildcard: bool) -> None:
    server = lab.source.socket(family, socket.SOCK_DGRAM)
    server.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 7300) if wildcard else (SERVICE[family], 7300))
    client = lab.client.socket(family, socket.SOCK_DGRAM)
    client.settimeout(5)
    client.bind(("fd99::9" if family == socket.AF_INET6 else "10.99.0.9", 0))
    sent = [b"first", b"second" * 200, b"third"]
    for content in sent:
        client.sendto(content, (SERVICE[family], 7300))
    time.sleep(0.02)
    (made,) = carry(lab, move, [server], family)
    for content in sent:
        assert made.recvfrom(4096) == (content, client.getsockname())
    client.sendto(b"question", (SERVICE[family], 7300))
    content, address = made.recvfrom(100)
    assert content == b"question"
    made.sendto(b"answer", address)
    assert client.recv(100) == b"answer"
    client.close()
    made.close()


@BOTH
def test_connected_socket_and_options(lab: Lab, move: Move, family: int) -> None:
    peer = lab.client.socket(family, socket.SOCK_DGRAM)
    peer.settimeout(5)
    peer.bind(("fd99::9" if family == socket.AF_INET6 else "10.99.0.9", 0))
    sock = lab.source.socket(family, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 300_000)
    sock.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
    sock.bind((SERVICE[family], 0))
    sock.connect(peer.getsockname()[:2])
    name, before = sock.getsockname(), socket_options.read(sock)
    (made,) = carry(lab, move, [sock], family)
    assert (made.getsockname(), made.getpeername()) == (name, peer.getsockname())
    now = socket_options.read(made).values
    assert {key: now.get(key) for key in before.values} == before.values
    made.send(b"out")
    assert peer.recvfrom(100)[0] == b"out"
    peer.sendto(b"back", name[:2])
    assert made.recv(100) == b"back"
    peer.close()
    made.close()


def test_deaf_until_the_commit(lab: Lab, move: Move) -> None:
    server = lab.source.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", 7301))
    move.collect([server], survey=True)
    restoration = move.rebuild()
    client = lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.sendto(b"too early", ("10.99.0.2", 7301))
    time.sleep(0.02)
    move.collect([server], survey=False)
    move.settle()
    (made,) = move.release()
    made.setblocking(False)
    with pytest.raises(BlockingIOError):
        made.recv(100)
    assert restoration.made
    client.close()
    made.close()
    server.close()


@BOTH
def test_multicast_membership(lab: Lab, move: Move, family: int) -> None:
    group = "ff05::1234" if family == socket.AF_INET6 else "239.1.2.3"
    sock = lab.source.socket(family, socket.SOCK_DGRAM)
    sock.bind(("", 7302))
    index = lab.source.inside(lambda: socket.if_nametoindex("e0"))
    if family == socket.AF_INET6:
        packed = socket.inet_pton(family, group)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, packed + struct.pack("i", index))
    else:
        request = socket.inet_aton(group) + socket.inet_aton("0.0.0.0") + struct.pack("i", index)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    (made,) = carry(lab, move, [sock], family)
    assert group in ip("maddr", "show", "dev", "e0", ns=lab.destination.name)
    sender = lab.client.socket(family, socket.SOCK_DGRAM)
    bridge = lab.client.inside(lambda: socket.if_nametoindex("br0"))
    if family == socket.AF_INET6:
        sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, bridge)
    else:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("4s4si", bytes(4), bytes(4), bridge))
    sender.sendto(b"to all", (group, 7302))
    assert made.recv(100) == b"to all"
    sender.close()
    made.close()


def test_raw_and_icmp(lab: Lab, move: Move) -> None:
    raw = lab.source.socket(socket.AF_INET, socket.SOCK_RAW, 200)
    raw.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
    raw6 = lab.source.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    raw6.setsockopt(socket.IPPROTO_ICMPV6, 1, b"\xff" * 31 + b"\x7f")  # ICMPV6_FILTER
    made, made6 = carry(lab, move, [raw, raw6])
    assert made.proto == 200
    assert made.getsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL) == 1
    assert made6.getsockopt(socket.IPPROTO_ICMPV6, 1, 32) == b"\xff" * 31 + b"\x7f"
    made.close()
    made6.close()


@pytest.fixture
def many_descriptors() -> Iterator[int]:
    """A number of a descriptor that select(2) does not take."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 3000), before[1]))
    yield 2000
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_netlink(lab: Lab, move: Move, many_descriptors: int) -> None:
    low = lab.source.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    sock = socket.socket(fileno=fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, many_descriptors))
    low.close()
    sock.bind((os.getpid() + 5_000_000, 1 | 1 << 8))  # RTMGRP_LINK, RTMGRP_IPV6_IFADDR
    sock.setsockopt(270, 11, 1)  # NETLINK_EXT_ACK
    (made,) = carry(lab, move, [sock])
    assert made.getsockname() == (os.getpid() + 5_000_000, 1 | 1 << 8)
    assert made.getsockopt(270, 11) == 1
    made.setblocking(False)
    while True:  # of the address that moved
        try:
            made.recv(65536)
        except BlockingIOError:
            break
    made.settimeout(5)
    ip("link", "set", "e0", "txqueuelen", "777", ns=lab.destination.name)
    assert struct.unpack_from("H", made.recv(65536), 4)[0] == 16  # RTM_NEWLINK
    made.close()

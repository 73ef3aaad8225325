"""A program in a network namespace, stored and restored: it is heard of again at its bridge, and nothing remains."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from phaul_engine.namespaces.net import plug
from phaul_engine.namespaces.net.device import Making
from phaul_engine.namespaces.net.netlink import Namespace
from phaul_engine.namespaces.net.state import Builder

from tests.kernel.namespaces.containers import Container, container
from tests.kernel.namespaces.networks import NUMBER, Network, networks, read

_BRIDGE, _OUTER, _INNER = "ph-test-br", "phtestout", "eth0"
_SERVER = """
import fcntl, socket, struct, subprocess, threading
configured = False
def setup():
    global tap
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tun7", 0x1001))
def configure():
    global configured
    configured = True
    for words in ("link set lo up", "link set eth0 up", "addr add 10.9.0.1/24 dev eth0",
                  "addr add fd99::1/64 dev eth0 nodad", "route add default via 10.9.0.9", "link set tun7 up",
                  "addr add 10.8.0.1/24 dev tun7"):
        subprocess.run(["ip", *words.split()], check=True)
    listener = socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True)
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
def serve(listener):
    while True:
        talk, _ = listener.accept()
        threading.Thread(target=answer, args=(talk,), daemon=True).start()
def answer(talk):
    while data := talk.recv(100):
        talk.sendall(data.upper())
def check():
    if not configured:
        configure()
    route = subprocess.run(["ip", "route", "get", "10.77.0.1"], capture_output=True, text=True).stdout
    assert route.startswith("10.77.0.1 via 10.9.0.9 dev eth0 src 10.9.0.1"), route
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"through the tunnel", ("10.8.0.2", 9))
    while b"through the tunnel" not in os.read(tap, 2000):
        pass
"""

_PAIR = """
import ctypes, socket, subprocess
def ip(words, *inside):
    subprocess.run([*inside, "ip", *words.split()], check=True)
def setup():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).unshare(0x40000000)  # CLONE_NEWNET
        os.close(writing)
        while True:
            signal.pause()
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    ip(f"link add left type veth peer name right netns {child}")
    ip("link set left up")
    ip("addr add 10.1.0.1/24 dev left")
    for words in ("link set right up", "addr add 10.1.0.2/24 dev right", "route add default via 10.1.0.1"):
        ip(words, "nsenter", "-n", "-t", str(child))
def check():
    with socket.socket() as sock:
        sock.settimeout(10)
        try:
            sock.connect(("10.1.0.2", 9))
        except ConnectionRefusedError:
            return
    raise AssertionError("nobody refuses")
"""


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@pytest.fixture
def bridge() -> Iterator[None]:
    """A bridge of ours, with an address."""
    _ip(f"link add {_BRIDGE} type bridge")
    try:
        _ip(f"link set {_BRIDGE} up")
        _ip(f"addr add 10.9.0.9/24 dev {_BRIDGE}")
        _ip(f"addr add fd99::9/64 dev {_BRIDGE} nodad")
        yield
    finally:
        _ip(f"link del {_BRIDGE}")


def _ports() -> list[str]:
    told = subprocess.run(["ip", "-o", "link", "show", "master", _BRIDGE], check=True, capture_output=True, text=True)
    return [line.split()[1].partition("@")[0] for line in told.stdout.splitlines()]


def _attach(subject: Container) -> None:
    _ip(f"link add {_OUTER} type veth peer name {_INNER} netns {subject.pid}")
    _ip(f"link set {_OUTER} master {_BRIDGE} up")


def _talk(address: str) -> None:
    with socket.create_connection((address, 80), timeout=10) as talk:
        talk.sendall(b"hello")
        assert talk.recv(100) == b"HELLO"


@pytest.mark.parametrize("flags", [(), ("--user", "--map-root-user", "--pid")], ids=["host", "user"])
def test_a_server_at_a_bridge(tmp_path: Path, bridge: None, flags: tuple[str, ...]) -> None:
    with container(tmp_path, _SERVER, "--net", *flags) as subject:
        _attach(subject)
        subject.check()
        with socket.create_connection(("10.9.0.1", 80), timeout=10) as kept:
            kept.sendall(b"before")
            assert kept.recv(100) == b"BEFORE"
            for _ in range(2):
                subject.carry(tcp="established")
                subject.check()
                _talk("10.9.0.1")
                _talk("fd99::1")
                kept.sendall(b"after")
                assert kept.recv(100) == b"AFTER"
        told = subprocess.run(
            ["ip", "-o", "link", "show", "master", _BRIDGE], capture_output=True, text=True, check=True
        )
        assert told.stdout.count("@") == 1, told.stdout


def test_another_bridge_by_name(tmp_path: Path, bridge: None) -> None:
    with container(tmp_path, _SERVER, "--net") as subject:
        _attach(subject)
        subject.check()
        subject.carry(external=[f"veth[{_INNER}]:phtestnew@{_BRIDGE}"])
        subject.check()
        _talk("10.9.0.1")
        assert _ports() == ["phtestnew"]


def test_a_pair_between_two_namespaces_of_a_tree(tmp_path: Path) -> None:
    with container(tmp_path, _PAIR, "--net") as subject:
        subject.check()
        for _ in range(2):
            subject.carry()
            subject.check()


def test_plugging_is_done_again_from_the_journal(bridge: None) -> None:
    home = Network(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
    with closing(home), networks(2) as (source, destination), Namespace(home.net) as here:
        _ip(f"link add {_OUTER} type veth peer name {_INNER} netns /proc/{os.getpid()}/fd/{source.net}")
        _ip(f"link set {_OUTER} master {_BRIDGE} up")
        source.run(f"ip link set {_INNER} up; ip addr add 10.9.0.1/24 dev {_INNER}; ip link set lo up")
        source.settle()
        state, _ = read(source, home)
        _ip(f"link del {_OUTER}")
        with Namespace(destination.net) as there:
            builder = Builder(Making(there, here, NUMBER))
            builder.build(state)
            entries = [pair.entry(f"/proc/self/fd/{destination.net}") for pair in plug.prepare(builder.making, state)]
            builder.close()
        assert _ports() == []
        for _ in range(2):
            for entry in entries:
                plug.redo(entry["data"])
            assert _ports() == [_OUTER]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("10.9.0.1", 9), timeout=10)

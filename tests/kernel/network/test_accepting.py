"""A server is stopped when it has accepted what its kernel has promised to clients."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from phaul_engine.errors import BusyError, refusal
from phaul_engine.network.accepting import Queues
from phaul_engine.objects import tcp_stream
from phaul_engine.objects.tcp_stream import Played, State

from .lab import SERVICE, Lab, Move
from .test_tcp import BOTH, connect, link_down, listen, wait_for

_SYN = 0x02


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def listener(lab: Lab, request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """A listener at the service address."""
    with closing(listen(lab.source, request.param)) as made:
        yield made


def queues_of(lab: Lab, move: Move, listener: socket.socket) -> Queues:
    checkpoint = move.collect([listener], survey=True).checkpoint
    found = lab.source.inside(lambda: Queues.of(checkpoint))
    assert found is not None
    return found


def test_connections_that_wait_are_seen_until_they_are_accepted(lab: Lab, move: Move, listener: socket.socket) -> None:
    with closing(queues_of(lab, move, listener)) as queues:
        assert queues.drain(0) == 0
        client = lab.client.socket(listener.family, socket.SOCK_STREAM)
        client.connect(listener.getsockname()[:2])
        assert queues.drain(0.01) == 1
        found = move.collect([listener], survey=False).blockers
        assert isinstance(refusal(found), BusyError)
        assert "1 connections wait to be accepted" in str(found[0])
        accepting = threading.Timer(0.05, lambda: listener.accept()[0].close())
        accepting.start()
        assert queues.drain(10) == 0
        accepting.join()
        assert move.collect([listener], survey=False).blockers == []
        client.close()


def test_handshakes_that_are_half_done_are_seen(lab: Lab, move: Move, listener: socket.socket) -> None:
    source = ("10.99.0.77" if listener.family == socket.AF_INET else "fd99::77", 4711)  # nobody answers there
    with closing(queues_of(lab, move, listener)) as queues:
        replayer = lab.source.inside(lambda: tcp_stream.Replayer(listener.family))
        replayer.play(Played(source, listener.getsockname()[:2], 1000, 0, _SYN, 500))
        replayer.close()
        assert queues.waiting() == 1


@BOTH
def test_last_bytes_of_closed_connections_are_seen(lab: Lab, move: Move, family: int) -> None:
    with closing(listen(lab.source, family)) as listener, closing(queues_of(lab, move, listener)) as queues:
        client, server = connect(lab, listener)
        link_down(lab)
        server.sendall(b"last bytes")
        server.shutdown(socket.SHUT_WR)
        wait_for(server, State.FIN_WAIT1)
        assert queues.waiting() == 0  # the program has it still: it moves
        server.close()
        deadline = time.monotonic() + 5
        while not queues.waiting():
            assert time.monotonic() < deadline
        client.close()


def test_a_tree_that_does_not_listen_has_no_queues(lab: Lab, move: Move) -> None:
    with closing(lab.source.socket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
        sock.bind((SERVICE[socket.AF_INET], 0))
        assert Queues.of(move.collect([sock], survey=True).checkpoint) is None

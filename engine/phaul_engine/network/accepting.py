"""Letting a server accept what has come before it is stopped.

A connection that stands in a listener's queue has been promised to its client, and cannot be rebuilt in the queue of
another host; one whose handshake is half done can only be answered by the kernel that began it. So requests for new
connections are held first (`hold.Stage.SYN`), the program runs on, and is stopped when its queues are empty.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass, field

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.objects import inet
from phaul_engine.objects.tcp_stream import State
from phaul_engine.proc.sock_diag import DiagSocket

_CLOSING = frozenset({State.FIN_WAIT1, State.CLOSING, State.LAST_ACK})
_STATES = sum(1 << state for state in (State.LISTEN, State.SYN_RECV, *_CLOSING))
_SHORTEST, _LONGEST = 0.0005, 0.005  # seconds between two looks
_EVERYWHERE = bytes(16)


@dataclass
class Queues:
    """The queues of a tree's TCP listeners, in the calling thread's network namespace."""

    places: frozenset[tuple[bytes, int]]
    diag: DiagSocket = field(default_factory=DiagSocket)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Queues | None:
        """Those of images; None if nothing listens."""
        entries = (record.message.isk for record in checkpoint.records("files") if record.message.HasField("isk"))
        listening = [one for one in entries if one.type == socket.SOCK_STREAM and one.state == State.LISTEN]
        places = frozenset((_place(inet.text(list(one.src_addr), one.family)), one.src_port) for one in listening)
        return cls(places) if places else None

    def waiting(self) -> int:
        """How many connections wait to be accepted, for the end of their handshake, or for their last bytes to be
        acknowledged when no program has them any more."""
        count = 0
        for family in inet.FAMILIES:
            for one in self.diag.inet(family, socket.IPPROTO_TCP, _STATES):
                place = (_place(socket.inet_ntop(family, one.source)), one.source_port)
                if place in self.places or (_EVERYWHERE, one.source_port) in self.places:
                    if one.state == State.LISTEN:
                        count += one.receive_queue
                    elif one.state == State.SYN_RECV or not one.inode:
                        count += 1
        return count

    def drain(self, within: float) -> int:
        """Wait until they are empty, at most so many seconds; how many still wait."""
        deadline, pause = time.monotonic() + within, _SHORTEST
        while True:
            time.sleep(pause)
            waiting = self.waiting()
            if not waiting or time.monotonic() >= deadline:
                return waiting
            pause = min(2 * pause, _LONGEST)

    def close(self) -> None:
        """Close the socket."""
        self.diag.close()


def _place(address: str) -> bytes:
    """An address as one of IPv6, that of any interface as zeros."""
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    packed = socket.inet_pton(socket.AF_INET, address)
    return bytes(10) + b"\xff\xff" + packed if any(packed) else _EVERYWHERE

"""What the two agents say to each other over their own TLS connection: protocol messages, and state beside them.

A message is one byte that says what it is, and a body. The connection is ordered, so state that a protocol message
relies on is sent before it.
"""

from __future__ import annotations

import enum
import json
import struct
import threading
from dataclasses import dataclass
from typing import Any

from phaul_engine.clocks import Clocks
from phaul_engine.errors import EngineError
from phaul_engine.memory.stream import Channel

from phaul import jsontext
from phaul.migration import Message

_SEND_TIMEOUT = 10.0  # seconds
_ROUND = struct.Struct("<I")
_LONGEST = 1 << 62  # nanoseconds of a clock


@enum.unique
class Kind(enum.IntEnum):
    """What a message is."""

    PROTOCOL = 1  # JSON: message, why
    SURVEY = 2  # images of the survey, before PREPARE
    CHANGES = 3  # images again: areas, tasks or descriptors are other than before
    ROUND = 4  # u32: pages of this round are on their way, and belong to what the images so far say
    FINAL = 5  # the message FINAL, and images of the frozen tree: what differs from the last that were sent as a whole
    FRAMES = 6  # packets that were held at the source
    CLOCK = 7  # empty, to be answered at once with JSON: the clocks of the destination's machine, in nanoseconds
    SETTINGS = 8  # JSON: what the destination has to know of the operator's wishes
    PHASES = 9  # JSON: [[phase, milliseconds], ...] of the destination's part of the downtime, when it is over
    FINGERPRINTS = 10  # of the source's memory in the freeze, before FINAL: the destination compares
    HURRY = 11  # one byte: 1, the freeze begins, and the same in answer; 0, it was let go again
    PLACE = 13  # u32: the number of the tree's first process where it is now, if that is not the one it knows
    HAUL = 14  # of the file systems that go along: see phaul.haul.wire
    ALIVE = 12  # a long round goes on: pages have connections of their own


_KINDS = frozenset(Kind)


def _told(message: Message, why: str) -> bytes:
    return json.dumps({"message": message.value, "why": why}).encode()


_PLAIN = {message: _told(message, "") for message in Message}  # those that a freeze waits for have no reason
_MEANT = {body: message for message, body in _PLAIN.items()}


@dataclass(frozen=True)
class Letter:
    """One message."""

    kind: Kind
    body: bytes

    def round(self) -> int:
        """Of ROUND."""
        return int(_ROUND.unpack(self.body)[0])

    def place(self) -> int:
        """Of PLACE."""
        return int(_ROUND.unpack(self.body)[0])

    def clocks(self) -> Clocks:
        """Of CLOCK, in answer. EngineError if it makes no sense."""
        try:
            return Clocks(*(int(one) for one in jsontext.parse(self.body)))
        except (ValueError, TypeError, OverflowError) as error:
            raise EngineError(f"the other side sent clocks that make no sense: {error}") from error

    def settings(self) -> dict[str, Any]:
        """Of SETTINGS. EngineError if it makes no sense."""
        try:
            said = jsontext.parse(self.body)
        except ValueError as error:
            raise EngineError(f"the other side sent settings that make no sense: {error}") from error
        if not isinstance(said, dict) or not isinstance(said.get("options", {}), dict):
            raise EngineError("the other side sent settings that make no sense")
        clocks = said.get("clocks")
        if not isinstance(clocks, list) or [type(one) for one in clocks] != [int, int]:
            raise EngineError("the other side sent settings without its clocks")
        if max(map(abs, clocks)) > _LONGEST:
            raise EngineError(f"the other side's clocks are at {clocks}")
        return dict(said)

    def protocol(self) -> tuple[Message, str]:
        """Of PROTOCOL: the message and the reason given with it. EngineError if it is none of ours."""
        if (plain := _MEANT.get(self.body)) is not None:
            return plain, ""
        try:
            said = jsontext.parse(self.body)
            return Message(said["message"]), str(said.get("why", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"the other side sent a protocol message that makes no sense: {error}") from error


def parse(content: bytes) -> Letter:
    """A received message; EngineError if it is of no kind we know."""
    if not content or content[0] not in _KINDS:
        raise EngineError("the other side sent a message of unknown kind", advice="are both phauls of one version?")
    letter = Letter(Kind(content[0]), content[1:])
    if letter.kind in (Kind.ROUND, Kind.PLACE) and len(letter.body) != _ROUND.size:
        raise EngineError(f"the other side sent {letter.kind.name} without a number")
    return letter


class Direct:
    """One end of the connection."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._sending = threading.Lock()  # files are sent by a thread, beside what the loop has to say

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """Send a message; blocks no longer than the socket's buffer is full."""
        with self._sending:
            self.channel.send(bytes([kind]) + body, _SEND_TIMEOUT)

    def send_round(self, number: int) -> None:
        """Announce a round."""
        self.send(Kind.ROUND, _ROUND.pack(number))

    def send_place(self, pid: int) -> None:
        """Tell the tree's number."""
        self.send(Kind.PLACE, _ROUND.pack(pid))

    def send_clocks(self, clocks: Clocks) -> None:
        """Answer CLOCK."""
        self.send(Kind.CLOCK, json.dumps(clocks).encode())

    def send_protocol(self, message: Message, why: str = "") -> None:
        """Send a protocol message."""
        self.send(Kind.PROTOCOL, _told(message, why) if why else _PLAIN[message])

    def receive(self, timeout: float) -> Letter:
        """Block, without the GIL, for a message."""
        return parse(self.channel.receive(timeout))

    async def next(self) -> Letter:
        """Wait in the running loop for a message."""
        return parse(await self.channel.next())

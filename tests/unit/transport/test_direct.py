"""What agents say to each other, as bytes."""

from __future__ import annotations

import json

import pytest
from phaul_engine.errors import EngineError

from phaul.migration import Message
from phaul.transport.direct import Direct, Kind, Letter, parse


class Wire:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, message: bytes, timeout: float) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("message", Message)
@pytest.mark.parametrize("why", ["", "because", "caf\u00e9"])
def test_messages_come_back(message: Message, why: str) -> None:
    wire = Wire()
    Direct(wire).send_protocol(message, why)  # type: ignore[arg-type]
    (said,) = wire.sent
    letter = parse(said)
    assert (letter.kind, letter.protocol()) == (Kind.PROTOCOL, (message, why))
    assert json.loads(letter.body) == {"message": message.value, "why": why}


@pytest.mark.parametrize("body", [b'{"message":"READY"}', b'{ "why": "", "message": "READY" }'])
def test_a_message_is_read_however_it_is_written(body: bytes) -> None:
    assert Letter(Kind.PROTOCOL, body).protocol() == (Message.READY, "")


@pytest.mark.parametrize("body", [b"", b"READY", b'{"message":"ready"}', b'{"message":"READY"} '[:-2]])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(EngineError):
        Letter(Kind.PROTOCOL, body).protocol()

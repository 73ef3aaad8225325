"""Questions after a death: a source whose agent is gone asks the destination, and is answered from the row.

What it takes is in the rows (`Row.link`): where the destination's agent listens, the certificate and key that each side
made for this one migration, and the fingerprint of the other's. They open nothing but this: whoever holds the key of
one migration's destination can only talk about it, for as long as it is undecided.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from phaul_engine.errors import EngineError
from phaul_engine.memory.stream import Channel, StreamError, StreamHello
from phaul_engine.memory.stream import Role as StreamRole

from phaul.journal import Journal
from phaul.migration import Message, Received, Row, Send
from phaul.transport.bootstrap import ident
from phaul.transport.direct import Direct, Kind, Letter
from phaul.transport.pages import Identity, PageListener

LINGER = 120.0  # seconds that a source which has not heard is still answered
_LOOK = 1.0  # seconds between two looks at a row that somebody else may end
_PAUSE = 0.3  # seconds between two attempts to connect
_ANSWERS = frozenset({Message.RESUMED, Message.DISCARDED, Message.UNKNOWN, Message.DEAD, Message.GONE, Message.GOODBYE})


def link_of(identity: Identity, pin: bytes, host: str, port: int) -> dict[str, Any]:
    """What a row notes of the connection between the agents. `host` is the destination's address as seen here."""
    return {
        "host": host,
        "port": port,
        "pin": pin.hex(),
        "certificate": identity.certificate,
        "key": identity.key,
        "fingerprint": identity.fingerprint.hex(),
    }


def _identity(link: dict[str, Any]) -> Identity:
    return Identity(str(link["certificate"]), str(link["key"]), bytes.fromhex(str(link["fingerprint"])))


class Line:
    """The source's side: reaches whoever answers for the destination, again and again."""

    def __init__(self, migration: str, link: dict[str, Any]) -> None:
        self._migration = migration
        self._address = (str(link["host"]), int(link["port"]))
        self._tls = _identity(link).context(server=False, pin=bytes.fromhex(str(link["pin"])))
        self._direct: Direct | None = None

    def ask(self, message: Message, timeout: float, why: str = "") -> Received | None:
        """Send a message and wait for the answer to it. None stands for silence."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                direct = self._connected(left)
                direct.send_protocol(message, why)
                while True:
                    letter = direct.receive(max(0.0, deadline - time.monotonic()))
                    if letter.kind is Kind.PROTOCOL and letter.protocol()[0] in _ANSWERS:
                        return Received(*letter.protocol())
            except (EngineError, OSError):
                self.close()
                time.sleep(min(_PAUSE, max(0.0, deadline - time.monotonic())))
        return None

    def tell(self, message: Message, why: str, timeout: float) -> None:
        """Send a message that is not answered, if anybody is there in that time."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                self._connected(left).send_protocol(message, why)
                return
            except (EngineError, OSError):
                self.close()
                time.sleep(_PAUSE)

    def close(self) -> None:
        """Hang up."""
        if self._direct is not None:
            self._direct.channel.close()
            self._direct = None

    def _connected(self, timeout: float) -> Direct:
        if self._direct is None:
            connection = socket.create_connection(self._address, timeout)
            connection.setblocking(True)
            hello = StreamHello(ident(self._migration), StreamRole.CONTROL)
            self._direct = Direct(Channel.connect(self._tls, connection.detach(), hello, timeout))
        return self._direct


async def linger(
    listener: PageListener,
    journal: Journal,
    decide: Callable[[], Sequence[Send]],
    *,
    link: Direct | None = None,
    seconds: float = LINGER,
) -> None:
    """The destination's side: answer what `decide` says, until the source knows all it needs, or the time is over."""
    answering = asyncio.ensure_future(_answer_all(listener, journal, decide, link, seconds))
    deadline = time.monotonic() + seconds
    state = journal.row.state
    try:
        while time.monotonic() < deadline and not _told_beside(journal, state, decide):
            if (await asyncio.wait({answering}, timeout=_LOOK))[0]:
                return answering.result()
            state = journal.row.state
    finally:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)


def _told_beside(journal: Journal, before: Row, decide: Callable[[], object]) -> bool:
    """Whether the source knows all it needs by what `phaul resolve` has told our row. What it has decided there is
    done: nobody else holds the copy."""
    row = journal.refresh()
    if before is Row.PARKED and (row.state is Row.DISCARDED or (row.state is before and row.heard)):
        decide()
    return row.heard or row.state is Row.RELEASED


async def _answer_all(
    listener: PageListener, journal: Journal, decide: Callable[[], Sequence[Send]], link: Direct | None, seconds: float
) -> None:
    heard = False
    while not heard:
        with contextlib.suppress(StreamError):
            link = link or Direct(await listener.control(seconds))
            while not heard:
                heard = _answered(await link.next(), link, journal, decide)
        link = None


def answer_again(
    journal: Journal, link: dict[str, Any], decide: Callable[[], Sequence[Send]], *, seconds: float = LINGER
) -> None:
    """In place of a dead agent: listen where it listened, as whom it was (`link`; the row has lost it if it has ended
    since), and answer. OSError where that is not possible."""
    tls = _identity(link).context(server=True, pin=bytes.fromhex(str(link["pin"])))

    async def main() -> None:
        async with PageListener(tls, ident(journal.row.migration), 1) as listener:
            listener.listen(str(link["host"]), int(link["port"]))
            await linger(listener, journal, decide, seconds=seconds)

    asyncio.run(main())


def _answered(letter: Letter, link: Direct, journal: Journal, decide: Callable[[], Sequence[Send]]) -> bool:
    """Answer one message. True when the source knows all it needs."""
    if letter.kind is not Kind.PROTOCOL:
        return False
    message, _ = letter.protocol()
    match message:
        case Message.RELEASED:
            if journal.refresh().state is Row.RESUMED:
                journal.transition(Row.RESUMED, Row.RELEASED)
                decide()
            link.send_protocol(Message.GOODBYE)
            return True
        case Message.ABORT:
            if journal.refresh().state is Row.PARKED:  # an arbiter that does not answer has kept it
                decide()
            return True
        case Message.ASK | Message.COMMIT:
            for send in decide():
                link.send_protocol(send.message, send.why)
    return False

"""The agent at the destination.

It is started by its keeper with a listening socket, over which the source's agent, through two relays and SSH, asks it
to listen for connections. From then on it needs neither SSH nor relay. When all is decided it still answers, for a
while, a source that has not heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from pathlib import Path

from phaul_engine.clocks import machine_clocks
from phaul_engine.errors import EngineError
from phaul_engine.memory.stream import StreamError

from phaul import asking, faults
from phaul.dest.works import DestinationWorks
from phaul.driver import Driver
from phaul.errors import PhaulError
from phaul.journal import Journal, Store
from phaul.migration import Done, Failed, Message, Role, Row, Send, State, Work
from phaul.migration.destination import begin
from phaul.recovery import Recovery
from phaul.transport import bootstrap
from phaul.transport.control import Channel, StreamLink
from phaul.transport.direct import Direct, Kind, Letter
from phaul.transport.pages import PageListener, make_identity
from phaul.transport.pb.control_pb2 import Open, Opened
from phaul.transport.relay import peer_is_root

_PATIENCE = 30.0  # seconds for the source to connect
_TIMED = {
    Work.DETACH: "detach",
    Work.CLAIM: "claim",
    Work.WAKE: "resume",
    Work.SYNC: "journal",
}  # works of the downtime, as phases
_OFTEN = 3600.0  # seconds that the listener waits for a source that connects again


class DestinationAgent:
    """One migration at the destination: what its driver asks for, and what the source's agent asks through SSH."""

    def __init__(self, migration: str, store: Store) -> None:
        self._migration = migration
        self._listener: PageListener | None = None
        self._opened = asyncio.Event()
        self._link: Direct | None = None
        self._phases: list[tuple[str, float]] = []  # names and seconds
        self.works = DestinationWorks(migration, store, self._report)
        self.works.answer = self._answer_haul
        self.works.failed = lambda why: self.driver.post(Failed(Work.BUILD, why))
        points = faults.load(store.directory, Role.DESTINATION)
        faults.watch_kinds(points)
        self.driver = Driver(begin(), self, points=points)

    # -- what the driver asks for ----------------------------------------------------------------------------------

    @property
    def journal(self) -> Journal | None:
        """The row, from BUILD on."""
        return self.works.journal

    @property
    def link(self) -> Direct | None:
        """The connection to the source's agent."""
        return self._link

    @property
    def hurried(self) -> bool:
        """From the word that the freeze begins to the final images."""
        return self.works.hurried

    async def do(self, work: Work) -> Done:
        """Do a work. Those in the downtime are timed, and the source is told when they are over."""
        if work is Work.TIDY:
            self._tell_phases()
        begun = time.monotonic()
        done = await self.works.do(work)
        if work is Work.BUILD and self.works.arbitrated:
            self.driver.arbitrate()
        if work in _TIMED:
            self._report(_TIMED[work], time.monotonic() - begun)
        return done

    def _tell_phases(self) -> None:
        if self._link is not None:
            with contextlib.suppress(EngineError, OSError):
                phases = [[name, round(seconds * 1000, 3)] for name, seconds in self._phases]
                self._link.send(Kind.PHASES, json.dumps(phases).encode())
                if self.works.place is not None:
                    self._link.send_place(self.works.place)

    async def take(self, letter: Letter) -> None:
        """State from the source. What cannot be applied ends the copy."""
        if letter.kind is Kind.CLOCK and self._link is not None:
            self._link.send_clocks(machine_clocks())
            return
        try:
            await self.works.take(letter)
            if letter.kind is Kind.HURRY and letter.body == b"\1" and self._link is not None:
                self._link.send(Kind.HURRY, letter.body)
        except StreamError:
            raise
        except (EngineError, OSError) as error:
            self.driver.post(Failed(Work.LAND, str(error)))

    async def reconnect(self) -> None:
        """It is the source that connects."""

    def entered(self, state: State) -> None:
        """Nobody watches here."""

    def _answer_haul(self, body: bytes) -> None:
        """From any thread."""
        if self._link is not None:
            self._link.send(Kind.HAUL, body)

    def _report(self, phase: str, seconds: float) -> None:
        """For the operator, who watches at the source."""
        self._phases.append((phase, seconds))

    # -- what the source asks through SSH --------------------------------------------------------------------------

    async def _open(self, asked: Open) -> Opened:
        """Listen, for the one peer with this fingerprint."""
        if self._listener is not None or asked.migration != self._migration:
            raise PhaulError("this agent listens already, or for another migration")
        identity = make_identity()
        tls = identity.context(server=True, pin=asked.fingerprint)
        self._listener = PageListener(tls, bootstrap.ident(asked.migration), asked.streams)
        port = self._listener.listen(asked.host)
        self.works.link = asking.link_of(identity, asked.fingerprint, asked.host, port)
        self._opened.set()
        return Opened(fingerprint=identity.fingerprint, port=port)

    async def _answer(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        channel = Channel(StreamLink(reader, writer), bootstrap.CATALOGUE, peer="the agent at the source")
        channel.handle(Open, self._open)
        try:
            await channel.run()
        except PhaulError:
            return  # SSH is gone: the agents have their own connection, or the source never comes
        finally:
            writer.close()

    # -- the migration ---------------------------------------------------------------------------------------------

    @property
    def _left_behind(self) -> bool:
        """Whether both sides know, and something of the migration is still here."""
        return self.journal is not None and self.journal.row.state is Row.RELEASED and not self.journal.row.ended

    async def serve(self, listener: socket.socket) -> bool:
        """From the first connection to the end. Whether whoever comes after us has anything to do."""
        listener.setblocking(False)
        async with asyncio.timeout(_PATIENCE):
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        if not peer_is_root(connection):
            connection.close()
            return False
        answering = asyncio.create_task(self._answer(connection))
        try:
            opened = asyncio.create_task(self._opened.wait())
            await asyncio.wait({opened, answering}, return_when=asyncio.FIRST_COMPLETED)
            opened.cancel()
            if self._listener is not None:  # else whoever had us started has left without a word
                async with self._listener:
                    await self._arrive(self._listener)
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        return self._left_behind

    async def _arrive(self, listener: PageListener) -> None:
        try:
            link = Direct(await listener.control(_PATIENCE))
            self.works.connect(await listener.pages(_PATIENCE))
            hearing = asyncio.create_task(self._hear(listener, link))
            try:
                ended = await self.driver.run()
            finally:
                hearing.cancel()
                await asyncio.gather(hearing, return_exceptions=True)
            if self.journal is not None:
                if not ended.unfinished:
                    self.journal.end()
                heard = Message.ABORT in self.driver.heard or self.works.overruled
                knows = heard or self.journal.row.state is Row.RELEASED
                if Message.READY in self.driver.sent and not knows:  # it may have committed to us, and ask
                    await asking.linger(listener, self.journal, self._decide, link=self._link)
                if self._left_behind:  # `phaul resolve` at the source has told the row beside us
                    self._decide()
        finally:
            self.works.close()

    async def _hear(self, listener: PageListener, link: Direct) -> None:
        """Listen to the source, and again when it comes back after the connection broke."""
        with contextlib.suppress(StreamError):
            while True:
                self._link = link
                await self.driver.listen(link)
                link = Direct(await listener.control(_OFTEN))

    def _decide(self) -> list[Send]:
        """What the row says to a source that asks."""
        assert self.journal is not None
        recovery = Recovery(self.journal, asked=True)
        recovery.run()
        return recovery.sent


def run(migration: str, listener: int, directory: Path) -> int:
    """The process: see `__main__`."""

    async def main() -> bool:
        return await DestinationAgent(migration, Store(directory)).serve(socket.socket(fileno=listener))

    return int(asyncio.run(main()))  # if that is 1, the keeper has recovery try again

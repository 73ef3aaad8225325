"""What the two agents ask each other through SSH, before they have a connection of their own (direct.py)."""

from __future__ import annotations

import hashlib

from google.protobuf.message import Message as Protobuf

from phaul.errors import PhaulError
from phaul.transport.control import Catalogue, Channel, ControlError, Link
from phaul.transport.pb.control_pb2 import Failure, Open, Opened

_OPEN_TIMEOUT = 15.0  # seconds for an answer


def _write_failure(error: PhaulError) -> Protobuf:
    return Failure(message=str(error), where=error.where, advice=error.advice)


def _read_failure(message: Protobuf) -> PhaulError:
    if not isinstance(message, Failure):
        return ControlError("the other agent failed, and does not say why")
    return PhaulError(message.message, where=message.where, advice=message.advice)


CATALOGUE = Catalogue({1: Failure, 2: Open, 3: Opened}, _write_failure, _read_failure)


def ident(migration: str) -> bytes:
    """How the agents' connections name a migration."""
    return hashlib.sha256(migration.encode()).digest()


class Bootstrap:
    """The source's side. `run` has to run as a task."""

    def __init__(self, link: Link) -> None:
        self._channel = Channel(link, CATALOGUE, peer="the agent at the destination")

    async def run(self) -> None:
        """Read the link until it ends."""
        await self._channel.run()

    async def open(self, migration: str, fingerprint: bytes, streams: int, host: str) -> Opened:
        """Have the destination listen."""
        asked = Open(migration=migration, fingerprint=fingerprint, streams=streams, host=host)
        return await self._channel.ask(asked, Opened, timeout=_OPEN_TIMEOUT)

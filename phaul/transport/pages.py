"""Connections for pages, and the agents' own channel in the freeze: who may connect, and to what.

Each migration has certificates of its own, one a side, whose fingerprints travel over SSH before the first of these
connections is made. The destination listens, the source connects; or, with `--tunnel`, both are handed ends of streams
that SSH carries.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from phaul_engine.errors import EngineError
from phaul_engine.memory.stream import STREAMS_MAX, Channel, DeadlineError, Role, StreamHello, TlsContext

_HANDSHAKES = 16  # strangers that may be in a handshake at once; the others wait to be accepted
_HANDSHAKE_TIMEOUT = 10.0  # seconds
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """What one side proves itself with: certificate and key as PEM, and the fingerprint that the other side pins."""

    certificate: str
    key: str
    fingerprint: bytes

    def context(self, *, server: bool, pin: bytes) -> TlsContext:
        """A TLS context for connections to the one peer with fingerprint `pin`."""
        return TlsContext(self.certificate, self.key, server=server, pin=pin)


def make_identity() -> Identity:
    """A certificate (ECDSA P-256, self-signed) for one side of one migration. The key exists only in memory."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "phaul")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + 365 * _DAY)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    der = certificate.public_bytes(serialization.Encoding.DER)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return Identity(pem.decode(), private.decode(), hashlib.sha256(der).digest())


class PageListener:
    """Takes the connections of one migration: one control channel and `streams` page streams.

    `take` is given every connected socket, by `serve` or by whoever tunnels. What is not ours is refused and forgotten;
    the reasons are in `refused`.
    """

    def __init__(self, tls: TlsContext, migration: bytes, streams: int) -> None:
        if not 1 <= streams <= STREAMS_MAX:
            raise ValueError(f"between 1 and {STREAMS_MAX} page streams, not {streams}")
        self.refused: list[str] = []
        self._tls = tls
        self._migration = migration
        self._pages: list[Channel | None] = [None] * streams
        self._control: Channel | None = None
        self._changed = asyncio.Condition()
        self._handshakes = asyncio.Semaphore(_HANDSHAKES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None

    def listen(self, host: str = "", port: int = 0) -> int:
        """Listen on an address of ours (all without one); returns the port."""
        if host:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
                0
            ]
        else:
            family, address = (socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET), ("", port)
        dual = not host and family == socket.AF_INET6
        self._listening = socket.create_server(address, family=family, dualstack_ipv6=dual, backlog=STREAMS_MAX + 1)
        self._listening.setblocking(False)
        self._start(self._serve(self._listening))
        return int(self._listening.getsockname()[1])

    async def take(self, connection: socket.socket) -> None:
        """Shake hands over a connected socket, which is ours from now on, and keep the channel if it belongs here."""
        await self._handshakes.acquire()
        await self._shake_hands(connection)

    async def control(self, timeout: float) -> Channel:
        """The control channel, which is the caller's then. `DeadlineError` if nobody makes it."""
        await self._until(lambda: self._control is not None, timeout)
        channel, self._control = self._control, None
        assert channel is not None
        return channel

    async def pages(self, timeout: float) -> list[Channel]:
        """All page streams in their order, which are the caller's then. `DeadlineError` if they do not all come."""
        await self._until(lambda: all(channel is not None for channel in self._pages), timeout)
        channels = [channel for channel in self._pages if channel is not None]
        self._pages = [None] * len(channels)
        return channels

    async def close(self) -> None:
        """Stop listening, and close what nobody has taken."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listening is not None:
            self._listening.close()
        for channel in (*self._pages, self._control):
            if channel is not None:
                channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._handshakes.acquire()  # first: strangers beyond that queue in the kernel
            connection, _ = await loop.sock_accept(listening)
            self._start(self._shake_hands(connection))

    async def _shake_hands(self, connection: socket.socket) -> None:
        """Gives one of the handshakes back."""
        try:
            channel, hello = await asyncio.to_thread(Channel.accept, self._tls, connection.detach(), _HANDSHAKE_TIMEOUT)
            await self._place(channel, hello)
        except EngineError as error:
            self.refused.append(str(error))
        finally:
            self._handshakes.release()

    async def _place(self, channel: Channel, hello: StreamHello) -> None:
        streams = len(self._pages)
        ours = hello.id == self._migration
        if hello.role is Role.CONTROL:
            ours = ours and self._control is None
        else:
            ours = ours and hello.streams == streams and self._pages[hello.stream] is None
        await asyncio.to_thread(channel.admit, ours, _HANDSHAKE_TIMEOUT)
        if not ours:
            channel.close()
            self.refused.append(
                f"a connection for {hello.role.name.lower()} {hello.stream} of another migration, or twice"
            )
            return
        async with self._changed:
            if hello.role is Role.CONTROL:
                self._control = channel
            else:
                self._pages[hello.stream] = channel
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool], timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            reasons = "; refused: " + "; ".join(self.refused[-3:]) if self.refused else ""
            raise DeadlineError(
                f"the source has not made its page connections within {timeout:g} s{reasons}",
                advice="does a firewall stand between the hosts? --tunnel needs nothing but SSH",
            ) from None


async def connect(
    address: tuple[str, int] | Sequence[socket.socket], tls: TlsContext, migration: bytes, streams: int, timeout: float
) -> tuple[Channel, list[Channel]]:
    """The source's side: the control channel and all page streams, to an address, or over streams already connected
    (1 + `streams` of them). `StreamError` or OSError if one fails; then none stays open."""
    hellos = [StreamHello(migration, Role.CONTROL)]
    hellos += [StreamHello(migration, Role.PAGES, number, streams) for number in range(streams)]
    sockets = await _sockets(address, len(hellos), timeout)
    jobs = [
        asyncio.to_thread(Channel.connect, tls, one.detach(), hello, timeout)
        for one, hello in zip(sockets, hellos, strict=True)
    ]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    channels = [result for result in results if isinstance(result, Channel)]
    problem = next((result for result in results if isinstance(result, BaseException)), None)
    if problem is not None:
        for channel in channels:
            channel.close()
        raise problem
    return channels[0], channels[1:]


async def reconnect(address: tuple[str, int], tls: TlsContext, migration: bytes, timeout: float = 5.0) -> Channel:
    """The source's side, after the control channel broke: another one. The listener must have given away the first."""
    connection = await asyncio.to_thread(socket.create_connection, address, timeout)
    hello = StreamHello(migration, Role.CONTROL)
    return await asyncio.to_thread(Channel.connect, tls, connection.detach(), hello, timeout)


async def _sockets(
    address: tuple[str, int] | Sequence[socket.socket], count: int, timeout: float
) -> Sequence[socket.socket]:
    if not isinstance(address, tuple):
        return address
    jobs = [asyncio.to_thread(socket.create_connection, address, timeout) for _ in range(count)]
    results = await asyncio.gather(*jobs, return_exceptions=True)
    made = [result for result in results if isinstance(result, socket.socket)]
    problem = next((result for result in results if isinstance(result, BaseException)), None)
    if problem is not None:
        for one in made:
            one.close()
        raise problem
    return made

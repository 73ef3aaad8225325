"""The page listener among strangers: nothing before authentication but a bounded hello, in bytes and in time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from phaul_engine.memory.stream import PeerError, Role, StreamError

from phaul.transport import pages
from phaul.transport.pages import Identity, PageListener, connect, make_identity
from tests.page_streams import MIGRATION, descriptors, identities

GREETING = struct.Struct("8s4B32s")
HELLO = GREETING.pack(b"PHAUL\0\0\1", Role.CONTROL, 0, 0, 0, MIGRATION)


def attacked(attack: Callable[[PageListener, int], Awaitable[None]]) -> list[str]:
    """Run an attack; afterwards the source's own connections are made and work. What was refused."""
    ours, theirs = identities()

    async def main() -> list[str]:
        async with PageListener(theirs.context(server=True, pin=ours.fingerprint), MIGRATION, 2) as listener:
            port = listener.listen("127.0.0.1")
            await attack(listener, port)
            refused = list(listener.refused)
            tls = ours.context(server=False, pin=theirs.fingerprint)
            control, streams = await connect(("127.0.0.1", port), tls, MIGRATION, 2, 5)
            far, others = await listener.control(5), await listener.pages(5)
            await asyncio.to_thread(control.send, b"mine", 5)
            assert await far.next() == b"mine"
            for channel in (control, far, *streams, *others):
                channel.close()
            return refused

    before = descriptors()
    found = asyncio.run(main())
    assert descriptors() == before
    return found


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it does not come about")


async def dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def answer_to(port: int, said: bytes) -> bytes:
    """All that a stranger hears who says this, in plain TCP."""
    reader, writer = await dial(port)
    with contextlib.suppress(ConnectionError):
        writer.write(said)
        await writer.drain()
    heard = b""
    with contextlib.suppress(ConnectionError):
        heard = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return heard


@pytest.mark.parametrize(
    "said",
    [HELLO, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + b"\xff" * 200, os.urandom(1 << 20), b"PHAUL {}\n"],
    ids=["hello", "http", "tls-nonsense", "a-megabyte", "other-protocol"],
)
def test_plain_tcp_gets_nothing(said: bytes) -> None:
    """There is no mode without TLS: what is heard is at most a TLS alert, never a byte of ours."""

    async def attack(listener: PageListener, port: int) -> None:
        heard = await answer_to(port, said)
        assert heard in (b"", heard[:7])
        assert heard[:1] in (b"", b"\x15")
        await until(lambda: len(listener.refused) == 1)

    assert len(attacked(attack)) == 1


def test_a_certificate_of_another_migration_is_refused() -> None:
    """Though it is made in the same way, and knows the listener's fingerprint."""

    async def attack(listener: PageListener, port: int) -> None:
        stranger = make_identity().context(server=False, pin=identities()[1].fingerprint)
        with pytest.raises(StreamError):
            await connect(("127.0.0.1", port), stranger, MIGRATION, 2, 5)
        await until(lambda: len(listener.refused) == 3)

    attacked(attack)


def _tls(tmp_path: Path, identity: Identity, port: int) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    (tmp_path / "pem").write_text(identity.certificate + identity.key)
    context.load_cert_chain(tmp_path / "pem")
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), 5))


def test_a_second_client_with_the_key_gets_no_second_place() -> None:
    """Each connection of a migration exists once; a hello that is said again changes nothing."""
    ours, theirs = identities()

    async def main() -> None:
        async with PageListener(theirs.context(server=True, pin=ours.fingerprint), MIGRATION, 1) as listener:
            port = listener.listen("127.0.0.1")
            tls = ours.context(server=False, pin=theirs.fingerprint)
            control, streams = await connect(("127.0.0.1", port), tls, MIGRATION, 1, 5)
            with pytest.raises(PeerError, match="refused this connection"):
                await connect(("127.0.0.1", port), tls, MIGRATION, 1, 5)
            far, others = await listener.control(5), await listener.pages(5)
            await asyncio.to_thread(control.send, b"the first", 5)
            assert await far.next() == b"the first"
            for channel in (control, far, *streams, *others):
                channel.close()

    asyncio.run(main())


def test_a_recorded_conversation_is_worth_nothing(tmp_path: Path) -> None:
    """What the source sent is sent once more, byte by byte, by somebody without its key."""
    ours, theirs = identities()

    async def main() -> None:
        async with PageListener(theirs.context(server=True, pin=ours.fingerprint), MIGRATION, 1) as listener:
            port = listener.listen("127.0.0.1")
            recorded = bytearray()

            async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, into: bytearray | None) -> None:
                with contextlib.suppress(ConnectionError):
                    while data := await reader.read(65536):
                        if into is not None:
                            into += data
                        writer.write(data)
                writer.close()

            async def middle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                far_reader, far_writer = await dial(port)
                await asyncio.gather(pump(reader, far_writer, recorded), pump(far_reader, writer, None))

            server = await asyncio.start_server(middle, "127.0.0.1", 0)
            tap = server.sockets[0].getsockname()[1]

            def speak() -> None:
                with _tls(tmp_path, ours, tap) as tls:
                    tls.sendall(HELLO)
                    assert tls.recv(16)[8] == 1  # admitted

            await asyncio.to_thread(speak)
            (await listener.control(5)).close()
            server.close()
            assert len(recorded) > 500
            heard = await answer_to(port, bytes(recorded))
            assert HELLO[:5] not in heard
            await until(lambda: len(listener.refused) == 1)
            with pytest.raises(StreamError):
                await listener.control(0.05)

    asyncio.run(main())


def test_what_is_slow_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte, before the handshake and in the hello after it: the time is for all of it together."""
    monkeypatch.setattr(pages, "_HANDSHAKE_TIMEOUT", 0.5)

    async def attack(listener: PageListener, port: int) -> None:
        _, plain = await dial(port)
        tls = await asyncio.to_thread(_tls, tmp_path, identities()[0], port)
        for byte in HELLO[:20]:
            with contextlib.suppress(OSError):
                plain.write(b"\x16")
                await asyncio.to_thread(tls.sendall, bytes([byte]))
            await asyncio.sleep(0.05)
        await until(lambda: len(listener.refused) == 2)
        plain.close()
        tls.close()

    refused = attacked(attack)
    assert len(refused) == 2


def test_a_hello_has_one_size(tmp_path: Path) -> None:
    """What comes behind it is not read before the place is given: nothing is stored for a stranger."""

    async def attack(listener: PageListener, port: int) -> None:
        def flood() -> None:
            with contextlib.suppress(OSError), _tls(tmp_path, identities()[0], port) as tls:
                tls.settimeout(5)
                tls.sendall(GREETING.pack(b"PHAUL\0\0\1", Role.CONTROL, 0, 0, 0, bytes(32)) + bytes(32 << 20))

        await asyncio.to_thread(flood)
        await until(lambda: len(listener.refused) == 1)

    assert "of another migration" in attacked(attack)[0]


def test_many_strangers_wait_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than so many are served at once; those that say nothing are gone after their time, and the source gets
    in."""
    monkeypatch.setattr(pages, "_HANDSHAKE_TIMEOUT", 1.0)

    async def attack(listener: PageListener, port: int) -> None:
        before = descriptors()
        writers = [(await dial(port))[1] for _ in range(40)]
        await asyncio.sleep(0.3)
        assert descriptors() - before - len(writers) <= pages._HANDSHAKES
        for writer in writers[20:]:
            writer.close()
        await until(lambda: len(listener.refused) >= 40)
        for writer in writers[:20]:
            writer.close()

    attacked(attack)

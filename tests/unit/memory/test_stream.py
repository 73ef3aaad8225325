"""Channels: who is let in, and messages under every bound."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from phaul_engine.memory.stream import (
    MESSAGE_MAX,
    Channel,
    ClosedError,
    DeadlineError,
    PeerError,
    ProtocolError,
    Role,
    StreamError,
    StreamHello,
)

from phaul.transport.pages import Identity, PageListener, connect, make_identity
from tests.page_streams import MIGRATION, TIMEOUT, control_pair, descriptors, identities


def test_messages_arrive_whole_and_in_order() -> None:
    near, far = control_pair()
    with near, far, ThreadPoolExecutor(1) as pool:
        messages = [b"", b"x", os.urandom(65536), os.urandom(65537), os.urandom(3 << 20), b"end"]
        sending = pool.submit(lambda: [near.send(message, TIMEOUT) for message in messages])
        assert [far.receive(TIMEOUT) for _ in messages] == messages
        sending.result()


def _send_all(end: Channel, blob: bytes) -> bool:
    for _ in range(8):
        end.send(blob, TIMEOUT)
    return True


def _receive_all(end: Channel) -> list[bytes]:
    return [end.receive(TIMEOUT) for _ in range(8)]


def test_both_ends_may_talk_at_once() -> None:
    near, far = control_pair()
    blob = os.urandom(1 << 20)
    with near, far, ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(_send_all, end, blob) for end in (near, far)]
        receiving = [pool.submit(_receive_all, end) for end in (near, far)]
        assert all(job.result() == [blob] * 8 for job in receiving)
        assert all(job.result() for job in sending)


def test_a_message_that_is_not_all_here_is_kept() -> None:
    near, far = control_pair()
    with near, far:
        with pytest.raises(DeadlineError):
            far.receive(0.01)
        near.send(b"one", TIMEOUT)
        near.send(b"two", TIMEOUT)
        assert far.receive_soon() == b"one"
        assert far.receive_soon() == b"two"
        assert far.receive_soon() is None


def test_readiness_in_a_loop() -> None:
    async def talk() -> list[bytes]:
        near, far = control_pair()
        with near, far:
            sending = asyncio.to_thread(lambda: [near.send(bytes([i]) * 100_000, TIMEOUT) for i in range(20)])
            task = asyncio.ensure_future(sending)
            received = [await asyncio.wait_for(far.next(), TIMEOUT) for _ in range(20)]
            await task
            return received

    assert asyncio.run(talk()) == [bytes([i]) * 100_000 for i in range(20)]


def test_a_message_beyond_the_bound_is_refused_by_the_sender() -> None:
    near, far = control_pair()
    with near, far, pytest.raises(ProtocolError):
        near.send(memoryview(bytearray(MESSAGE_MAX + 1)), TIMEOUT)


def test_the_end_of_the_other_side_is_told_apart() -> None:
    near, far = control_pair()
    with far:
        near.close()
        with pytest.raises(ClosedError):
            far.receive(TIMEOUT)
        with pytest.raises(ClosedError):
            near.receive(TIMEOUT)


def test_shutdown_wakes_a_receiver() -> None:
    near, far = control_pair()
    with near, far:
        threading.Timer(0.1, far.shutdown).start()
        with pytest.raises(ClosedError):
            far.receive(TIMEOUT)


def test_nobody_answers() -> None:
    ours, theirs = identities()
    near, far = socket.socketpair()
    with far, pytest.raises(DeadlineError):
        Channel.connect(
            ours.context(server=False, pin=theirs.fingerprint), near.detach(), StreamHello(MIGRATION, Role.CONTROL), 0.1
        )


def _meet(client: Identity, client_pin: bytes, server: Identity, server_pin: bytes) -> tuple[object, object]:
    near, far = socket.socketpair()

    def dial() -> object:
        try:
            return Channel.connect(
                client.context(server=False, pin=client_pin), near.detach(), StreamHello(MIGRATION, Role.CONTROL), 5
            )
        except StreamError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        dialing = pool.submit(dial)
        try:
            channel, _ = Channel.accept(server.context(server=True, pin=server_pin), far.detach(), 5)
            channel.admit(True, 5)
            answer: object = channel
        except StreamError as error:
            answer = error
        return dialing.result(), answer


def test_a_stranger_is_not_let_in() -> None:
    ours, theirs = identities()
    stranger = make_identity()
    dialed, answered = _meet(stranger, theirs.fingerprint, theirs, ours.fingerprint)
    assert isinstance(dialed, StreamError)
    assert isinstance(answered, PeerError)


def test_we_do_not_talk_to_a_stranger() -> None:
    ours, theirs = identities()
    stranger = make_identity()
    dialed, answered = _meet(ours, theirs.fingerprint, stranger, ours.fingerprint)
    assert isinstance(dialed, PeerError)
    assert isinstance(answered, StreamError)


def _python_client(
    tmp_path: Path, identity: Identity | None, far: socket.socket, version: ssl.TLSVersion
) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    if identity:
        (tmp_path / "pem").write_text(identity.certificate + identity.key)
        context.load_cert_chain(tmp_path / "pem")
    return context.wrap_socket(far)


@pytest.mark.parametrize(
    ("version", "with_identity"), [(ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, False)]
)
def test_old_versions_and_clients_without_certificate(
    tmp_path: Path, version: ssl.TLSVersion, with_identity: bool
) -> None:
    ours, theirs = identities()
    near, far = socket.socketpair()
    near.settimeout(5)

    def dial() -> None:
        try:
            with _python_client(tmp_path, ours if with_identity else None, near, version) as tls:
                tls.recv(1)
        except OSError:
            near.close()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(dial)
        with pytest.raises((PeerError, ProtocolError)):
            Channel.accept(theirs.context(server=True, pin=ours.fingerprint), far.detach(), 5)


_MAGIC = b"PHAUL\0\0\1"


@pytest.mark.parametrize(
    "hello",
    [
        b"GET / HTTP/1.0\r\n\r\n".ljust(44, b" "),
        b"PHAUL\0\0\2" + struct.pack("4B32s", Role.CONTROL, 0, 0, 0, MIGRATION),
        _MAGIC + struct.pack("4B32s", 0, 0, 0, 0, MIGRATION),
        _MAGIC + struct.pack("4B32s", 3, 0, 0, 0, MIGRATION),
        _MAGIC + struct.pack("4B32s", Role.PAGES, 2, 2, 0, MIGRATION),
        _MAGIC + struct.pack("4B32s", Role.PAGES, 0, 0, 0, MIGRATION),
        _MAGIC + struct.pack("4B32s", Role.PAGES, 0, 255, 0, MIGRATION),
    ],
)
def test_a_hello_that_says_something_impossible(tmp_path: Path, hello: bytes) -> None:
    ours, theirs = identities()
    near, far = socket.socketpair()
    near.settimeout(5)

    def dial() -> None:
        with _python_client(tmp_path, ours, near, ssl.TLSVersion.TLSv1_3) as tls:
            tls.sendall(hello)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(dial)
        with pytest.raises(ProtocolError):
            Channel.accept(theirs.context(server=True, pin=ours.fingerprint), far.detach(), 5)


def test_a_message_length_beyond_the_bound(tmp_path: Path) -> None:
    ours, theirs = identities()
    near, far = socket.socketpair()
    near.settimeout(5)

    def dial() -> None:
        with _python_client(tmp_path, ours, near, ssl.TLSVersion.TLSv1_3) as tls:
            tls.sendall(_MAGIC + struct.pack("4B32s", Role.CONTROL, 0, 0, 0, MIGRATION))
            tls.recv(16)
            tls.sendall(struct.pack("<I", MESSAGE_MAX + 1))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(dial)
        channel, _ = Channel.accept(theirs.context(server=True, pin=ours.fingerprint), far.detach(), 5)
        with channel:
            channel.admit(True, 5)
            with pytest.raises(ProtocolError):
                channel.receive(5)


def test_connections_of_one_migration() -> None:
    ours, theirs = identities()

    async def meet() -> None:
        async with PageListener(theirs.context(server=True, pin=ours.fingerprint), MIGRATION, 3) as listener:
            port = listener.listen("127.0.0.1")
            tls = ours.context(server=False, pin=theirs.fingerprint)
            with pytest.raises(PeerError):
                await connect(("127.0.0.1", port), tls, bytes(32), 3, 5)
            stranger = make_identity().context(server=False, pin=theirs.fingerprint)
            with pytest.raises(StreamError):
                await connect(("127.0.0.1", port), stranger, MIGRATION, 3, 5)
            control, pages = await connect(("127.0.0.1", port), tls, MIGRATION, 3, 5)
            with pytest.raises(PeerError):
                await connect(("127.0.0.1", port), tls, MIGRATION, 3, 5)
            far = await listener.control(5)
            others = await listener.pages(5)
            await asyncio.to_thread(control.send, b"hello", 5)
            assert await far.next() == b"hello"
            for number, (one, other) in enumerate(zip(pages, others, strict=True)):
                await asyncio.to_thread(one.send, bytes([number]), 5)
                assert await other.next() == bytes([number])
            for channel in (control, far, *pages, *others):
                channel.close()
            assert len(listener.refused) >= 8

    before = descriptors()
    asyncio.run(meet())
    assert descriptors() == before


def test_a_listener_waits_no_longer_than_told() -> None:
    ours, theirs = identities()

    async def wait() -> None:
        async with PageListener(theirs.context(server=True, pin=ours.fingerprint), MIGRATION, 1) as listener:
            listener.listen("127.0.0.1")
            with pytest.raises(DeadlineError):
                await listener.control(0.05)

    asyncio.run(wait())

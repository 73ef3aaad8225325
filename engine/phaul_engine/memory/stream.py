"""Authenticated streams (ph_stream.h): channels of messages, and what page source and sink run on."""

from __future__ import annotations

import asyncio
import enum
import errno
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from phaul_engine.errors import EngineError
from phaul_engine.native import failure, ffi, lib, new_error

MESSAGE_MAX: int = lib.PH_MESSAGE_MAX
ID_SIZE: int = lib.PH_ID_SIZE
STREAMS_MAX: int = lib.PH_STREAMS_MAX


class StreamError(EngineError):
    """A stream between two hosts does not work. `errno` is the native library's code."""

    errno: int = 0


class PeerError(StreamError):
    """The other end is not who it should be, or does not take us for who we should be."""


class ProtocolError(StreamError):
    """The other end said something that no peer says."""


class ClosedError(StreamError):
    """The other end, or we, closed the connection."""


class DeadlineError(StreamError):
    """The deadline passed."""


_KINDS: dict[int, type[StreamError]] = {
    errno.EACCES: PeerError,
    errno.EPROTO: ProtocolError,
    errno.EBADMSG: ProtocolError,
    errno.EMSGSIZE: ProtocolError,
    errno.ENOTCONN: ClosedError,
    errno.EPIPE: ClosedError,
    errno.ECONNRESET: ClosedError,
    errno.ETIMEDOUT: DeadlineError,
}


def stream_failure(err: Any) -> EngineError:
    """The exception that a filled `struct ph_error` of a stream means."""
    kind = _KINDS.get(err.code)
    if kind is None:
        return failure(err)
    problem = kind(ffi.string(err.message).decode("utf-8", "replace"))
    problem.errno = err.code
    return problem


class Role(enum.IntEnum):
    """What a connection is for."""

    CONTROL = lib.PH_ROLE_CONTROL
    PAGES = lib.PH_ROLE_PAGES


@dataclass(frozen=True)
class StreamHello:
    """What a connector says first: which migration, and which of its connections."""

    id: bytes
    role: Role
    stream: int = 0
    streams: int = 0

    def native(self) -> Any:
        """As `struct ph_hello`."""
        if len(self.id) != ID_SIZE:
            raise ValueError(f"a migration is named by {ID_SIZE} bytes")
        fields = {"role": self.role, "stream": self.stream, "streams": self.streams, "id": list(self.id)}
        return ffi.new("struct ph_hello *", fields)


class TlsContext:
    """TLS 1.3 with our certificate and key (PEM). The peer is known by `pin`, the SHA-256 of its certificate in DER."""

    def __init__(self, certificate: str, key: str, *, server: bool, pin: bytes) -> None:
        if len(pin) != lib.PH_PIN_SIZE:
            raise ValueError(f"a fingerprint has {lib.PH_PIN_SIZE} bytes")
        err = new_error()
        handle = lib.ph_tls_new(server, certificate.encode(), key.encode(), pin, err)
        if not handle:
            raise stream_failure(err)
        self.handle: Any = ffi.gc(handle, lib.ph_tls_free)


def milliseconds(timeout: float | None) -> int:
    """A timeout in seconds as the native library has it; None is for ever."""
    return -1 if timeout is None else max(0, round(timeout * 1000))


class Channel:
    """One authenticated connection. One sender and one receiver at a time, which may be two threads.

    All calls block, without the GIL, at most for their timeout in seconds. Under asyncio: `receive_soon` after `fileno`
    became readable, or the coroutine `next`.
    """

    _none: ClassVar[Any] = ffi.NULL

    def __init__(self, handle: Any) -> None:
        self._handle = ffi.gc(handle, lib.ph_channel_free)

    @classmethod
    def connect(cls, tls: TlsContext, fd: int, hello: StreamHello, timeout: float | None) -> Self:
        """Over the connected stream `fd`, which is the channel's from then on, also when this fails."""
        err = new_error()
        handle = lib.ph_channel_connect(tls.handle, fd, hello.native(), milliseconds(timeout), err)
        if not handle:
            raise stream_failure(err)
        return cls(handle)

    @classmethod
    def accept(cls, tls: TlsContext, fd: int, timeout: float | None) -> tuple[Self, StreamHello]:
        """The other end of `connect`, which waits until we `admit` it or close."""
        err = new_error()
        hello = ffi.new("struct ph_hello *")
        handle = lib.ph_channel_accept(tls.handle, fd, hello, milliseconds(timeout), err)
        if not handle:
            raise stream_failure(err)
        return cls(handle), StreamHello(bytes(hello.id), Role(hello.role), hello.stream, hello.streams)

    def admit(self, admitted: bool, timeout: float | None) -> None:
        """Answer the connector's hello."""
        err = new_error()
        if lib.ph_channel_admit(self.handle, admitted, milliseconds(timeout), err) < 0:
            raise stream_failure(err)

    @property
    def handle(self) -> Any:
        """The native channel."""
        if not self._handle:
            raise ClosedError("the channel is closed")
        return self._handle

    def release(self) -> Any:
        """The native channel, which is the caller's from now on."""
        handle, self._handle = self.handle, self._none
        ffi.gc(handle, None)
        return handle

    def fileno(self) -> int:
        """The descriptor, for readiness."""
        return int(lib.ph_channel_fd(self.handle))

    def send(self, message: bytes | bytearray | memoryview, timeout: float | None) -> None:
        """Send one message. If the deadline passes in the middle, the channel ends."""
        err = new_error()
        data = ffi.from_buffer(message)
        if lib.ph_channel_send(self.handle, data, len(data), milliseconds(timeout), err) < 0:
            raise stream_failure(err)

    def receive(self, timeout: float | None) -> bytes:
        """Receive one message. What came of it when the deadline passes is kept for the next call."""
        err = new_error()
        data = ffi.new("const void **")
        size = lib.ph_channel_recv(self.handle, data, milliseconds(timeout), err)
        if size < 0:
            raise stream_failure(err)
        return bytes(ffi.buffer(data[0], size)) if size else b""

    def receive_soon(self) -> bytes | None:
        """A message, if all of it is here. When readable, call until None: TLS may hold more than the socket shows."""
        try:
            return self.receive(0)
        except DeadlineError:
            return None

    async def next(self) -> bytes:
        """Receive one message in the running loop."""
        while (message := self.receive_soon()) is None:
            await readable(self.fileno())
        return message

    def shutdown(self) -> None:
        """End both directions, from any thread; calls that wait fail with ClosedError."""
        if self._handle:
            lib.ph_channel_shutdown(self._handle)

    def close(self) -> None:
        """Say goodbye if possible, and close. No other thread may be inside a call."""
        handle, self._handle = self._handle, self._none
        if handle:
            ffi.gc(handle, None)
            lib.ph_channel_free(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


async def readable(fd: int) -> None:
    """Wait in the running loop until a descriptor is readable. One waiter a descriptor."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)

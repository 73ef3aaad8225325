"""Control messages over a byte stream: frames, two streams in one, and typed messages with requests and answers.

A frame is a header of 12 bytes, big endian, and a body:

    u32 length of the body | u16 type | u8 flags | u8 zero | u32 tag

The type's top bit says that a receiver that does not know the type may skip it; any other unknown type is an error,
so that nothing is ever silently ignored. The tag ties an answer to its request; 0 is neither.

Between `phaul` and the agent at the source one byte stream carries two conversations: with `phaul` itself, and
(flag PEER) with the agent at the destination, whose frames `phaul` passes on through SSH without reading them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message

from phaul.errors import PhaulError
from phaul.transport.hello import ByteReader

HEADER = struct.Struct("!IHBBI")
MAX_BODY = 16 << 20  # bytes; larger things are sent in parts
OPTIONAL = 0x8000  # bit of the type: a receiver that does not know the type skips the frame
ANSWER = 0x01  # flag: the body answers the request with this tag
FAILED = 0x02  # flag, with ANSWER: the request failed, the body is the catalogue's failure message
PEER = 0x80  # flag: of the conversation that is passed on

_QUEUE = 256  # frames that wait for a slow reader before its stream is no longer read


class ControlError(PhaulError):
    """The other side broke the rules of the conversation."""


class ChannelClosed(PhaulError):
    """The conversation is over: the stream ended, or this side closed it."""


@dataclass(frozen=True)
class Frame:
    """One frame, its body still bytes."""

    type: int
    body: bytes
    tag: int = 0
    flags: int = 0


class ByteWriter(Protocol):
    """The writing half of a byte stream: asyncio.StreamWriter, asyncssh.SSHWriter."""

    def write(self, data: bytes) -> None:
        """Queue bytes."""
        ...

    async def drain(self) -> None:
        """Wait until there is room for more."""
        ...

    def close(self) -> None:
        """End the stream."""
        ...


class Link(Protocol):
    """Something that carries frames, in order."""

    async def send(self, frame: Frame) -> None:
        """Send a frame; ChannelClosed when it cannot arrive."""
        ...

    async def receive(self) -> Frame:
        """The next frame; ChannelClosed at the end."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


class StreamLink:
    """Frames on a byte stream."""

    def __init__(self, reader: ByteReader, writer: ByteWriter, *, max_body: int = MAX_BODY) -> None:
        self._reader = reader
        self._writer = writer
        self._max_body = max_body

    async def send(self, frame: Frame) -> None:
        """Send a frame. Frames of concurrent senders do not mix: one write is one frame."""
        if len(frame.body) > self._max_body:
            raise ControlError(f"a frame of {len(frame.body)} bytes; the limit is {self._max_body}")
        header = HEADER.pack(len(frame.body), frame.type, frame.flags, 0, frame.tag)
        try:
            self._writer.write(header + frame.body)
            await self._writer.drain()
        except OSError as error:
            raise ChannelClosed(f"the connection broke: {error}") from error

    async def receive(self) -> Frame:
        """The next frame. Its length is checked before anything of that length is read."""
        try:
            length, kind, flags, zero, tag = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            if zero or length > self._max_body:
                raise ControlError(f"not a frame: length {length}, reserved byte {zero}")
            return Frame(kind, await self._reader.readexactly(length), tag, flags)
        except (EOFError, OSError) as error:
            raise ChannelClosed(
                "the connection ended" if isinstance(error, EOFError) else f"it broke: {error}"
            ) from error

    async def close(self) -> None:
        """End the stream; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self._writer.close()


class _Half:
    """One of the two conversations of a `Split`."""

    def __init__(self, link: Link, flag: int) -> None:
        self._link = link
        self._flag = flag
        self.queue: asyncio.Queue[Frame | PhaulError] = asyncio.Queue(_QUEUE)

    async def send(self, frame: Frame) -> None:
        await self._link.send(replace(frame, flags=frame.flags | self._flag))

    async def receive(self) -> Frame:
        item = await self.queue.get()
        if isinstance(item, PhaulError):
            self.queue.put_nowait(item)  # the end stays the end for whoever asks again
            raise item
        return item

    async def close(self) -> None:
        """The stream is the other half's, too: `Split.run` ends with it."""


class Split:
    """Two conversations on one link: `near` with the process at its other end, `far` passed on by it.

    `run` reads the link for both and has to run as a task.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self.near = _Half(link, 0)
        self.far = _Half(link, PEER)

    async def run(self) -> None:
        """Sort frames until the link ends."""
        halves = {0: self.near, PEER: self.far}
        try:
            while True:
                frame = await self._link.receive()
                half = halves[frame.flags & PEER]
                await half.queue.put(replace(frame, flags=frame.flags & ~PEER))
        except PhaulError as error:
            await asyncio.gather(*(half.queue.put(error) for half in halves.values()))


async def pass_on(source: Link, sink: Link) -> None:
    """Copy frames from one link to another until either ends."""
    with contextlib.suppress(ChannelClosed):
        while True:
            await sink.send(await source.receive())


class Catalogue:
    """Message types and their numbers, and how an error becomes the message that answers a failed request."""

    def __init__(
        self,
        types: Mapping[int, type[Message]],
        write_failure: Callable[[PhaulError], Message],
        read_failure: Callable[[Message], PhaulError],
    ) -> None:
        self.by_number = dict(types)
        self.by_type = {kind: number for number, kind in types.items()}
        if len(self.by_type) != len(self.by_number):
            raise ValueError("a message has one number")
        self.write_failure = write_failure
        self.read_failure = read_failure


T = TypeVar("T", bound=Message)
Handler: TypeAlias = Callable[[Any], Awaitable[Message | None]]


class Channel:
    """A conversation in typed messages.

    Either side sends a message (`tell`), or asks (`ask`) and waits for the answer. `run` reads the link and calls the
    handler of each message; it has to run as a task. Handlers run one after another, in the order in which messages
    came: the protocol's messages change state, and order is what makes them mean something. So a handler that has long
    work to do starts a task for it. What it returns is the answer; a PhaulError that it raises goes to the asker.
    """

    def __init__(
        self,
        link: Link,
        catalogue: Catalogue,
        *,
        handlers: Mapping[type[Message], Handler] | None = None,
        peer: str = "the other side",
    ) -> None:
        self.peer = peer
        self._link = link
        self._catalogue = catalogue
        self._handlers = dict(handlers or {})
        self._tags = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._ended: PhaulError | None = None

    def handle(self, kind: type[T], handler: Callable[[T], Awaitable[Message | None]]) -> None:
        """Call `handler` for messages of this type from now on."""
        self._handlers[kind] = handler

    async def tell(self, message: Message) -> None:
        """Send a message that needs no answer."""
        await self._send(message)

    async def ask(self, message: Message, answer: type[T], *, timeout: float | None) -> T:
        """Send a request and wait for its answer, at most `timeout` seconds.

        Raises what the other side answered if it failed, TimeoutError, or ChannelClosed.
        """
        if self._ended is not None:
            raise self._ended
        tag = next(self._tags)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[tag] = future
        try:
            async with asyncio.timeout(timeout):
                await self._send(message, tag)
                got = await future
        finally:
            self._waiting.pop(tag, None)
        if not isinstance(got, answer):
            raise ControlError(f"{self.peer} answered {type(message).__name__} with {type(got).__name__}")
        return got

    async def run(self) -> None:
        """Read the link until it ends; then every waiting request fails with the reason, which is raised.

        The plain end of the stream (ChannelClosed) is raised, too: only the caller knows whether it was expected.
        """
        handling: asyncio.Queue[tuple[Message, int]] = asyncio.Queue(_QUEUE)
        worker = asyncio.create_task(self._work(handling))
        reader = asyncio.create_task(self._read(handling))
        try:
            done, _ = await asyncio.wait({worker, reader}, return_when=asyncio.FIRST_COMPLETED)
            next(iter(done)).result()
        except PhaulError as error:
            self._ended = error
            raise
        finally:
            for task in (worker, reader):
                task.cancel()
            await asyncio.gather(worker, reader, return_exceptions=True)
            self._ended = self._ended or ChannelClosed("this side ended the conversation")
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(self._ended)

    async def close(self) -> None:
        """End the conversation and its link."""
        await self._link.close()

    async def _send(self, message: Message, tag: int = 0, flags: int = 0) -> None:
        kind = self._catalogue.by_type[type(message)]
        await self._link.send(Frame(kind, message.SerializeToString(), tag, flags))

    async def _read(self, handling: asyncio.Queue[tuple[Message, int]]) -> None:
        while True:
            frame = await self._link.receive()
            message = self._decode(frame)
            if message is None:
                continue
            if frame.flags & ANSWER:
                self._answered(frame, message)
            elif type(message) in self._handlers:
                await handling.put((message, frame.tag))
            else:
                raise ControlError(f"{self.peer} sent {type(message).__name__}, which nobody expects here")

    def _decode(self, frame: Frame) -> Message | None:
        kind = self._catalogue.by_number.get(frame.type)
        if kind is None:
            if frame.type & OPTIONAL:
                return None
            raise ControlError(f"{self.peer} sent a message of unknown type {frame.type}")
        try:
            return kind.FromString(frame.body)
        except DecodeError as error:
            raise ControlError(f"{self.peer} sent a broken {kind.__name__}: {error}") from error

    def _answered(self, frame: Frame, message: Message) -> None:
        future = self._waiting.get(frame.tag)
        if future is None or future.done():
            return  # the request was given up meanwhile
        if frame.flags & FAILED:
            future.set_exception(self._catalogue.read_failure(message))
        else:
            future.set_result(message)

    async def _work(self, handling: asyncio.Queue[tuple[Message, int]]) -> None:
        while True:
            message, tag = await handling.get()
            try:
                answer = await self._handlers[type(message)](message)
            except PhaulError as error:
                if not tag:
                    raise
                await self._send(self._catalogue.write_failure(error), tag, ANSWER | FAILED)
                continue
            if tag:
                if answer is None:
                    raise ControlError(f"the request {type(message).__name__} of {self.peer} has no answer here")
                await self._send(answer, tag, ANSWER)

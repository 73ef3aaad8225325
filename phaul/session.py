"""A migration as `phaul` and the agent at the source talk about it.

`phaul` holds the terminal, the SSH keys and the connection; the agent has root and does the work. One stream between
them (control.Split) carries this conversation, whose frames have JSON bodies, and the one of the two agents, which
`phaul` passes on through SSH. When `phaul` dies the agent sees the end of the stream and decides by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from phaul import events, jsontext
from phaul.errors import PhaulError
from phaul.events import Event, Result, Sink
from phaul.preflight import Wishes
from phaul.transport.control import ChannelClosed, ControlError, Frame, Link, Split, pass_on


class Kind(enum.IntEnum):
    """Frames of this conversation."""

    BEGIN = 1  # phaul: the request
    CANCEL = 2  # phaul: the operator wants to stop
    PEER_LOST = 3  # phaul: the connection to the other host broke; the reason
    EVENT = 4  # agent: an event; the last one is the result
    FORWARD = 5  # agent: lead a port of this host's loopback to HOST:PORT there
    FORWARDED = 6  # phaul: the port, or the reason why there is none


@dataclass(frozen=True)
class Request:
    """What the operator asks for, checked and resolved. Durations in milliseconds, rates in bytes a second.

    `page_host` is where the page stream connects to: the address that SSH reached. `features` are those that both
    phauls have. `wishes` is what the preflight wants to know.
    """

    migration: str
    workload: str  # its kind, as in phaul.workloads
    subject: str  # the PID, or the name
    destination: str
    page_host: str
    wishes: Wishes
    max_downtime: float
    max_rounds: int
    bandwidth: int
    compress: str
    streams: int
    tunnel: bool
    auto_converge: bool
    verify: bool
    shell_job: bool = False
    moved: tuple[str, ...] = ()  # ADDR/PREFIX@DEV, as config.parse_moved_address reads them
    keep_images: str = ""
    features: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()  # directories whose written files are sent
    hauled: tuple[str, ...] = ()  # directories that are sent as a whole
    rsync: bool = False  # the other host has it
    subvolumes: tuple[str, ...] = ()  # of those directories, those that both hosts have on btrfs

    @property
    def pid(self) -> int | None:
        """The process that was named, if it was one."""
        return int(self.subject) if self.workload == "pid" else None


class Client:
    """phaul's side: asks, passes on, shows, and cancels."""

    def __init__(self, source: Link, destination: Link, forward: Callable[[str, int], Awaitable[int]]) -> None:
        self._split = Split(source)
        self._destination = destination
        self._forward = forward

    async def run(self, request: Request, sink: Sink) -> Result:
        """See the migration through to its result. ChannelClosed if the agent ends without one."""
        near = self._split.near
        tasks = [asyncio.create_task(part) for part in (self._split.run(), self._outward(), self._inward())]
        try:
            await near.send(_frame(Kind.BEGIN, asdict(request)))
            while True:
                frame = await near.receive()
                match frame.type:
                    case Kind.EVENT:
                        event = events.decode(frame.body)
                        if isinstance(event, Result):
                            return event  # the command tells it, once all is over
                        sink(event)
                    case Kind.FORWARD:
                        await near.send(await self._forwarded(frame))
                    case _:
                        raise ControlError(f"the agent sent a frame of type {frame.type}")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def cancel(self) -> None:
        """Ask the agent to call it off: it does before the commit point, and answers with the result either way."""
        with contextlib.suppress(ChannelClosed):
            await self._split.near.send(Frame(Kind.CANCEL, b""))

    async def _outward(self) -> None:
        await pass_on(self._split.far, self._destination)

    async def _inward(self) -> None:
        """The other host's frames, and the word that no more will come."""
        reason = "the SSH connection ended"
        try:
            while True:
                await self._split.far.send(await self._destination.receive())
        except PhaulError as error:
            reason = str(error)
        with contextlib.suppress(ChannelClosed):
            await self._split.near.send(_frame(Kind.PEER_LOST, {"reason": reason}))

    async def _forwarded(self, frame: Frame) -> Frame:
        try:
            wanted = jsontext.parse(frame.body)
            return _frame(Kind.FORWARDED, {"port": await self._forward(str(wanted["host"]), int(wanted["port"]))})
        except PhaulError as error:
            return _frame(Kind.FORWARDED, {"error": str(error)})
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ControlError(f"the agent asked in a way that this phaul cannot read: {error}") from error


class Front:
    """The agent's side: what was asked, and where to tell what happens.

    `peer` is the link to the agent at the destination. `cancelled` is set when the operator wants to stop, `gone` when
    phaul has left (nobody hears events any more), `peer_lost` when SSH broke.
    """

    def __init__(self, link: Link) -> None:
        self._split = Split(link)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._requested: asyncio.Future[Request] = asyncio.get_running_loop().create_future()
        self._forwarded: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outbox: asyncio.Queue[Event] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self.peer: Link = self._split.far
        self.cancelled = asyncio.Event()
        self.gone = asyncio.Event()
        self.peer_lost = asyncio.Event()

    async def __aenter__(self) -> Self:
        parts = (self._split.run(), self._read(), self._write())
        self._tasks = [asyncio.create_task(part) for part in parts]
        return self

    async def __aexit__(self, *_: object) -> None:
        """What was emitted still leaves, if phaul is there to take it."""
        if not self.gone.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._outbox.join()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def request(self) -> Request:
        """What was asked for. ChannelClosed if phaul left before it asked."""
        return await asyncio.shield(self._requested)

    def emit(self, event: Event) -> None:
        """Tell phaul what happened, from any thread. Never waits: in the freeze nobody may."""
        if self.gone.is_set():
            return
        if threading.get_ident() == self._thread:
            self._outbox.put_nowait(event)
        else:
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, event)

    async def forward(self, host: str, port: int) -> int:
        """A port of our loopback that leads through SSH to `host`:`port` as the destination sees it."""
        await self._split.near.send(_frame(Kind.FORWARD, {"host": host, "port": port}))
        answer = await self._forwarded.get()
        if "port" not in answer:
            raise PhaulError(f"the tunnel was not made: {answer.get('error')}")
        return int(answer["port"])

    async def _read(self) -> None:
        try:
            while True:
                frame = await self._split.near.receive()
                match frame.type:
                    case Kind.BEGIN:
                        self._requested.set_result(_request(frame))
                    case Kind.CANCEL:
                        self.cancelled.set()
                    case Kind.PEER_LOST:
                        self.peer_lost.set()
                    case Kind.FORWARDED:
                        self._forwarded.put_nowait(_answer(frame))
                    case _:
                        raise ControlError(f"phaul sent a frame of type {frame.type}")
        except PhaulError as error:
            self.gone.set()
            self.peer_lost.set()
            self._forwarded.put_nowait({"error": str(error)})
            if not self._requested.done():
                self._requested.set_exception(error)
                self._requested.exception()  # whoever asks gets it; nobody has to

    async def _write(self) -> None:
        while True:
            event = await self._outbox.get()
            with contextlib.suppress(ChannelClosed):
                await self._split.near.send(Frame(Kind.EVENT, events.encode(event).encode()))
            self._outbox.task_done()


def _frame(kind: Kind, content: dict[str, Any]) -> Frame:
    return Frame(kind, json.dumps(content, separators=(",", ":")).encode())


def _answer(frame: Frame) -> dict[str, Any]:
    try:
        said = jsontext.parse(frame.body)
        return {"port": int(said["port"])} if "port" in said else {"error": str(said.get("error"))}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ControlError(f"phaul answered in a way that this agent cannot read: {error}") from error


def _request(frame: Frame) -> Request:
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(Request).validate_json(frame.body)
    except ValueError as error:
        raise ControlError(f"phaul asked in a way that this agent cannot read: {error}") from error

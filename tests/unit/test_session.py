"""phaul and the agent at the source, over a real stream, with the destination behind."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from phaul import events
from phaul.errors import ConnectError, PhaulError
from phaul.preflight import Wishes
from phaul.session import Client, Front, Request
from phaul.transport.control import ChannelClosed, Frame, Link, StreamLink

REQUEST = Request(
    migration="m0123456",
    workload="pid",
    subject="812",
    destination="root@db2",
    page_host="192.0.2.2",
    wishes=Wishes("db2", moved=(("192.0.2.9", "eth0"),), channels=("192.0.2.1", "192.0.2.2")),
    max_downtime=100.0,
    max_rounds=30,
    bandwidth=0,
    compress="auto",
    streams=0,
    tunnel=False,
    auto_converge=False,
    verify=False,
)
DONE = events.Result("migrated", 812, 1.0, 2.0)

Agent = Callable[[Front], Awaitable[None]]


async def pair() -> tuple[StreamLink, StreamLink]:
    left, right = socket.socketpair()
    return (
        StreamLink(*await asyncio.open_connection(sock=left)),
        StreamLink(*await asyncio.open_connection(sock=right)),
    )


async def no_tunnel(host: str, port: int) -> int:
    raise ConnectError("not now")


def together(
    agent: Agent,
    *,
    forward: Callable[[str, int], Awaitable[int]] = no_tunnel,
    during: Callable[[Client, Link], Coroutine[Any, Any, None]] | None = None,
) -> tuple[events.Result, list[events.Event]]:
    """Run an agent and phaul against each other; the result and all events."""
    seen: list[events.Event] = []

    async def serve(link: StreamLink) -> None:
        try:
            async with Front(link) as front:
                await agent(front)
        finally:
            await link.close()

    async def main() -> events.Result:
        ours, theirs = await pair()
        to_destination, destination = await pair()
        client = Client(ours, to_destination, forward)
        serving = asyncio.create_task(serve(theirs))
        doing = asyncio.create_task(during(client, destination)) if during else None
        try:
            return await asyncio.wait_for(client.run(REQUEST, seen.append), 10)
        finally:
            await ours.close()
            await asyncio.wait_for(serving, 10)
            if doing:
                await asyncio.wait_for(doing, 10)
            await to_destination.close()
            await destination.close()

    return asyncio.run(main()), seen


def test_the_request_arrives_and_events_come_back_in_order() -> None:
    async def agent(front: Front) -> None:
        request = await front.request()
        assert request == REQUEST
        assert request.pid == 812
        for number in range(100):
            front.emit(events.RoundStarted(number, 1))
        front.emit(DONE)

    result, seen = together(agent)
    assert result == DONE
    assert seen == [events.RoundStarted(number, 1) for number in range(100)], "the result is the command's to tell"


def test_the_agents_talk_through_phaul() -> None:
    async def agent(front: Front) -> None:
        await front.peer.send(Frame(7, b"ping", 3, 1))
        frame = await front.peer.receive()
        front.emit(events.Notice("info", frame.body.decode()))
        front.emit(DONE)

    async def destination(client: Client, link: Link) -> None:
        frame = await link.receive()
        assert frame == Frame(7, b"ping", 3, 1)
        await link.send(Frame(8, b"pong"))

    _, seen = together(agent, during=destination)
    assert seen[0] == events.Notice("info", "pong")


def test_cancel_reaches_the_agent() -> None:
    async def agent(front: Front) -> None:
        await front.request()
        front.emit(events.Committed())
        await front.cancelled.wait()
        front.emit(events.Result("cancelled", 812, reason="it runs on the source"))

    async def operator(client: Client, link: Link) -> None:
        await asyncio.sleep(0.05)
        await client.cancel()

    result, _ = together(agent, during=operator)
    assert result.exit_status == 130


def test_a_broken_ssh_connection_is_told() -> None:
    async def agent(front: Front) -> None:
        await front.request()
        await front.peer_lost.wait()
        assert not front.gone.is_set()
        front.emit(events.Result("stayed", 812, reason="the link broke"))

    async def destination(client: Client, link: Link) -> None:
        await link.close()

    result, _ = together(agent, during=destination)
    assert result.outcome == "stayed"


@pytest.mark.parametrize("works", [True, False])
def test_tunnels_are_made_by_phaul(works: bool) -> None:
    asked: list[tuple[str, int]] = []

    async def forward(host: str, port: int) -> int:
        asked.append((host, port))
        if not works:
            raise ConnectError("administratively prohibited")
        return 40000

    async def agent(front: Front) -> None:
        if works:
            assert await front.forward("127.0.0.1", 7000) == 40000
        else:
            with pytest.raises(PhaulError, match="administratively prohibited"):
                await front.forward("127.0.0.1", 7000)
        front.emit(DONE)

    together(agent, forward=forward)
    assert asked == [("127.0.0.1", 7000)]


def test_an_agent_that_ends_without_a_result_is_an_error() -> None:
    async def agent(front: Front) -> None:
        await front.request()

    with pytest.raises(ChannelClosed):
        together(agent)


def test_a_phaul_that_leaves_is_noticed() -> None:
    async def main() -> None:
        ours, theirs = await pair()
        async with Front(theirs) as front:
            await ours.close()
            with pytest.raises(ChannelClosed):
                await asyncio.wait_for(front.request(), 5)
            assert front.gone.is_set()
            assert front.peer_lost.is_set()
            front.emit(DONE)  # nobody hears it, and nothing fails
        await theirs.close()

    asyncio.run(main())


def test_a_request_that_is_none_is_refused() -> None:
    async def main() -> None:
        ours, theirs = await pair()
        async with Front(theirs) as front:
            await ours.send(Frame(1, b'{"migration":"x"}'))
            with pytest.raises(PhaulError, match="cannot read"):
                await asyncio.wait_for(front.request(), 5)
        await ours.close()
        await theirs.close()

    asyncio.run(main())

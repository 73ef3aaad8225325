"""Frames and channels over real byte streams: socket pairs in one loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping

import pytest
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value, StringValue
from hypothesis import given
from hypothesis import strategies as st

from phaul.errors import PhaulError
from phaul.transport import control
from phaul.transport.control import Catalogue, Channel, ChannelClosed, ControlError, Frame, Handler, Split, StreamLink


def write_failure(error: PhaulError) -> Message:
    return StringValue(value=str(error))


def read_failure(message: Message) -> PhaulError:
    assert isinstance(message, StringValue)
    return PhaulError(message.value)


CATALOGUE = Catalogue({1: StringValue, 2: Int64Value}, write_failure, read_failure)


async def links(max_body: int = control.MAX_BODY) -> tuple[StreamLink, StreamLink]:
    left, right = socket.socketpair()
    return (
        StreamLink(*await asyncio.open_connection(sock=left), max_body=max_body),
        StreamLink(*await asyncio.open_connection(sock=right), max_body=max_body),
    )


@contextlib.asynccontextmanager
async def channels(
    near: Mapping[type[Message], Handler], far: Mapping[type[Message], Handler]
) -> AsyncIterator[tuple[Channel, Channel, asyncio.Task[None], asyncio.Task[None]]]:
    one, other = await links()
    left = Channel(one, CATALOGUE, handlers=near, peer="right")
    right = Channel(other, CATALOGUE, handlers=far, peer="left")
    tasks = [asyncio.create_task(left.run()), asyncio.create_task(right.run())]
    try:
        yield left, right, tasks[0], tasks[1]
    finally:
        await left.close()
        await right.close()
        await asyncio.gather(*tasks, return_exceptions=True)


async def double(message: Int64Value) -> Int64Value:
    if message.value < 0:
        raise PhaulError("negative")
    return Int64Value(value=message.value * 2)


@given(
    kind=st.integers(0, 65535), body=st.binary(max_size=300), tag=st.integers(0, 2**32 - 1), flags=st.integers(0, 255)
)
def test_a_frame_arrives_as_it_was(kind: int, body: bytes, tag: int, flags: int) -> None:
    async def main() -> None:
        one, other = await links()
        frame = Frame(kind, body, tag, flags)
        await one.send(frame)
        assert await other.receive() == frame
        await one.close()
        with pytest.raises(ChannelClosed):
            await other.receive()
        await other.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "header", [b"\xff\xff\xff\xff" + bytes(8), b"\0\0\0\1\0\1\0\1\0\0\0\0"], ids=["long", "reserved"]
)
def test_what_is_no_frame_is_refused_before_it_is_read(header: bytes) -> None:
    async def main() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(header)
        left, right = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=left)
        with pytest.raises(ControlError, match="not a frame"):
            await StreamLink(reader, writer).receive()
        writer.close()
        right.close()

    asyncio.run(main())


def test_a_cut_frame_is_an_end() -> None:
    async def main() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(control.HEADER.pack(10, 1, 0, 0, 0) + b"short")
        reader.feed_eof()
        left, right = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=left)
        with pytest.raises(ChannelClosed):
            await StreamLink(reader, writer).receive()
        writer.close()
        right.close()

    asyncio.run(main())


def test_a_frame_beyond_the_limit_is_not_sent() -> None:
    async def main() -> None:
        one, other = await links(max_body=100)
        with pytest.raises(ControlError, match="101 bytes"):
            await one.send(Frame(1, bytes(101)))
        await one.close()
        await other.close()

    asyncio.run(main())


def test_requests_have_their_answers_both_ways() -> None:
    async def main() -> None:
        async with channels({Int64Value: double}, {Int64Value: double}) as (left, right, _, _):
            asked = [left.ask(Int64Value(value=n), Int64Value, timeout=5) for n in range(20)]
            asked += [right.ask(Int64Value(value=n), Int64Value, timeout=5) for n in range(20, 40)]
            assert [answer.value for answer in await asyncio.gather(*asked)] == [2 * n for n in range(40)]
            with pytest.raises(PhaulError, match="negative"):
                await left.ask(Int64Value(value=-1), Int64Value, timeout=5)
            assert (await left.ask(Int64Value(value=4), Int64Value, timeout=5)).value == 8

    asyncio.run(main())


def test_messages_are_handled_in_order() -> None:
    async def main() -> None:
        seen: list[str] = []
        done = asyncio.Event()

        async def note(message: StringValue) -> None:
            await asyncio.sleep(0.01 if message.value == "0" else 0)
            seen.append(message.value)
            if len(seen) == 5:
                done.set()

        async with channels({}, {StringValue: note}) as (left, _, _, _):
            for number in range(5):
                await left.tell(StringValue(value=str(number)))
            await asyncio.wait_for(done.wait(), 5)
        assert seen == ["0", "1", "2", "3", "4"]

    asyncio.run(main())


def test_an_answer_of_another_type_is_a_mistake() -> None:
    async def main() -> None:
        async with channels({}, {Int64Value: double}) as (left, _, _, _):
            with pytest.raises(ControlError, match="answered Int64Value with Int64Value"):
                await left.ask(Int64Value(value=1), StringValue, timeout=5)

    asyncio.run(main())


def test_a_silent_peer_runs_into_the_deadline() -> None:
    async def main() -> None:
        async def never(_: Int64Value) -> Int64Value:
            await asyncio.sleep(60)
            raise AssertionError

        async with channels({}, {Int64Value: never}) as (left, _, _, _):
            with pytest.raises(TimeoutError):
                await left.ask(Int64Value(value=1), Int64Value, timeout=0.05)

    asyncio.run(main())


def test_the_end_of_the_stream_ends_waiting_requests() -> None:
    async def main() -> None:
        async def hang_up(_: Int64Value) -> None:
            await right.close()

        async with channels({}, {Int64Value: hang_up}) as (left, right, run, _):
            with pytest.raises(ChannelClosed):
                await left.ask(Int64Value(value=1), Int64Value, timeout=5)
            with pytest.raises(ChannelClosed):
                await run
            with pytest.raises(ChannelClosed):
                await left.ask(Int64Value(value=1), Int64Value, timeout=5)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (Frame(9, b""), "unknown type 9"),
        (Frame(2, b"\x0f"), "broken Int64Value"),
        (Frame(1, b""), "nobody expects"),
    ],
)
def test_what_breaks_the_rules_ends_the_conversation(frame: Frame, why: str) -> None:
    async def main() -> None:
        one, other = await links()
        channel = Channel(other, CATALOGUE, handlers={Int64Value: double})
        await one.send(frame)
        with pytest.raises(ControlError, match=why):
            await asyncio.wait_for(channel.run(), 5)
        await one.close()
        await other.close()

    asyncio.run(main())


def test_an_unknown_optional_message_is_skipped() -> None:
    async def main() -> None:
        async with channels({}, {Int64Value: double}) as (left, _, _, _):
            await left._link.send(Frame(control.OPTIONAL | 77, b"whatever"))
            assert (await left.ask(Int64Value(value=2), Int64Value, timeout=5)).value == 4

    asyncio.run(main())


def test_one_stream_carries_two_conversations() -> None:
    """As between phaul and the source agent: `near` is phaul's, `far` is passed on to a third party."""

    async def main() -> None:
        agent_end, phaul_end = await links()
        to_destination, destination_end = await links()
        agent, phaul = Split(agent_end), Split(phaul_end)
        destination = Channel(destination_end, CATALOGUE, handlers={Int64Value: double})
        tasks = [
            asyncio.create_task(coroutine)
            for coroutine in (
                agent.run(),
                phaul.run(),
                destination.run(),
                control.pass_on(phaul.far, to_destination),
                control.pass_on(to_destination, phaul.far),
            )
        ]
        far = Channel(agent.far, CATALOGUE)
        tasks.append(asyncio.create_task(far.run()))
        await agent.near.send(Frame(5, b"for phaul"))
        assert (await far.ask(Int64Value(value=21), Int64Value, timeout=5)).value == 42
        assert await phaul.near.receive() == Frame(5, b"for phaul")

        await agent_end.close()
        with pytest.raises(ChannelClosed):
            await asyncio.wait_for(phaul.near.receive(), 5)
        await phaul_end.close()
        await to_destination.close()
        await destination_end.close()
        await asyncio.wait(tasks, timeout=5)
        assert all(task.done() for task in tasks)
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_a_number_or_type_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="one number"):
        Catalogue({1: BytesValue, 2: BytesValue}, write_failure, read_failure)

"""The first line: what is accepted, what is skipped, and what two phauls make of each other."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from phaul.errors import ConnectError, VersionError
from phaul.transport import hello
from phaul.transport.hello import Hello

OURS = Hello("1.0", (1, 3), frozenset({"a", "b"}), "6.1.0", "boot", 0)


def receive(*chunks: bytes, limit: int = 65536) -> Hello:
    async def main() -> Hello:
        reader = asyncio.StreamReader(limit=limit)
        for chunk in chunks:
            reader.feed_data(chunk)
        reader.feed_eof()
        return await hello.receive(reader)

    return asyncio.run(main())


def test_a_hello_arrives_as_it_was() -> None:
    assert receive(OURS.line()) == OURS
    ours = hello.local(frozenset({"tunnel"}))
    assert receive(ours.line()) == ours
    assert len(ours.boot_id) == 36


def test_what_a_login_shell_says_before_is_skipped() -> None:
    assert receive(b"Welcome to db2\n\nLast login: never\n", OURS.line()) == OURS


@pytest.mark.parametrize("noise", [b"", b"only a greeting\n", b"x" * 70_000, b"y\n" * 40_000])
def test_no_hello(noise: bytes) -> None:
    with pytest.raises(ConnectError):
        receive(noise, limit=4096)


def test_the_last_words_are_quoted() -> None:
    with pytest.raises(ConnectError, match="This account is not available"):
        receive(b"This account is not available.\n")


def mangled(**changes: object) -> bytes:
    return hello.MAGIC + json.dumps({**json.loads(OURS.line()[len(hello.MAGIC) :]), **changes}).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        hello.MAGIC + b"\n",
        hello.MAGIC + b"[]\n",
        hello.MAGIC + b"\xff\n",
        mangled(version="\x1b[2J"),
        mangled(version="1" * 300),
        mangled(protocols=[1]),
        mangled(protocols="many"),
        mangled(features=["A B"]),
        mangled(features=None),
        mangled(uid="root"),
    ],
)
def test_a_hello_from_elsewhere_is_checked(line: bytes) -> None:
    with pytest.raises(VersionError):
        receive(line)


def test_the_newest_common_protocol_and_the_common_features() -> None:
    theirs = dataclasses.replace(OURS, protocols=(2, 9), features=frozenset({"b", "c"}))
    agreement = hello.agree(OURS, theirs, "db2")
    assert agreement == hello.Agreement(3, frozenset({"b"}))


@pytest.mark.parametrize("protocols", [(4, 5), (0, 0)])
def test_nothing_in_common_names_both_and_the_way_out(protocols: tuple[int, int]) -> None:
    theirs = dataclasses.replace(OURS, version="9.9", protocols=protocols)
    with pytest.raises(VersionError, match=r"phaul 9\.9 on db2 .* this one \(1\.0\) speaks 1 to 3") as raised:
        hello.agree(OURS, theirs, "db2")
    assert "the same version" in raised.value.advice

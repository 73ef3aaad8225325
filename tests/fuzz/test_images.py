"""The reader of images against bytes that nobody meant to write."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from phaul_engine.errors import ImageError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.framing import Record, decode, encode, head_of
from phaul_engine.images.kinds import KINDS, Kind, parse_name
from phaul_engine.images.pages import Runs, parse_runs
from phaul_engine.images.verify import check

from tests.image_messages import files


def _read(kind: Kind, data: bytes) -> None:
    """Either it is refused, or what was understood is written again and understood as the same."""
    try:
        records = decode(kind, data, "x")
        if kind.stem.startswith("pagemap"):
            assert isinstance(parse_runs(records, "x"), Runs)
    except ImageError:
        return
    assert decode(kind, encode(kind, records, "x"), "x") == records


@given(st.sampled_from(list(KINDS.values())), st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_noise(kind: Kind, noise: bytes) -> None:
    _read(kind, noise)
    _read(kind, head_of(kind) + noise)
    _read(kind, head_of(kind) + len(noise).to_bytes(4, "little") + noise)


@given(files(), st.data())
@settings(max_examples=400, deadline=None)
def test_damage(file: tuple[Kind, list[Record]], data: st.DataObject) -> None:
    kind, records = file
    whole = bytearray(encode(kind, records, "x"))
    for _ in range(data.draw(st.integers(1, 4))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    _read(kind, bytes(whole))
    _read(kind, bytes(whole[: data.draw(st.integers(0, len(whole)))]))


@given(st.text(max_size=40) | st.from_regex(r"[a-z0-9-]{1,20}(\.tar\.gz)?(\.img)?", fullmatch=True))
def test_names(name: str) -> None:
    try:
        parsed = parse_name(name)
    except ImageError:
        return
    assert parsed is None or parsed[0].name(parsed[1]) == name


@given(st.lists(files(), max_size=3), st.data())
@settings(max_examples=200, deadline=None)
def test_checkpoints_in_one_piece(some: list[tuple[Kind, list[Record]]], data: st.DataObject) -> None:
    checkpoint = Checkpoint()
    for index, (kind, records) in enumerate(some):
        ident = {"": None, "-%s": "dump"}.get(kind.naming.value, index)
        if not checkpoint.has(kind.stem, ident):
            for record in records:
                checkpoint.put(kind.stem, ident, record.message, record.payload)
    whole = bytearray(checkpoint.to_bytes())
    assert Checkpoint.from_bytes(bytes(whole)).to_bytes() == whole
    check(checkpoint)  # whatever the records say, they are told about and nothing breaks
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        Checkpoint.from_bytes(bytes(whole))
    except ImageError:
        pass

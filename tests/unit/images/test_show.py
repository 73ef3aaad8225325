"""Images as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from phaul_engine.images import framing, show
from phaul_engine.images.framing import Record
from phaul_engine.images.kinds import parse_name
from phaul_engine.images.pb import pipe_data_pb2

NAME = "pipes-data.img"


@pytest.mark.parametrize(("size", "shown", "left_out"), [(5, 5, None), (1024, 1024, None), (60_000, 1024, 58_976)])
def test_of_a_long_content_the_beginning_is_shown(tmp_path: Path, size: int, shown: int, left_out: int | None) -> None:
    parsed = parse_name(NAME)
    assert parsed is not None
    records = [Record(pipe_data_pb2.pipe_data_entry(pipe_id=7, bytes=size), b"y" * size), *_short()]
    (tmp_path / NAME).write_bytes(framing.encode(parsed[0], records, NAME))
    first, second = show.show_file(tmp_path, NAME)["entries"]
    assert (first["bytes"], first["extra"]) == (size, "y" * shown)
    assert first.get("extra_left_out") == left_out
    assert second["extra"] == "0x00ff"


def _short() -> list[Record]:
    return [Record(pipe_data_pb2.pipe_data_entry(pipe_id=8, bytes=2), b"\0\xff")]

"""Images told by what differs from those before: the same comes out, what is the same is shared."""

import contextlib

import pytest
from phaul_engine.errors import ImageError
from phaul_engine.images import delta
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import fdinfo_pb2, fs_pb2, pipe_data_pb2


def checkpoint(cwd: int, flags: int, content: bytes, *, second: bool = True) -> Checkpoint:
    made = Checkpoint()
    made.put("fs", 7, fs_pb2.fs_entry(cwd_id=cwd, root_id=2, umask=0o22))
    for fd in (0, 1) if second else (0,):
        made.put("fdinfo", 1, fdinfo_pb2.fdinfo_entry(id=fd + 1, flags=flags * fd, type=fdinfo_pb2.REG, fd=fd))
    data = pipe_data_pb2.pipe_data_entry(pipe_id=5, bytes=len(content), size=4096)
    made.put("pipes-data", None, data, content)
    return made


EARLY, LATE = checkpoint(1, 0, b"abc"), checkpoint(1, 1, b"defg")


def test_what_is_made_anew_is_the_later_checkpoint() -> None:
    for before, after in [(EARLY, LATE), (LATE, EARLY), (EARLY, EARLY), (Checkpoint(), LATE), (LATE, Checkpoint())]:
        made = delta.apply(before, delta.Known(before).delta(after))
        assert made.to_bytes() == after.to_bytes()
        assert made.files() == after.files()


def test_files_and_records_that_are_the_same_are_shared() -> None:
    made = delta.apply(EARLY, delta.Known(EARLY).delta(LATE))
    assert made.shares(EARLY, "fs")
    assert not made.shares(EARLY, "fdinfo")
    first, second = zip(EARLY.records("fdinfo", 1), made.records("fdinfo", 1), strict=True)
    assert first[0] is first[1]
    assert second[0] is not second[1]


def test_a_file_more_or_less_is_not_shared() -> None:
    more = checkpoint(1, 0, b"abc")
    more.put("fs", 8, fs_pb2.fs_entry(cwd_id=1, root_id=2))
    assert not delta.apply(EARLY, delta.Known(EARLY).delta(more)).shares(EARLY, "fs")
    assert not delta.apply(more, delta.Known(more).delta(EARLY)).shares(more, "fs")


def test_a_table_of_another_length_travels_as_a_whole() -> None:
    shorter = checkpoint(1, 0, b"abc", second=False)
    assert delta.apply(EARLY, delta.Known(EARLY).delta(shorter)).to_bytes() == shorter.to_bytes()


def test_only_files_that_differ_travel() -> None:
    """In whatever order the kinds were looked at; not where those of one kind were met in another order."""
    turned, swapped, twice = Checkpoint(), Checkpoint(), checkpoint(1, 0, b"abc")
    for stem, ident in reversed(LATE.files()):
        turned.adopt(stem, ident, LATE.records(stem, ident))
    told = delta.Known(EARLY).delta(turned)
    assert b"fs-7" not in told
    assert b"fdinfo-1" in told
    made = delta.apply(EARLY, told)
    assert {file: made.records(*file) for file in made.files()} == {file: LATE.records(*file) for file in LATE.files()}

    twice.put("fs", 8, fs_pb2.fs_entry(cwd_id=1, root_id=2))
    for stem, ident in [("fs", 8), ("fs", 7), ("fdinfo", 1), ("pipes-data", None)]:
        swapped.adopt(stem, ident, twice.records(stem, ident))
    made = delta.apply(twice, delta.Known(twice).delta(swapped))
    assert made.files() == swapped.files()


def test_what_is_known_stays_as_it_was() -> None:
    before = checkpoint(1, 0, b"abc")
    delta.apply(before, delta.Known(EARLY).delta(LATE))
    assert before.to_bytes() == EARLY.to_bytes()


def test_a_delta_that_does_not_fit_is_refused() -> None:
    other = Checkpoint()
    for number in (1, 2, 3):
        other.put("fs", number, fs_pb2.fs_entry(cwd_id=1, root_id=2))
    for before in (Checkpoint(), other):
        with pytest.raises(ImageError, match="known"):
            delta.apply(before, delta.Known(EARLY).delta(LATE))


def test_a_delta_that_is_cut_short_or_goes_on_is_refused() -> None:
    for before in (EARLY, Checkpoint()):
        whole = delta.Known(before).delta(LATE)
        for size in range(len(whole)):
            with pytest.raises(ImageError):
                delta.apply(before, whole[:size])
        with pytest.raises(ImageError, match="goes on"):
            delta.apply(before, whole + b"x")


def test_a_damaged_delta_is_an_image_error_at_worst() -> None:
    whole = delta.Known(EARLY).delta(LATE)
    for at in range(len(whole)):
        for bit in (0, 7):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            with contextlib.suppress(ImageError):
                delta.apply(EARLY, bytes(flipped)).to_bytes()

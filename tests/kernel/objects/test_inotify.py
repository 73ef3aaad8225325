"""Inotify instances."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from phaul_engine import calls
from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import fdinfo_pb2
from phaul_engine.objects.base import Restoration, kind_of_entry

from tests.kernel.objects.subject import at, moves_in_turn, started

IN_CREATE, IN_MODIFY, IN_ONLYDIR = 0x100, 0x2, 0x1000000


def _events(fd: int) -> list[tuple[int, int, bytes]]:
    found, data = [], os.read(fd, 4096)
    while data:
        wd, mask, _, size = struct.unpack("<iIII", data[:16])
        found.append((wd, mask, data[16 : 16 + size].rstrip(b"\0")))
        data = data[16 + size :]
    return found


def test_watches_keep_their_numbers(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("x")

    def setup() -> None:
        at(calls.inotify_init(os.O_NONBLOCK), 10)
        for name in ("a", "b", "c"):
            calls.inotify_add_watch(10, str(tmp_path / name), IN_CREATE | IN_ONLYDIR)
        calls.inotify_rm_watch(10, 2)
        assert calls.inotify_add_watch(10, str(tmp_path / "file"), IN_MODIFY) == 4
        _events(10)
        (tmp_path / "c").rename(tmp_path / "renamed")

    def check() -> None:
        pid = os.getpid()
        (tmp_path / f"a/{pid}").mkdir()
        (tmp_path / f"b/{pid}").mkdir()
        (tmp_path / f"renamed/{pid}").mkdir()
        (tmp_path / "file").write_bytes(b"")
        name = str(pid).encode()
        assert _events(10) == [(1, IN_CREATE | 0x40000000, name), (3, IN_CREATE | 0x40000000, name), (4, 2, b"")]
        assert not os.get_blocking(10)
        (tmp_path / "file").write_text("x")
        assert calls.inotify_add_watch(10, str(tmp_path), IN_CREATE) >= 5

    moves_in_turn(setup, check)


def test_unread_events_are_a_blocker_in_the_freeze(tmp_path: Path) -> None:
    def setup() -> None:
        at(calls.inotify_init(0), 10)
        calls.inotify_add_watch(10, str(tmp_path), IN_CREATE)
        (tmp_path / "new").mkdir()

    with started(setup) as subject:
        assert not subject.collect(survey=True).blockers
        (blocker,) = subject.collect().blockers
        assert "unread events" in str(blocker)


def test_a_watch_on_what_has_no_path_is_a_blocker(tmp_path: Path) -> None:
    def setup() -> None:
        (tmp_path / "gone").write_text("")
        at(os.open(tmp_path / "gone", os.O_RDONLY), 11)
        at(calls.inotify_init(0), 10)
        calls.inotify_add_watch(10, str(tmp_path / "gone"), IN_MODIFY)
        os.unlink(tmp_path / "gone")

    with started(setup) as subject:
        (blocker,) = subject.collect(survey=True).blockers
        assert "no path" in str(blocker)


@pytest.mark.parametrize(("wds", "error"), [((1 << 30,), ImageError), ((1, 1), ImageError), ((1, 2), RebuildError)])
def test_hostile_watches(wds: tuple[int, ...], error: type[Exception]) -> None:
    """A number out of reach, a number twice, two watches of one file."""
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.INOTIFY, id=1)
    entry.ify.id, entry.ify.flags = 1, 0
    for wd in wds:
        watch = entry.ify.wd.add(id=1, i_ino=1, mask=2, ignored_mask=0, s_dev=1, wd=wd)
        watch.f_handle.bytes, watch.f_handle.type, watch.f_handle.path = 0, 0, b"/"
    with pytest.raises(error):
        kind_of_entry(entry).rebuild(entry, Restoration(Checkpoint()))

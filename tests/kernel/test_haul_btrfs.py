"""A btrfs subvolume is hauled by send and receive at first, and is the same in the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.errors import EngineError

from phaul.errors import PhaulError
from phaul.haul import beside, btrfs, index, trees, wire
from phaul.haul.content import SMALL
from tests.hosts import disks
from tests.hosts.files import describe, make_something_of_everything
from tests.kernel.test_haul import Pair, listed
from tests.subjects.programs import build, parse_status, wait_until

pytestmark = pytest.mark.skipif(bool(disks.lacks_btrfs()), reason=disks.lacks_btrfs())


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A subvolume, and a place for it on another file system."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with (
        disks.btrfs(tmp_path / "a.image", tmp_path / "a"),
        disks.btrfs(tmp_path / "b.image", tmp_path / "b"),
    ):
        subprocess.run(["btrfs", "-q", "subvolume", "create", tmp_path / "a" / "web"], check=True)
        yield tmp_path / "a" / "web", tmp_path / "b" / "place" / "web"


@pytest.fixture
def pair(places: tuple[Path, Path]) -> Iterator[Pair]:
    """Both sides; nothing has been sent."""
    here, there = places
    made = Pair(here, there, subvolume=True)
    yield made
    made.close()
    beside.discard(made.arriving.entries()[0]["data"])
    assert (os.listdir(there.parent), os.listdir(here.parent)) == ([], ["web"])


def _last(pair: Pair) -> None:
    pair.leaving.predict([])
    pair.leaving.last()
    pair.applied()


def test_everything_that_a_file_can_have(pair: Pair) -> None:
    make_something_of_everything(pair.here / "some")
    os.setxattr(pair.here / "some" / "directory", "btrfs.compression", b"zstd")
    subprocess.run(["cp", "--reflink=always", pair.here / "some" / "holes", pair.here / "same"], check=True)
    pair.leaving.first()
    assert describe(pair.staged) == describe(pair.here)
    assert btrfs.is_subvolume(str(pair.staged))
    assert sum(pair.passed) < 1 << 20, "holes are not sent"
    assert os.listdir(pair.here.parent) == ["web"], "snapshots are removed"
    assert os.listdir(pair.there.parent) in (["web.phaul-test", "web"], ["web", "web.phaul-test"])
    os.rename(pair.here / "some", pair.here / "other")
    os.link(pair.here / "same", pair.here / "linked")
    (pair.here / "other" / "link").unlink()
    before = sum(pair.passed)
    _last(pair)
    assert describe(pair.staged) == describe(pair.here)
    assert sum(pair.passed) - before < 1 << 18, "what was renamed is not sent again"


def test_what_happens_while_it_is_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, between and after snapshots: directories come, go and are renamed, and a large file is written to."""
    here = pair.here
    for name in ("first", "second", "renamed"):
        (here / name / "below").mkdir(parents=True)
        (here / name / "below" / "file").write_text(name)
    large = here / "large"
    large.write_bytes(os.urandom(64 * SMALL))
    taken = []
    original = btrfs.snapshot

    def snapshot(source: str, place: str, *, writable: bool) -> None:
        if writable:
            return original(source, place, writable=True)
        taken.append(place)
        number = len(taken)
        (here / f"before {number}" / "below").mkdir(parents=True)
        (here / f"before {number}" / "below" / "file").write_text("before")
        os.rename(here / "renamed", here / "other")
        original(source, place, writable=False)
        (here / f"before {number}" / "below" / "later").write_text("later")
        (here / f"after {number}" / "below").mkdir(parents=True)
        (here / f"after {number}" / "below" / "file").write_text("after")
        (here / "other" / "below" / "file").write_text(f"changed {number}")
        os.rename(here / "other", here / "renamed")
        with large.open("r+b") as file:
            file.seek(number << 20)
            file.write(b"changed")
        if number == 2:
            shutil.rmtree(here / "first")
        return None

    monkeypatch.setattr(btrfs, "snapshot", snapshot)
    monkeypatch.setattr("phaul.haul.leaving._SOON", 0.0)
    monkeypatch.setattr("phaul.haul.leaving._ENOUGH", 100.0)
    pair.leaving.first()
    assert len(taken) > 2
    assert sum(pair.passed) < 64 * SMALL * 1.5, "only what has changed of the large file is sent twice"
    _last(pair)
    assert describe(pair.staged) == describe(here)


def test_a_program_works_in_it_all_the_time(pair: Pair) -> None:
    (pair.here / "data").mkdir()
    status = pair.here / "status"
    process = subprocess.Popen([build("filer"), pair.here / "data", status])
    try:
        wait_until(lambda: status.exists() and "writes" in parse_status(status.read_text()), "it works", 20.0)
        pair.leaving.first()
        for _ in range(5):
            pair.leaving.round()
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        pair.leaving.predict([process.pid])
        pair.leaving.last()
        pair.applied()
        assert describe(pair.staged) == describe(pair.here)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait()


def test_a_place_where_no_snapshot_can_be(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = places
    (here / "file").write_text("content")

    def none(*_: object, **__: object) -> None:
        raise PhaulError("there can be none")

    pair = Pair(here, there, by_rsync=True, subvolume=True)
    monkeypatch.setattr(btrfs, "snapshot", none)
    pair.leaving.first()
    assert describe(pair.staged) == describe(here)
    pair.close()


def test_what_is_no_snapshot(places: tuple[Path, Path]) -> None:
    here, there = places
    pair = Pair(here, there)
    with pytest.raises(EngineError, match="is no name of a snapshot"):
        pair.arriving.take(wire.letter(wire.Tag.BTRFS, {"tree": 0, "name": "../web"}))
    pair.arriving.take(wire.letter(wire.Tag.BTRFS, {"tree": 0, "name": "some"}))
    pair.arriving.take(wire.letter(wire.Tag.STREAM, b"something else"))
    with pytest.raises(EngineError, match="btrfs receive failed"):
        pair.arriving.take(wire.letter(wire.Tag.STREAM))
    pair.close()
    beside.discard(pair.arriving.entries()[0]["data"])
    assert os.listdir(there.parent) == []


def test_who_stops_it(pair: Pair) -> None:
    (pair.here / "large").write_bytes(os.urandom(8 << 20))
    pair.stop_at = 1 << 20
    with pytest.raises(EngineError, match="stopped"):
        pair.leaving.first()


def test_what_can_be_sent(places: tuple[Path, Path], tmp_path: Path) -> None:
    here, there = places
    assert btrfs.can_send(str(here))
    assert not btrfs.can_send(str(here.parent)), "its snapshots would be on another file system"
    (here / "directory").mkdir()
    assert not btrfs.can_send(str(here / "directory"))
    assert btrfs.can_take(str(there))
    assert not btrfs.can_take(str(tmp_path))
    assert trees.describe(str(here), counted=True).subvolume
    subprocess.run(["btrfs", "-q", "subvolume", "create", here / "inside"], check=True)
    (here / "inside" / "file").write_text("would be left out")
    assert index.count(str(here))[2] == str(here / "inside")
    assert "inside is a subvolume of its own in it" in trees.describe(str(here), counted=True).problem


def test_snapshots_that_a_dead_agent_has_left(places: tuple[Path, Path]) -> None:
    here, _ = places
    for name in ("web.phaul-one.0", "web.phaul-one.12", "web.phaul-one.x", "web.phaul-other.0"):
        btrfs.snapshot(str(here), f"{here.parent}/{name}", writable=False)
    (here.parent / "web.phaul-one.3").mkdir()
    for _ in range(2):
        btrfs.forget(btrfs.entry(str(here), "one")["data"])
    assert sorted(os.listdir(here.parent)) == ["web", "web.phaul-one.3", "web.phaul-one.x", "web.phaul-other.0"]


def test_file_attributes(pair: Pair) -> None:
    """A file that is not copied on write has to be given that while it is empty."""
    (pair.here / "disks").mkdir()
    subprocess.run(["chattr", "+C", pair.here / "disks"], check=True)
    (pair.here / "disks" / "disk").write_bytes(os.urandom(4 * SMALL))
    (pair.here / "fixed").write_text("fixed")
    subprocess.run(["chattr", "+i", pair.here / "fixed"], check=True)
    try:
        pair.leaving.first()
        assert describe(pair.staged) == describe(pair.here)
        _last(pair)
        pair.leaving.last()
        wait_until(lambda: listed(pair.staged) == listed(pair.here), f"{listed(pair.staged)} are {listed(pair.here)}")
        assert {"C", "i"} <= set(listed(pair.here).values())
    finally:
        subprocess.run(["chattr", "-i", pair.here / "fixed"], check=True)

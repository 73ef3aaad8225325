"""A directory that a program works in is hauled, round by round, and is the same in the end."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from phaul_engine.errors import EngineError

from phaul.errors import PhaulError
from phaul.haul import beside, btrfs, content, index, rsync, watch, wire
from phaul.haul.arriving import Arriving
from phaul.haul.leaving import Leaving
from tests.hosts.files import describe, make_something_of_everything
from tests.subjects.programs import build, parse_status, wait_until

BY = [pytest.param(False, id="by records"), pytest.param(True, id="by rsync")]
if not rsync.here():
    BY.pop()


@dataclass
class Pair:
    """Both sides of a haul, joined by queues: letters are applied by a thread, as an agent does."""

    here: Path
    there: Path
    by_rsync: bool = False
    subvolume: bool = False
    stop_at: int = 1 << 62
    passed: list[int] = field(default_factory=list)
    problems: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._letters: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.arriving = Arriving([str(self.there)], "test", lambda body: self.leaving.take(body))
        names = {str(self.here): btrfs.prefix(str(self.here), "test")} if self.subvolume else {}
        self.leaving = Leaving(
            [str(self.here)], self._send, alive=self._alive, by_rsync=self.by_rsync, subvolumes=names, flagged=True
        )
        self.arriving.make()
        self._thread = threading.Thread(target=self._apply)
        self._thread.start()

    @property
    def staged(self) -> Path:
        """Where it comes in."""
        return Path(beside.staged_name(str(self.there), "test"))

    def _send(self, letter: bytes) -> None:
        self.passed.append(len(letter))
        if sum(self.passed) > self.stop_at:
            self.leaving.stop()
        self._letters.put(letter)

    def _alive(self) -> None:
        if self.problems:
            raise self.problems[0]

    def _apply(self) -> None:
        while (letter := self._letters.get()) is not None:
            try:
                self.arriving.take(letter)
            except Exception as error:
                self.problems.append(error)
                return

    def applied(self) -> None:
        """All that was sent has been applied."""
        while not self._letters.empty():
            self._alive()
            time.sleep(0.01)
        self.leaving.round()

    def close(self) -> None:
        """End it."""
        self._letters.put(None)
        self._thread.join()
        self.arriving.close()
        self.leaving.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """A pair for a directory."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made: list[Pair] = []

    def make_one(here: Path, *, by_rsync: bool = False) -> Pair:
        made.append(Pair(here, tmp_path / "place" / "there", by_rsync))
        return made[-1]

    (tmp_path / "here").mkdir()
    yield make_one
    for pair in made:
        pair.close()


@pytest.mark.parametrize("by_rsync", BY)
def test_everything_that_a_file_can_have(tmp_path: Path, make: Callable[..., Pair], by_rsync: bool) -> None:
    here = tmp_path / "here"
    make_something_of_everything(here / "some")
    pair = make(here, by_rsync=by_rsync)
    pair.leaving.first()
    assert describe(pair.staged) == describe(here)
    shutil.rmtree(here / "some" / "directory")
    (here / "some" / "directory").symlink_to("file")
    (here / "some" / "link").unlink()
    (here / "some" / "link").mkdir()
    os.rename(here / "some", here / "other")
    os.removexattr(here / "other" / "file", "user.colour")
    pair.leaving.round()
    assert (pair.staged / "some").exists()  # what was opened by that name still can be
    pair.leaving.last()
    pair.applied()
    assert describe(pair.staged) == describe(here)


@pytest.mark.parametrize("by_rsync", BY)
def test_a_program_works_in_it_all_the_time(tmp_path: Path, make: Callable[..., Pair], by_rsync: bool) -> None:
    here = tmp_path / "here"
    program = build("filer", "-static")
    with subprocess.Popen([program, here, "status"]) as process:
        try:
            wait_until(lambda: (here / "status").exists(), "it works", 20.0)
            pair = make(here, by_rsync=by_rsync)
            pair.leaving.first()
            for _ in range(5):
                pair.leaving.round()
                time.sleep(0.1)
            os.kill(process.pid, signal.SIGSTOP)
            wait_until(lambda: _stopped(process.pid), "it stands")
            assert pair.leaving.predict([process.pid]) < 30
            pair.leaving.last()
            pair.applied()
            assert describe(pair.staged) == describe(here)
        finally:
            os.kill(process.pid, signal.SIGCONT)
            process.terminate()
    assert parse_status((here / "status").read_text())["state"] == "pass"


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.skipif(not rsync.here(), reason="rsync is not installed")
def test_one_of_two_names_goes_away_while_rsync_looks(
    tmp_path: Path, make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have meant to send the file by that one, and then sends none."""
    here = tmp_path / "here"
    (here / "file").write_text("content")

    def send(*_: object, **__: object) -> rsync.Sent:
        os.link(here / "file", here / "other")
        os.unlink(here / "other")
        return rsync.Sent.LESS

    monkeypatch.setattr(rsync, "send", send)
    pair = make(here, by_rsync=True)
    pair.leaving.first()
    pair.applied()
    assert describe(pair.staged) == describe(here)


def test_a_round_is_as_large_as_what_changed(tmp_path: Path, make: Callable[..., Pair]) -> None:
    here = tmp_path / "here"
    for number in range(2000):
        (here / f"{number}").write_bytes(bytes(1000))
    with (here / "large").open("wb") as file:
        file.write(os.urandom(8 << 20))
    pair = make(here)
    pair.leaving.first()
    pair.passed.clear()
    with (here / "large").open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"changed")
    (here / "17").write_bytes(b"changed")
    os.rename(here / "18", here / "renamed")
    pair.leaving.round()
    assert sum(pair.passed) < 2 * content.BLOCK
    pair.leaving.last()
    pair.applied()
    assert describe(pair.staged) == describe(here)


def test_more_happens_than_the_kernel_remembers(
    tmp_path: Path, make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "directory").mkdir()
    (here / "directory" / "kept").write_text("kept")
    (here / "gone").write_text("gone")
    pair = make(here)
    pair.leaving.first()
    time.sleep(0.1)
    monkeypatch.setattr(watch.Watch, "read", lambda _: watch.Touched(lost=True))
    (here / "gone").unlink()
    (here / "directory" / "new").write_text("new")
    (here / "directory" / "made").mkdir()
    (here / "directory" / "kept").write_text("KEPT")
    pair.leaving.round()
    pair.leaving.last()
    pair.applied()
    assert describe(pair.staged) == describe(here)


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "put", "path": "../x", "make": "new", "kind": stat.S_IFREG},
        {"op": "put", "path": "/x", "make": "new", "kind": stat.S_IFREG},
        {"op": "put", "path": "out/x", "make": "new", "kind": stat.S_IFREG},
        {"op": "put", "path": "x", "make": "hard", "other": "out/secret"},
        {"op": "put", "path": "x", "make": "hard", "other": "../secret"},
        {"op": "data", "path": "out/secret", "offset": 0},
        {"op": "gone", "path": ""},
        {"op": "put", "path": "x", "make": "new", "kind": 0},
        {"op": "put", "path": "file", "size": -1},
        {"op": "hole", "path": "file"},
        {"op": "put", "path": "file", "meta": {"mode": "x"}},
        {"op": "what", "path": "file"},
        {"path": 1},
        {},
    ],
)
def test_records_that_lead_out_of_it(tmp_path: Path, make: Callable[..., Pair], fields: dict[str, object]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    pair = make(tmp_path / "here")
    (pair.staged / "out").symlink_to(outside)
    (pair.staged / "file").write_text("content")
    before = describe(outside)
    with pytest.raises(EngineError):
        pair.arriving.take(wire.letter(wire.Tag.RECORDS, wire.pack(wire.Record({"tree": 0, **fields}, b"x"))))
    assert describe(outside) == before


def test_words_for_rsync_that_are_not_known() -> None:
    known = "rsync --server -lHogDtpAXrxSe.iLsfxCIvu --delete --numeric-ids . tree"
    assert rsync.server_command(known, "/place")[-2:] == [".", "/place/"]
    for words in (
        "rsync --server --sender -e.L . /etc",
        "rsync --server --log-file=/x -r . x",
        "sh -c x",
        "",
        known[:-1],
    ):
        if words != known[:-1]:
            with pytest.raises(EngineError):
                rsync.server_command(words, "/place")


def test_what_journals_hold_of_it(tmp_path: Path) -> None:
    final = tmp_path / "a" / "b"
    pair_entry = beside.entry(str(final), beside.staged_name(str(final), "x"), [str(tmp_path / "a")])["data"]
    staged = Path(pair_entry["staged"])

    def make() -> None:
        staged.mkdir(parents=True)
        final.mkdir()
        (staged / "file").write_text("content")

    make()
    for _ in range(2):
        beside.discard(pair_entry)
        assert list(tmp_path.iterdir()) == []
    make()
    for _ in range(2):
        beside.publish(pair_entry)
        assert (final / "file").read_text() == "content"
        assert not staged.exists()
    aside = Path(f"{final}{beside.ASIDE}")
    entry = beside.left_entry([str(final)], [os.getpid()])["data"]
    beside.put_aside(entry)  # we live
    assert final.exists()
    dead = {**entry, "tasks": []}
    for _ in range(2):
        beside.put_aside(dead)
        assert (aside / "file").read_text() == "content"
        assert not final.exists()
    final.mkdir()
    beside.put_aside(dead)  # another one
    assert final.exists()
    beside.put_aside({**beside.left_entry([str(final)], [])["data"], "tasks": []})
    assert list(aside.iterdir()) == []  # of the older one


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    final = tmp_path / "there"
    arriving = Arriving([str(final)], "x", lambda _: None)
    final.mkdir()
    (final / "file").write_text("somebody's")
    with pytest.raises(PhaulError, match="has appeared"):
        arriving.make()
    arriving.close()
    beside.discard(arriving.entries()[0]["data"])
    assert [one.name for one in tmp_path.iterdir()] == ["there"]


def test_counting(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_bytes(bytes(10000))
    names, size, _ = index.count(str(tmp_path))
    assert names == 2
    assert size >= 12288


def _flags(place: Path, words: str) -> None:
    subprocess.run(["chattr", words, place], check=True)


def listed(top: Path) -> dict[str, str]:
    """What lsattr(1) says, but of what the file system decides."""
    done = subprocess.run(["lsattr", "-R", "-a", top], check=True, capture_output=True, text=True)
    lines = [line.split(None, 1) for line in done.stdout.splitlines() if f" {top}" in line and "/.." not in line]
    return {line[1].removeprefix(str(top)): line[0].replace("e", "").replace("-", "") for line in lines}


@pytest.mark.parametrize("by_rsync", BY)
def test_file_attributes(tmp_path: Path, make: Callable[..., Pair], by_rsync: bool) -> None:
    here = tmp_path / "here"
    for name in ("fixed", "log", "plain", "later"):
        (here / name).write_text(name)
    (here / "closed").mkdir()
    (here / "closed" / "file").write_text("file")
    for words, name in (("+i", "fixed"), ("+ad", "log"), ("+A", "plain"), ("+i", "closed"), ("+i", "closed/file")):
        _flags(here / name, words)
    os.link(here / "plain", here / "other")
    pair = make(here, by_rsync=by_rsync)
    try:
        pair.leaving.first()
        assert "i" not in "".join(listed(pair.staged).values()), "more may come"
        with (here / "log").open("a") as file:
            file.write("more")
        pair.leaving.last()
        pair.applied()
        assert set(listed(here).values()) >= {"i", "ad", "A"}
        pair.leaving.last()
        wait_until(lambda: listed(pair.staged) == listed(here), f"{listed(pair.staged)} are {listed(here)}", 5.0)
        _flags(here / "fixed", "-i")  # that freeze was let go
        _flags(here / "closed", "-i")
        (here / "later").chmod(0o600)
        _flags(here / "later", "+i")
        _flags(here / "plain", "-A")
        (here / "fixed").write_text("changed")
        (here / "closed" / "new").write_text("new")
        pair.leaving.round()
        pair.leaving.last()
        wait_until(lambda: listed(pair.staged) == listed(here), f"{listed(pair.staged)} are {listed(here)}", 5.0)
        assert describe(pair.staged) == describe(here)
        beside.discard(pair.arriving.entries()[0]["data"])
        assert not pair.staged.exists()
    finally:
        subprocess.run(["chattr", "-R", "-f", "-ia", here, tmp_path / "place"], check=False)

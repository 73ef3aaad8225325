"""The source's side of a haul: a first round of everything, rounds of what was touched, the last in the freeze.

Everything is sent over the agents' own connection, in the order of what else is said there: images that name a file
follow the file. All methods block, and belong into a thread, but `take` and `stop`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from phaul_engine.errors import EngineError

from phaul.errors import PhaulError

from . import btrfs, layers, rsync, wire
from .index import Index
from .layers import Layers
from .wire import Outbox, Tag

log = logging.getLogger(__name__)

_LOOK = 0.2  # seconds between two looks whether to go on
_TRIES = 5  # of rsync, where too much happens meanwhile
_SNAPSHOTS = 5  # of a subvolume, at most
_SOON = 1.0  # seconds: what has changed while a snapshot was sent for no longer than that is left to the rounds
_ENOUGH = 0.5  # of the time that the one before took: so does what takes longer than that
_PATIENCE = 60.0  # seconds for a word from there
_PACE = 5e-4  # seconds a unit of work, until this run has measured something
_TELLING = 50  # units of work in a pass that tells


class Leaving:
    """The trees of one migration. `send` takes a letter for the destination; `alive` is told while something goes on.
    `bandwidth` in bytes a second, 0 for no limit. Trees in `overlays` are file systems of layers;
    those in `subvolumes` are sent by btrfs at first, with snapshots whose names begin with what is said.
    `flagged`: the destination knows file attributes."""

    def __init__(
        self,
        trees: Iterable[str],
        send: Callable[[bytes], None],
        *,
        alive: Callable[[], None],
        bandwidth: int = 0,
        by_rsync: bool = False,
        overlays: Mapping[str, Layers] | None = None,
        subvolumes: Mapping[str, str] | None = None,
        flagged: bool = False,
    ) -> None:
        overlays = overlays or {}
        self._indexes = [
            Index(number, root, without=layers.inside(root, overlays), layered=root in overlays, flagged=flagged)
            for number, root in enumerate(trees)
        ]
        self._send_letter = send
        self._alive = alive
        self._bandwidth = bandwidth
        self._by_rsync = by_rsync
        self._subvolumes = dict(subvolumes or {})
        self._stopped = False
        self._words: queue.SimpleQueue[tuple[Tag, bytes]] = queue.SimpleQueue()
        self._number = 0
        self._pace = _PACE
        self._begun = 0.0
        self._first = 0.0
        self._told = 0.0
        self._sent = 0
        self._paced = 0

    def close(self) -> None:
        """Stop watching."""
        for index in self._indexes:
            index.close()

    def stop(self) -> None:
        """Whoever is in a call comes out of it soon, with an error."""
        self._stopped = True

    def take(self, body: bytes) -> None:
        """A letter from the destination."""
        tag, content = wire.open_letter(body)
        if tag not in (Tag.DONE, Tag.STREAM):
            raise EngineError(f"the destination sent files' {tag.name} where it makes no sense")
        self._words.put((tag, bytes(content)))

    @property
    def sent(self) -> int:
        """How much has been sent, of records and of rsync's words."""
        return self._sent

    @property
    def seconds(self) -> float:
        """Since the first round began."""
        return time.monotonic() - self._first

    # -- rounds --------------------------------------------------------------------------------------------------

    def first(self) -> None:
        """Everything. What is touched meanwhile goes with the next round."""
        self._first = time.monotonic()
        with contextlib.ExitStack() as copies:
            plain = [index for index in self._indexes if not self._first_by_btrfs(index, copies)]
            for index in plain if self._by_rsync else ():
                self._first_by_rsync(index)
            if not self._by_rsync:
                self._pass(lambda index, outbox: index.everything(outbox) if index in plain else iter(()))
            self.round()

    def _first_by_btrfs(self, index: Index, copies: contextlib.ExitStack) -> bool:
        """Snapshots, one after the other while that takes long. The last one is kept by `copies`. False where there can
        be none."""
        prefix, parent, before = self._subvolumes.get(index.root, ""), "", math.inf

        def send(letter: bytes) -> None:
            index.look()
            self._paced_send(letter)

        if not prefix:
            return False
        copies.callback(_forget, prefix)
        for number in range(_SNAPSHOTS):
            index.follow(self._go_on)
            copy = f"{prefix}{number}"
            try:
                btrfs.snapshot(index.root, copy, writable=False)
            except PhaulError as error:
                if parent:
                    raise
                log.warning("%s", error)
                return False
            self._begun, self._paced = time.monotonic(), 0
            btrfs.send(index.number, copy, parent, send, self._word, self._go_on)
            took, parent = time.monotonic() - self._begun, copy
            if took < _SOON or took > before * _ENOUGH:
                break
            before = took
        self._send(wire.letter(Tag.BTRFS, {"tree": index.number}))
        copies.callback(index.leave_copy)
        index.adopt_copy(parent, self._go_on)
        return True

    def _first_by_rsync(self, index: Index) -> None:
        def send(letter: bytes) -> None:
            index.look()
            self._send(letter)

        for _ in range(_TRIES):
            without = index.adopt(self._go_on)
            sent = rsync.send(
                index.number, index.root, send, self._word, without, self._bandwidth, compared=index.layered
            )
            if sent is not rsync.Sent.AGAIN and index.doubt(links=sent is rsync.Sent.LESS):
                return
        raise PhaulError(
            f"more happens in {index.root} than rsync can follow, or the kernel tells of",
            advice="raise fs.inotify.max_queued_events (sysctl), or have the program do less meanwhile",
        )

    def complete(self) -> None:
        """What lives on the trees can be made there."""
        self._send(wire.letter(Tag.COMPLETE))

    def round(self) -> None:
        """What was touched since the last round; returns when it is applied there."""
        self._pass(lambda index, outbox: index.changes(outbox, last=False))

    def last(self) -> None:
        """In the freeze, when `predict` has been asked in it: all that is left. Nobody waits for it: what follows it
        does."""
        self._pass(lambda index, outbox: index.changes(outbox, last=True), wait=False)

    def predict(self, pids: Iterable[int]) -> float:
        """Seconds that the last round would take now, if tasks `pids` did not run any more."""
        work = 0.0
        written = mapped(pids)
        for index in self._indexes:
            for inode in written:
                for path in index.names_of(inode):
                    index.touch(path)
            work += index.pending()
        return work * self._pace

    def _pass(self, walk: Callable[[Index, Outbox], Iterator[None]], *, wait: bool = True) -> None:
        outbox = Outbox(self._paced_send if wait else self._send)
        self._begun, self._paced = time.monotonic(), 0
        for index in self._indexes:
            for _ in walk(index, outbox):
                self._go_on()
        number, self._number = self._number, self._number + 1
        outbox.put(op="end", number=number)
        outbox.flush()
        if not wait:
            return
        while wire.fields(self._word(Tag.DONE)).get("number") != number:
            pass  # of a pass in a freeze that was let go again
        seconds, work = time.monotonic() - self._begun, sum(index.work for index in self._indexes)
        if work >= _TELLING:
            self._pace = seconds / work

    # -- words -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._stopped:
            raise EngineError("the haul of files was stopped")

    def _go_on(self) -> None:
        """In the middle of what may take long."""
        self._check()
        if time.monotonic() > self._told + _LOOK:
            self._told = time.monotonic()
            self._alive()

    def _send(self, letter: bytes) -> None:
        self._check()
        self._send_letter(letter)
        self._sent += len(letter)
        self._alive()

    def _paced_send(self, letter: bytes) -> None:
        """No faster than the operator allows."""
        self._send(letter)
        self._paced += len(letter)
        while self._bandwidth and self._paced / self._bandwidth > time.monotonic() - self._begun:
            self._check()
            self._alive()
            time.sleep(min(_LOOK, max(0.001, self._begun + self._paced / self._bandwidth - time.monotonic())))

    def _word(self, wanted: Tag, patience: float | None = _PATIENCE) -> bytes:
        """The destination's next word."""
        asked = time.monotonic()
        while patience is None or time.monotonic() < asked + patience:
            self._check()
            self._alive()
            with contextlib.suppress(queue.Empty):
                tag, body = self._words.get(timeout=_LOOK)
                if tag is not wanted:
                    raise EngineError(f"the destination sent files' {tag.name} where it makes no sense")
                return body
        raise PhaulError("the destination does not say that files have come", advice="is its disk busy? try again")


def _forget(prefix: str) -> None:
    """Snapshots are in nobody's way: those that stay go in the end, by the journal."""
    with contextlib.suppress(OSError):
        btrfs.forget({"prefix": prefix})


def mapped(pids: Iterable[int]) -> set[int]:
    """Inodes of files that tasks have mapped shared and writable, or open for writing: nobody tells when memory is
    written to, and some kernels do not tell of asynchronous writing (proc_pid_maps(5))."""
    found: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
            for line in file:
                words = line.split(None, 5)
                if words[1][1:2] == b"w" and words[1][3:4] == b"s" and words[4] != b"0":
                    found |= {int(words[4]), _inode(pid, words[0])}
    return found


def _inode(pid: int, area: bytes) -> int:
    """Of the file that an area is of, by its name: of an overlay's, some kernels tell the inode of the layer."""
    begin, _, end = area.partition(b"-")
    try:
        return os.stat(f"/proc/{pid}/map_files/{int(begin, 16):x}-{int(end, 16):x}").st_ino
    except OSError:
        return 0

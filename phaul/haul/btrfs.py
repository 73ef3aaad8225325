"""The first round of a btrfs subvolume to a place on btrfs, by send and receive of read-only snapshots
(btrfs-send(8), btrfs-receive(8)).

The first snapshot goes whole; while that takes long, another one follows, of which only what has changed is sent. The
last is what the index notes as sent, and all rounds from then on are those that every tree has. Snapshots lie beside
the subvolume, as NAME.phaul-MIGRATION.NUMBER, and are removed when the round is over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from phaul_engine import calls
from phaul_engine.errors import EngineError

from phaul.errors import PhaulError

from . import rsync, wire
from .wire import Tag

PROGRAM = "btrfs"
KIND = "haul-snapshots"
"""Of a journal entry of the source."""
_MAGIC = 0x9123683E  # statfs(2), BTRFS_SUPER_MAGIC
_TOP = 256  # the inode of a subvolume's top
_READ = 1 << 18  # bytes
_ENDING = 5.0  # seconds
_LOOK = 200  # milliseconds between two looks whether to go on
_NAME = re.compile(r"(?!\.\.?$)[^/\0]{1,255}")


def can_take(place: str) -> bool:
    """Whether what this host has at, or above, a place takes subvolumes that are sent."""
    above = next(path for path in (Path(place), *Path(place).parents) if path.is_dir())
    return _is_btrfs(str(above)) and shutil.which(PROGRAM) is not None


def can_send(place: str) -> bool:
    """Whether a directory is a subvolume, with room for its snapshots beside it."""
    return is_subvolume(place) and can_take(os.path.dirname(place))


def is_subvolume(path: str) -> bool:
    """Whether a directory is the top of one."""
    return not os.path.islink(path) and os.path.isdir(path) and os.stat(path).st_ino == _TOP and _is_btrfs(path)


def _is_btrfs(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return calls.file_system(fd) == _MAGIC
    finally:
        os.close(fd)


# -- subvolumes ----------------------------------------------------------------------------------------------------


def snapshot(source: str, place: str, *, writable: bool) -> None:
    """A snapshot of a subvolume. PhaulError if there can be none."""
    _run("snapshot", *([] if writable else ["-r"]), source, place)


def remove(path: str) -> None:
    """Remove a directory with all that is in it, subvolumes too. OSError if something of it stays."""
    directories = [path] if is_subvolume(path) else [entry.path for entry in os.scandir(path)]
    for directory in filter(is_subvolume, directories):
        with contextlib.suppress(PhaulError):  # what is nested in it, or mounted, is told by what follows
            _run("delete", directory)
    if os.path.lexists(path):
        shutil.rmtree(path)


def _run(*words: str) -> None:
    done = subprocess.run(
        [PROGRAM, "subvolume", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise PhaulError(f"btrfs subvolume {' '.join(words)} failed: {done.stderr.strip()[:300]}")


# -- at the source -------------------------------------------------------------------------------------------------


def entry(root: str, migration: str) -> dict[str, Any]:
    """What the journal must hold before snapshots are made."""
    return {"kind": KIND, "data": {"prefix": prefix(root, migration)}}


def prefix(root: str, migration: str) -> str:
    """What the names of a migration's snapshots of a subvolume begin with; a number follows."""
    return f"{root}.phaul-{migration}."


def forget(data: dict[str, Any]) -> None:
    """Remove snapshots that are left. OSError if one stays."""
    directory, _, begin = str(data["prefix"]).rpartition("/")
    for name in os.listdir(directory):
        if name.startswith(begin) and name[len(begin) :].isdigit() and is_subvolume(f"{directory}/{name}"):
            _delete(f"{directory}/{name}")


def _delete(path: str) -> None:
    """A `btrfs send` of it that a dead agent has left may still be ending."""
    deadline = time.monotonic() + _ENDING
    while True:
        try:
            return _run("delete", path)
        except PhaulError as error:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, str(error), path) from error
            time.sleep(0.1)


def send(
    tree: int,
    copy: str,
    parent: str,
    letter: Callable[[bytes], None],
    word: Callable[..., bytes],
    go_on: Callable[[], None],
) -> None:
    """Send a snapshot, or what it has other than `parent`, which is there. `letter` sends a letter, `word` waits for
    one of a kind, `go_on` is called now and then; what they raise ends it. PhaulError where it fails."""
    letter(wire.letter(Tag.BTRFS, {"tree": tree, "name": os.path.basename(copy)}))
    with tempfile.TemporaryFile() as complaints:
        words = [PROGRAM, "send", "-q", *(["-p", parent] if parent else []), copy]
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True
        )
        try:
            _carry(process, letter, go_on)
            if process.wait():
                raise PhaulError(f"btrfs send of {copy} failed: {_said(complaints)}")
        finally:
            rsync.end(process)
    letter(wire.letter(Tag.STREAM))
    word(Tag.STREAM, patience=None)


def _carry(process: subprocess.Popen[bytes], letter: Callable[[bytes], None], go_on: Callable[[], None]) -> None:
    pipe: Any = process.stdout
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    with pipe:
        while True:
            if not poll.poll(_LOOK):
                go_on()
                continue
            body = os.read(pipe.fileno(), _READ)
            if not body:
                return
            letter(wire.letter(Tag.STREAM, body))


def _said(complaints: IO[bytes]) -> str:
    with contextlib.suppress(ValueError):  # closed: nobody wants to know any more
        complaints.seek(0)
        return complaints.read().decode(errors="replace").strip()[:300]
    return ""


# -- at the destination --------------------------------------------------------------------------------------------


class Inbox:
    """Where snapshots of one tree are received, one after the other; what they become is `place`, which is an empty
    directory until then. It is on the same file system, as `inbox_name` says."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._inbox = inbox_name(place)
        self._last = ""

    def receive(self, name: str, reply: Callable[[bytes], None]) -> Receiver:
        """Take a snapshot in."""
        if not _NAME.fullmatch(name):
            raise EngineError(f"{name!r} is no name of a snapshot")
        os.makedirs(self._inbox, mode=0o700, exist_ok=True)
        self._last = name
        return Receiver(self._inbox, reply)

    def settle(self) -> None:
        """All have come: the last one becomes the tree. PhaulError or OSError if that fails."""
        os.rmdir(self._place)
        snapshot(f"{self._inbox}/{self._last}", self._place, writable=True)
        remove(self._inbox)


def inbox_name(place: str) -> str:
    """Where snapshots for a place are received."""
    return f"{place}.received"


class Receiver:
    """A `btrfs receive` that takes one snapshot. `reply` tells the source that it is there."""

    def __init__(self, inbox: str, reply: Callable[[bytes], None]) -> None:
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 closed with the rest
        self._reply = reply
        self._process = subprocess.Popen(  # in a root of its own: names in a stream lead nowhere else
            [PROGRAM, "receive", "-q", "-C", inbox],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._complaints,
            start_new_session=True,
        )

    def take(self, body: bytes | memoryview) -> None:
        """What the source's `btrfs send` says; empty at its end. EngineError where it cannot be taken."""
        pipe: Any = self._process.stdin
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has failed: why comes with the end
            if body:
                pipe.write(body)
                pipe.flush()
                return
        with contextlib.suppress(BrokenPipeError, ValueError):
            pipe.close()
        if self._process.wait():
            raise EngineError(f"btrfs receive failed: {_said(self._complaints)}")
        self._reply(wire.letter(Tag.STREAM))

    def close(self) -> None:
        """End it."""
        rsync.end(self._process)
        pipe: Any = self._process.stdin
        with contextlib.suppress(OSError, ValueError):
            pipe.close()
        self._complaints.close()

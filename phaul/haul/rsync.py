"""The first round, by rsync(1) where both hosts have it: it knows best how to copy much.

The source's rsync takes a "remote shell" that hands its stream to us, and says with which words it wants the other one
started. The destination starts its own, for the directory that it has made, if these words are ones it knows. Between
the two lies the agents' own connection.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from typing import Any

from phaul_engine.errors import EngineError

from phaul.errors import PhaulError

from . import bridge, wire
from .wire import Tag

PROGRAM = "rsync"
_READ = 1 << 18  # bytes
_OPTIONS = ("-aHAXSx", "--numeric-ids", "--delete", "--whole-file")
_SERVER = re.compile(r"rsync --server (?P<options>(?:-[A-Za-z0-9.=-]+ )+)\. \S+")
_KNOWN = re.compile(
    r"-[A-Za-z]*(?:e\d*\.?[A-Za-z]*)?|--(?:delete(?:-during|-before|-delay)?|numeric-ids|bwlimit=\d+|no-r|dirs)"
)
_VANISHED = 24  # rsync's status where files went away while it looked: they are no longer there to be sent
_PARTIAL = 23  # where there was an error with some
_GONE = re.compile(
    r"rsync: .*\(2\)$|(file|directory) has vanished: |IO error encountered -- skipping"
    r"|rsync (error|warning): some files|$"
)
_LOOK = 0.2  # seconds between two looks whether it has ended


class Sent(enum.Enum):
    """What a round of rsync's has come to."""

    WHOLE = enum.auto()
    LESS = enum.auto()  # without files that went away while it looked
    AGAIN = enum.auto()  # that made it leave things undone which it can do


def here() -> bool:
    """Whether this host has it."""
    return shutil.which(PROGRAM) is not None


# -- at the source -----------------------------------------------------------------------------------------------


def send(
    tree: int,
    root: str,
    letter: Callable[[bytes], None],
    word: Callable[..., bytes],
    without: Iterable[str] = (),
    bandwidth: int = 0,
    *,
    compared: bool = False,
) -> Sent:
    """Send a directory, but not what is in `without`. `letter` sends one, `word` waits for one of a kind; what they
    raise ends it. `compared`: files that are there already are compared by content, else by size and time.
    PhaulError where rsync fails."""
    ours, theirs = socket.socketpair()
    heard, said = os.pipe()
    with ours, tempfile.TemporaryFile() as complaints, tempfile.TemporaryFile() as excluded:
        excluded.write(b"".join(map(_pattern, without)))
        excluded.flush()
        try:
            shell = " ".join(f"'{word}'" for word in (sys.executable, "-IS", bridge.__file__, theirs.fileno(), said))
            limit = [f"--bwlimit={max(1, bandwidth >> 10)}"] if bandwidth else []
            command = [
                PROGRAM,
                *_OPTIONS,
                *(["--checksum"] if compared else []),
                *limit,
                "-0",
                f"--exclude-from=/proc/self/fd/{excluded.fileno()}",
                "-e",
                shell,
                f"{root}/",
                "there:tree",
            ]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
                pass_fds=(theirs.fileno(), said, excluded.fileno()),
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(said)
        try:
            with os.fdopen(heard, "rb") as words:
                letter(
                    wire.letter(Tag.RSYNC, {"tree": tree, "words": words.readline().decode(errors="replace").strip()})
                )
            _exchange(process, ours, letter, word)
            status = process.wait()
        finally:
            end(process)
        complaints.seek(0)
        text = complaints.read().decode(errors="replace").strip()
        if (sent := outcome(status, text)) is None:
            raise PhaulError(f"rsync of {root} failed with status {status}: {text[:300]}")  # the rest may come of it
        return sent


def outcome(status: int, text: str) -> Sent | None:
    """What a status of rsync means, with what it has said; None for a failure. In the moment between a look at a file
    and one at its access control list, what goes away is an error to it, and no file that vanished."""
    if status == 0:
        return Sent.WHOLE
    if status == _VANISHED:
        return Sent.LESS
    gone = status == _PARTIAL and all(_GONE.match(line) for line in text.splitlines())
    return Sent.AGAIN if gone else None


def _pattern(path: str) -> bytes:
    """One file as rsync's FILTER RULES have it, where a backslash means something only beside wildcards."""
    text = os.fsencode(path)
    return b"/" + (re.sub(rb"([][*?\\])", rb"\\\1", text) if re.search(rb"[][*?]", text) else text) + b"\0"


def _exchange(
    process: subprocess.Popen[bytes], stream: socket.socket, letter: Callable[[bytes], None], word: Callable[..., bytes]
) -> None:
    """Carry what rsync says there, and what is said back to it, until it has ended."""
    problems: list[BaseException] = []

    def back() -> None:
        try:
            while body := word(Tag.STREAM, patience=None):
                stream.sendall(body)
        except BrokenPipeError:  # it has ended meanwhile
            return
        except Exception as error:  # goes on in the caller
            problems.append(error)
            end(process)
        finally:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=back, name="phaul-rsync")
    thread.start()
    poll = select.poll()  # select(2) takes no high numbers
    poll.register(stream, select.POLLIN)
    try:
        while True:
            ready = poll.poll(_LOOK * 1000)
            body = stream.recv(_READ) if ready else b""
            if body:
                letter(wire.letter(Tag.STREAM, body))
            elif ready or process.poll() is not None:
                break
        letter(wire.letter(Tag.STREAM))
    except BaseException:
        end(process)
        raise
    finally:
        thread.join()
    if problems:
        raise problems[0]


def end(process: subprocess.Popen[bytes]) -> None:
    """A process, and what it has started in its session, are gone afterwards."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# -- at the destination ------------------------------------------------------------------------------------------


class Server:
    """An rsync that takes what comes for one directory. `reply` sends a letter back, from a thread."""

    def __init__(self, words: str, place: str, reply: Callable[[bytes], None]) -> None:
        self._process = subprocess.Popen(
            server_command(words, place),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._reply = reply
        self._thread = threading.Thread(target=self._answer, name="phaul-rsync")
        self._thread.start()

    def take(self, body: bytes | memoryview) -> None:
        """What the source's rsync says; empty at its end."""
        pipe: Any = self._process.stdin
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has failed: the other one says why
            if body:
                pipe.write(body)
                pipe.flush()
            else:
                pipe.close()
                self._thread.join()

    def _answer(self) -> None:
        pipe: Any = self._process.stdout
        with contextlib.suppress(EngineError, OSError):
            while body := pipe.read1(_READ):
                self._reply(wire.letter(Tag.STREAM, body))
            self._reply(wire.letter(Tag.STREAM))

    def close(self) -> None:
        """End it."""
        end(self._process)
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def server_command(words: str, place: str) -> list[str]:
    """How rsync is started for what another one wants, which has no say in where; EngineError for what is not known."""
    match = _SERVER.fullmatch(words)
    options = match["options"].split() if match else []
    if not options or not all(_KNOWN.fullmatch(one) for one in options):
        raise EngineError(f"the source wants an rsync with words that are not known here: {words[:200]!r}")
    return [PROGRAM, "--server", *options, ".", f"{place}/"]

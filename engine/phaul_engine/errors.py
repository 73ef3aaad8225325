"""The engine's errors. Each says what happened and, where there is something, what to do about it."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass


class EngineError(Exception):
    """Something the engine tried did not work.

    `advice` says what an operator can do next; it is empty when there is nothing to say.
    """

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class TargetError(EngineError):
    """A process could not be seized, read or driven. `errno` is the kernel's reason, 0 if it gave none."""

    errno: int = 0


class GoneError(TargetError):
    """The process or thread is not there any more."""


class ImageError(EngineError):
    """An image is missing, truncated, malformed or says something impossible."""


class RebuildError(EngineError):
    """An object could not be made again on this host."""


IMPOSSIBLE = (OSError, OverflowError, ValueError, struct.error)
"""What making something from an image may raise: the kernel refuses it, or its values fit into no structure."""


def cannot_make(what: str, error: Exception) -> RebuildError:
    """The error that one of `IMPOSSIBLE` means for an object, in words."""
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return RebuildError(f"{what} cannot be made again here: {reason}")


@dataclass(frozen=True)
class Blocker:
    """One reason why a tree cannot be moved, found before anything is touched.

    `where` names process and descriptor, address or state ("fd 7 of pid 812 (redis-server)"), `kind` what
    stands there ("io_uring instance"), `why` the reason, `advice` what to do about it. What is `passing` is a moment in
    the life of the program, gone at another try: a connection that it has not accepted yet.
    """

    where: str
    kind: str
    why: str
    advice: str = ""
    passing: bool = False

    def __str__(self) -> str:
        text = f"{self.where} is {self.kind}: {self.why}"
        return f"{text}; {self.advice}" if self.advice else text


class BlockedError(EngineError):
    """The tree has state that cannot be carried; `blockers` names all of it."""

    def __init__(self, blockers: list[Blocker]) -> None:
        super().__init__("\n".join(str(blocker) for blocker in blockers))
        self.blockers = blockers


class BusyError(TargetError):
    """All that stands in the way of moving the tree now passes by itself."""


def refusal(blockers: list[Blocker]) -> EngineError:
    """What to raise for blockers found in the freeze: `BusyError` if another try is worth it."""
    if all(blocker.passing for blocker in blockers):
        return BusyError("\n".join(str(blocker) for blocker in blockers))
    return BlockedError(blockers)

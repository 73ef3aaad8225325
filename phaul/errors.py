"""phaul's errors and the exit statuses they end the command with.

An error says what happened (its text), where the program runs now (`where`) and what to do next (`advice`).
"""

from __future__ import annotations

import enum
import sys
from typing import ClassVar, Literal, TypeAlias

Outcome: TypeAlias = Literal["migrated", "refused", "stayed", "cancelled", "in-doubt", "lost", "error"]


class Exit(enum.IntEnum):
    """Exit statuses of `phaul`; part of the command line's contract."""

    OK = 0
    ERROR = 1
    USAGE = 2
    CONNECT = 10
    AUTHENTICATION = 11
    VERSIONS = 12
    REFUSED = 20
    STAYED = 30
    IN_DOUBT = 40
    LOST = 50
    CANCELLED = 130


class PhaulError(Exception):
    """Something that ends a command.

    `where` says where the program runs now, where there is a program; `advice` what an operator can do next.
    """

    exit_status: ClassVar[Exit] = Exit.ERROR
    outcome: ClassVar[Outcome] = "error"

    def __init__(self, message: str, *, where: str = "", advice: str = "") -> None:
        super().__init__(message)
        self.where = where
        self.advice = advice


class UsageError(PhaulError):
    """The command line or the settings do not make sense."""

    exit_status = Exit.USAGE


class ConnectError(PhaulError):
    """The other host was not reached, or the connection to it broke."""

    exit_status = Exit.CONNECT


class AuthenticationError(PhaulError):
    """The other host is not the one we know, does not let us in, or does not let us be root."""

    exit_status = Exit.AUTHENTICATION


class VersionError(PhaulError):
    """phaul is not there on the other host, or is one that this one cannot talk to."""

    exit_status = Exit.VERSIONS


class RefusedError(PhaulError):
    """The program cannot be moved there as it is; nothing was touched."""

    exit_status = Exit.REFUSED
    outcome: ClassVar[Outcome] = "refused"

    def __init__(self, message: str, *, where: str = "", advice: str = "") -> None:
        super().__init__(message, where=where or "it runs on the source, untouched", advice=advice)


class StayedError(PhaulError):
    """The migration failed before the commit point; the program goes on at the source."""

    exit_status = Exit.STAYED
    outcome: ClassVar[Outcome] = "stayed"

    def __init__(self, message: str, *, where: str = "", advice: str = "") -> None:
        super().__init__(message, where=where or "it runs on the source", advice=advice or "try again")


def of_status(status: int) -> type[PhaulError]:
    """The error that another process of ours ended a request with."""
    return {int(kind.exit_status): kind for kind in (UsageError, RefusedError, StayedError)}.get(status, PhaulError)


class CancelledError(StayedError):
    """The operator called it off before the commit point; the program goes on at the source."""

    exit_status = Exit.CANCELLED
    outcome: ClassVar[Outcome] = "cancelled"


class InDoubtError(PhaulError):
    """Past the commit point the destination does not say which copy goes on; the one at the source is held."""

    exit_status = Exit.IN_DOUBT
    outcome: ClassVar[Outcome] = "in-doubt"

    def __init__(self, message: str, *, migration: str, where: str = "", advice: str = "") -> None:
        super().__init__(
            message,
            where=where or "it is frozen on the source; it may be running on the destination",
            advice=advice
            or f"when the destination can be reached again: phaul resolve {migration}. If it never will be: look "
            f"whether the program ran there, then phaul resolve {migration} --keep source or --keep destination",
        )
        self.migration = migration


class LostError(PhaulError):
    """The destination took the program over and went down with it."""

    exit_status = Exit.LOST
    outcome: ClassVar[Outcome] = "lost"

    def __init__(self, message: str, *, migration: str, where: str = "", advice: str = "") -> None:
        super().__init__(
            message,
            where=where or "it runs nowhere; a copy from the moment of the move is frozen on the source",
            advice=advice
            or f"phaul resolve {migration} --keep source lets that copy run, without what it did since the move",
        )
        self.migration = migration


class JournalError(PhaulError):
    """A migration's journal could not be made, read or written, or says something impossible."""


class ArbiterError(PhaulError):
    """The arbiter does not answer, or not so that it could be understood: what it says is not known."""


class OverruledError(ArbiterError):
    """The arbiter has decided otherwise."""


class JournalBusyError(JournalError):
    """Another process holds the journal's lock and does not let go of it."""


class LostRaceError(JournalError):
    """A transition was refused because the row is not in the state that it starts from: someone else has decided.

    `state` is the state that the row is in.
    """

    def __init__(self, message: str, *, state: str) -> None:
        super().__init__(message)
        self.state = state


def report(error: PhaulError) -> None:
    """Say on stderr what happened, where the program runs now, and what to do next."""
    lines = [f"phaul: {error}", *(f"  {text}" for text in (error.where, error.advice) if text)]
    print("\n".join(lines), file=sys.stderr)

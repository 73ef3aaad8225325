"""vzctl(8) and cgget(1), cgset(1) of libcgroup: what is said to them, and what they say."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass

from phaul.errors import PhaulError
from phaul.workloads import commands

PATIENCE = 120.0  # seconds for a command: a file system may have to be mounted
_WORDS = 300  # characters of what a failed command has said
_STATUS = re.compile(
    r"^(?:VEID|CTID) (?P<ctid>\S+) (?P<exists>exist|deleted) (?P<mounted>mounted|unmounted) "
    r"(?P<state>running|down|suspended|paused)(?P<dump> suspended)?\s*$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Status:
    """What `vzctl status` says of a container."""

    ctid: str
    exists: bool
    mounted: bool
    state: str  # running, paused, suspended or down

    @property
    def running(self) -> bool:
        """Whether there are processes of it."""
        return self.state in ("running", "paused")


def run(*words: str) -> str:
    """What a command says. PhaulError, with that, if it fails."""
    return commands.run(words, PATIENCE)


def installed() -> bool:
    """Whether this host has OpenVZ's commands."""
    return shutil.which("vzctl") is not None


def status(name: str) -> Status:
    """Of the container of that id or name; PhaulError if vzctl does not tell."""
    said = run("vzctl", "status", name)
    match = _STATUS.search(said)
    if match is None:
        raise PhaulError(f"vzctl status {name} says what is not known: {said.strip()[:_WORDS]!r}")
    state = "suspended" if match["dump"] else match["state"]
    return Status(match["ctid"], match["exists"] == "exist", match["mounted"] == "mounted", state)

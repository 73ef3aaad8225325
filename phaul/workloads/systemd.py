"""systemd, the service manager of this host: what it says of a unit, and drop-ins that hold until they are taken away.

Everything goes through systemctl(1), which as root needs no bus, and through the socket of sd_notify(3).
"""

from __future__ import annotations

import array
import contextlib
import os
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from phaul.errors import PhaulError, UsageError

from . import commands

Properties: TypeAlias = dict[str, str]

BOOTED = "/run/systemd/system"
"""Is there where systemd is process 1: sd_booted(3)."""

_UNITS = Path(BOOTED)
_DROP_IN = "zzzz-phaul.conf"  # the last one of a unit: what it says holds
_NOTIFY = "/run/systemd/notify"
_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]{1,247}\.service")
_PATIENCE = 30.0  # seconds for a command
_SPANS = {
    **{"us": 1, "ms": 1000, "s": 10**6, "min": 60 * 10**6, "h": 3600 * 10**6},
    **{"d": 86400 * 10**6, "day": 86400 * 10**6, "w": 7 * 86400 * 10**6},
    **{"month": 2629800 * 10**6, "y": 31557600 * 10**6},
}
FOREVER = (1 << 64) - 1
"""A time span (microseconds) that never ends."""


def check_name(name: str) -> None:
    """UsageError for what is no name of a service."""
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise UsageError(f"{name!r} is no name of a service", advice="phaul migrate --unit NAME.service HOST")


def show(unit: str, *properties: str) -> Properties:
    """What systemd says of a unit. Several values of one property are lines."""
    found: dict[str, list[str]] = {name: [] for name in properties}
    for line in _systemctl("show", "--no-pager", "-p", ",".join(properties), "--", unit).splitlines():
        name, _, value = line.partition("=")
        if name in found:
            found[name].append(value)
    return {name: "\n".join(values) for name, values in found.items()}


def start(unit: str) -> None:
    """Begin to start a unit; this does not wait for it."""
    _systemctl("start", "--no-block", "--", unit)


def stop(unit: str) -> None:
    """Stop a unit, and wait until it is."""
    _systemctl("stop", "--", unit)


def forget_failure(unit: str) -> None:
    """A unit that failed is as one that was stopped."""
    with contextlib.suppress(PhaulError):  # it has not, or systemd has unloaded it
        _systemctl("reset-failed", "--", unit)


@dataclass(frozen=True)
class DropIn:
    """Settings of ours for a unit, which win over its own until they are taken away, or the host starts again."""

    unit: str

    @property
    def path(self) -> Path:
        """Its file."""
        return _UNITS / f"{self.unit}.d" / _DROP_IN

    def read(self) -> str:
        """What it says; empty if there is none."""
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return ""

    def put(self, text: str) -> None:
        """Have it hold."""
        self.path.parent.mkdir(mode=0o755, exist_ok=True)
        commands.replace(self.path, text, 0o644)
        reload()

    def take_away(self) -> None:
        """The unit's own settings hold again. Doing it twice does no harm."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there are others beside it, or it is gone
            self.path.parent.rmdir()
        if str(self.path) in show(self.unit, "DropInPaths")["DropInPaths"]:
            reload()


def reload() -> None:
    """Read all units again."""
    _systemctl("daemon-reload")


def notify(pid: int, *assignments: str) -> None:
    """Tell systemd something as a process of a unit would: sd_notify(3), unix(7) on SCM_CREDENTIALS."""
    who = struct.pack("iII", pid, os.getuid(), os.getgid())
    rights = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, array.array("B", who))]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            for assignment in assignments:
                sock.sendmsg([assignment.encode()], rights, 0, _NOTIFY)
        except OSError as error:
            raise PhaulError(f"systemd cannot be told {assignments[0]}: {_NOTIFY}: {error.strerror}") from error


def span(text: str) -> int:
    """Microseconds of a time span as systemctl prints it: `1min 30s`, `500ms`, `infinity` (systemd.time(7))."""
    if text == "infinity":
        return FOREVER
    parts = re.findall(r"([0-9.]+)([a-z]*)", text)
    return sum(int(float(number) * _SPANS.get(word, 1)) for number, word in parts)


def _systemctl(*words: str) -> str:
    return commands.run(("systemctl", *words), _PATIENCE, environment={"LC_ALL": "C", "SYSTEMD_COLORS": "0"})

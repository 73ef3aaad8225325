"""The programs by which packet filters are told and set: each knows the form that its rules are in.

They run in the namespace, and see the host's files.
"""

from __future__ import annotations

import shutil
import subprocess

from phaul_engine.errors import EngineError

from .netlink import Namespace

_TIMEOUT = 20.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find(*names: str) -> str | None:
    """The first of these programs that is installed."""
    return next((path for path in (shutil.which(name, path=_PATH) for name in names) if path), None)


def need(what: str, *names: str) -> str:
    """The same. `EngineError` if there is none; `what` is for whom."""
    found = find(*names)
    if found is None:
        raise EngineError(f"{what} need {names[0]}, which is not installed here", advice=f"install {names[0]}")
    return found


def run(namespace: Namespace, what: str, *command: str, given: bytes = b"") -> bytes:
    """Run a program in the namespace; what it writes. `EngineError` says what it has against it."""

    def go() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command, input=given, capture_output=True, check=False, timeout=_TIMEOUT, env={"PATH": _PATH, "LC_ALL": "C"}
        )

    try:
        done = namespace.inside(go)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{what}: {command[0]} does not answer") from error
    if done.returncode:
        told = (done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"])[0]
        raise EngineError(f"{what}: {command[0]} says: {told}")
    return done.stdout

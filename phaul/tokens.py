"""What proves that two hosts see the same storage: one reads there what the other has written there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Token(NamedTuple):
    """A file of ours, and what is in it."""

    path: str
    secret: str


@contextlib.contextmanager
def token(directory: str) -> Iterator[Token | None]:
    """A token in a directory, for as long as the destination is asked. None where none can be made: it counts as not
    shared."""
    made = Token(f"{directory}/.phaul-{secrets.token_hex(8)}", secrets.token_hex(16))
    try:
        fd = os.open(made.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield None
        return
    try:
        with os.fdopen(fd, "w") as out:
            out.write(made.secret)
            out.flush()
            os.fsync(fd)
        yield made
    finally:
        with contextlib.suppress(OSError):
            os.unlink(made.path)


def sees(path: str, secret: str, directory: str) -> bool:
    """Whether this host sees the token that the other one says it has made in a directory."""
    if not path or os.path.dirname(path) != directory:
        return False
    try:
        return Path(path).read_text() == secret
    except OSError:
        return False

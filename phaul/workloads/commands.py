"""Commands of a runtime, what is waited for when they were given, and the files that it keeps."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from phaul.errors import PhaulError
from phaul.haul.places import NOWHERE, Places

_PAUSE = 0.02
_WORDS = 300  # characters of what a failed command has said


def run(
    words: Sequence[str],
    patience: float,
    *,
    places: Places = NOWHERE,
    advice: str = "",
    environment: Mapping[str, str] | None = None,
) -> str:
    """What a command says, which sees trees as `places` has it. PhaulError, with what it said, if it fails or takes
    longer than `patience` seconds; with `advice` where it is not installed. `environment` is added to ours."""
    text = " ".join(words)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as error:  # what it leaves would hold pipes open
        try:
            done = subprocess.run(
                places.command(*words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=error,
                timeout=patience,
                env={**os.environ, **(environment or {})},
            )
        except FileNotFoundError as missing:
            raise PhaulError(f"{words[0]} is not installed here", advice=advice) from missing
        except subprocess.TimeoutExpired as late:
            raise PhaulError(f"{text} took longer than {patience:.0f} s") from late
        said = _content(output)
        if done.returncode:
            why = (_content(error) or said).strip()[-_WORDS:]
            raise PhaulError(f"{text} failed ({done.returncode}): {why}")
        return said


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


def read(path: Path, largest: int) -> bytes:
    """The content of a file. PhaulError if it cannot be read, or has more than `largest` bytes."""
    try:
        with open(path, "rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise PhaulError(f"{path}: {error.strerror}") from error
    if len(content) > largest:
        raise PhaulError(f"{path} is larger than {largest} bytes")
    return content


def draft_of(path: Path) -> Path:
    """Where `replace` writes what is to become a file; one may be left there."""
    return path.with_name(f".{path.name}.phaul")


def replace(path: Path, text: str, mode: int = 0o600) -> None:
    """Give a file another content, at once. OSError if that fails."""
    draft = draft_of(path)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with open(fd, "w") as file:
        file.write(text)
    os.rename(draft, path)

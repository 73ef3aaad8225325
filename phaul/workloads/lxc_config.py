"""The configuration of an LXC container (lxc.container.conf(5)), as pairs of keys and values in their order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from phaul.errors import PhaulError

from . import commands

Config: TypeAlias = list[tuple[str, str]]

_DEEPEST = 16  # of files that include others
LARGEST = 1 << 20  # bytes


def read(path: Path, depth: int = 0) -> Config:
    """What a file says, with what it includes. PhaulError if one of them cannot be read."""
    if depth > _DEEPEST:
        raise PhaulError(f"{path} is included too deeply")
    return parse(commands.read(path, LARGEST).decode(errors="surrogateescape"), depth)


def parse(text: str, depth: int = 0) -> Config:
    """What the text of a file says, with the files of this host that it includes."""
    found: Config = []
    for key, value in _lines(text):
        if key == "lxc.include":
            for one in _included(Path(value)):
                found += read(one, depth + 1)
        else:
            found.append((key, value))
    return found


def own(text: str) -> Config:
    """What the text of a file says itself."""
    return list(_lines(text))


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        key, value = key.strip(), value.strip().strip('"')
        if equals and not key.startswith("#"):
            yield key, value


def _included(path: Path) -> list[Path]:
    """A file, or the files of a directory whose names end in .conf. What is not there says nothing."""
    if not path.is_dir():
        return [path] if path.exists() else []
    return sorted(path / name for name in os.listdir(path) if name.endswith(".conf"))


def root(text: str) -> str | None:
    """The directory of a root file system; None if it is something else, which LXC mounts."""
    kind, colon, rest = text.partition(":")
    if text.startswith("/"):
        return None if text.startswith("/dev/") else text
    return rest if colon and kind == "dir" else None

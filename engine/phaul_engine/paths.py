"""Paths as texts."""

from __future__ import annotations

import os.path


def beneath(path: str, directory: str) -> bool:
    """Whether an absolute path names something in a directory, or below."""
    return os.path.normpath(path).startswith(os.path.normpath(directory).rstrip("/") + "/")

"""Keep the images of a tree that has moved: written from the frozen copy that it left behind, before that goes."""

from __future__ import annotations

import os
from pathlib import Path

from .departure import Departure
from .dump import complete
from .errors import ImageError
from .images.checkpoint import Checkpoint
from .images.directory import ImageDirectory
from .page_store import DirectoryStore


def make_directory(path: Path) -> None:
    """The directory for images, before anything depends on it. ImageError where it cannot be, or holds some."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = any(path.glob("*.img"))
        writable = os.access(path, os.W_OK)
    except OSError as error:
        raise ImageError(f"{path} cannot hold the images: {error.strerror}", advice="give another directory") from error
    if taken or not writable:
        why = "holds images already" if taken else "cannot be written to"
        raise ImageError(f"{path} {why}", advice="give another directory")


def keep_images(path: Path, departure: Departure, checkpoint: Checkpoint, begun: float) -> None:
    """Write what `phaul dump` would have written. `begun` is when the tree was stopped (CLOCK_MONOTONIC)."""
    with ImageDirectory(path) as directory:
        store = DirectoryStore(directory)
        for space in departure.memory():
            store.put(space.kind, space.ident, space.place, space.extents)
        store.finish()
        complete(checkpoint, begun, store.stored)
        checkpoint.save(directory)

"""What programs use that not every host has: known from the images, and tried here."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from .errors import RebuildError
from .images.checkpoint import Checkpoint
from .images.pb import vma_pb2
from .memory import guards
from .namespaces.net import needs
from .objects.address_space import MAP_DROPPABLE, MAP_TYPE, Status
from .syscalls import NR


class Feature(NamedTuple):
    """`used` tells by an area whether a program needs it, `here` whether this kernel has it."""

    since: str
    used: Callable[[vma_pb2.vma_entry], bool]
    here: Callable[[], bool]


@functools.cache
def _droppable() -> bool:
    try:
        mmap.mmap(-1, mmap.PAGESIZE, flags=MAP_DROPPABLE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True


@functools.cache
def _seals() -> bool:
    """EINVAL for flags that there are not, ENOSYS without the call."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(ctypes.c_long(NR.mseal), ctypes.c_long(0), ctypes.c_long(0), ctypes.c_long(1))
    return ctypes.get_errno() == errno.EINVAL


_FEATURES = {
    "guard pages (MADV_GUARD_INSTALL)": Feature(
        "Linux 6.13", lambda vma: bool(vma.status & Status.GUARD), guards.installable
    ),
    "droppable memory (MAP_DROPPABLE)": Feature(
        "Linux 6.11", lambda vma: vma.flags & MAP_TYPE == MAP_DROPPABLE, _droppable
    ),
    "sealed areas (mseal)": Feature("Linux 6.10", lambda vma: vma.phaul_sealed, _seals),
}


def needed(checkpoint: Checkpoint, options: Mapping[str, object] | None = None) -> dict[str, str]:
    """The features that a tree uses, each with a process or device that does."""
    found = needs.needed(checkpoint, options or {})
    for pid in checkpoint.idents("mm"):
        vmas = checkpoint.one("mm", pid).vmas
        for name, feature in _FEATURES.items():
            if name not in found and any(map(feature.used, vmas)):
                found[name] = f"pid {pid}"
    return found


def missing(names: Iterable[str]) -> dict[str, str]:
    """Those that this host lacks, with what to do about it. A name that nobody here knows is lacking too."""
    lacking = {}
    for name in names:
        feature, advice = _FEATURES.get(name), needs.advice(name)
        if advice or (advice is None and (feature is None or not feature.here())):
            lacking[name] = advice or f"move it to {feature.since if feature else 'a newer phaul'} or newer"
    return lacking


def demand(checkpoint: Checkpoint) -> None:
    """RebuildError if this kernel lacks what the tree uses."""
    used = {name: who for name, who in needed(checkpoint).items() if name in _FEATURES}
    for name, advice in missing(used).items():
        raise RebuildError(f"{used[name]} uses {name}, which this host lacks", advice=advice)

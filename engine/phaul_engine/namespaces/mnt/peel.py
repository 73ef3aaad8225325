"""Mounts taken out from below others, in a copy of their namespace.

It runs in a thread or process of its own, which is in the namespace and gives itself a copy: nobody else notices.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from phaul_engine.namespaces.inside import Descriptor

from . import api


def peel(points: Sequence[str], wanted: Collection[int]) -> dict[int, int]:
    """Clones, attached nowhere, of the mounts with indices `wanted`. `points` are those of all mounts, each before what
    hides it: the last is on top, and when it is gone, the one before."""
    api.own_namespace()
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        api.set_propagation(root, api.MS_PRIVATE, recursive=True)
    finally:
        os.close(root)
    found: dict[int, int] = {}
    for index in range(len(points) - 1, -1, -1):
        if index in wanted:
            found[index] = api.clone(points[index])
        if len(found) == len(wanted):
            break
        api.detach(points[index])
    return found


def peel_inside(points: list[str], wanted: list[int]) -> list[Descriptor]:
    """The same, for a process that was sent there; in the order of `wanted`."""
    found = peel(points, wanted)
    return [Descriptor(found[index]) for index in wanted]

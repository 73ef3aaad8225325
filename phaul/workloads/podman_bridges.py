"""Bridges of podman's networks, until a container's own devices are ports of them at the destination.

Netavark removes a bridge, whenever a container ends, that has no port: that of another container may be the last one
while the one that comes is not plugged in yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from phaul_engine.namespaces.net import placeholder

from . import podman_networks
from .base import Note

_KEPT = "kept"


def keep(bridges: Iterable[str], note: Note, notes: dict[str, Any]) -> None:
    """Have them stay, and note first how. EngineError if one is gone."""
    wanted = set(bridges)
    if not wanted or podman_networks.backend() != podman_networks.NETAVARK:
        return
    notes[_KEPT] = {placeholder.make_name(): bridge for bridge in wanted}
    note(notes)
    for device, bridge in notes[_KEPT].items():
        placeholder.occupy(device, bridge)


def leave(notes: dict[str, Any]) -> None:
    """Undo it. OSError if that fails."""
    for device in notes.get(_KEPT) or ():
        placeholder.vacate(str(device))

"""Dropping the packets of connections that stand in images, until they are made again here.

Where a stored connection is nowhere, the kernel would answer its peer's next segment with RST, and the connection were
over. So `lock` attaches the program of a hold without a TAP: what it finds in its table it drops, and the peers repeat
it. It stays when the process ends. Its undo stands in the images; `network.undo` takes it away when they are restored.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from typing import Any

from phaul_engine.errors import EngineError, ImageError
from phaul_engine.images.checkpoint import Checkpoint

from . import bpf, hold, ingress, interfaces
from .hold import Match, Stage


def plan() -> dict[str, Any]:
    """The undo of a lock that is not there yet, in the engine's network namespace. Raises `OSError`."""
    return hold.undo_entry(secrets.token_hex(6))


def lock(entry: dict[str, Any], matches: Iterable[Match]) -> None:
    """Drop these packets from now on, under the name that `plan` gave. If it fails there may be something to undo."""
    table, switch = hold.maps()
    try:
        for match in matches:
            table[match.key()] = hold.STEAL
        switch[hold.SWITCH] = int(Stage.ALL).to_bytes(4, "little")
        program = bpf.load(hold.steal_program(table.fd, switch.fd, None), "phaul_lock")
        try:
            for interface in interfaces.ethernet_interfaces():
                ingress.attach(ingress.choose(), program, interface.index, hold.attached_name(entry["data"]["id"]))
        finally:
            os.close(program)
    except OSError as error:
        raise EngineError(f"packets of connections cannot be dropped here: {error.strerror}") from error
    finally:
        table.close()
        switch.close()


def note(entry: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Write into the images how to lift the lock."""
    inventory = checkpoint.one("inventory")
    inventory.phaul_lock, inventory.phaul_lock_boot = json.dumps(entry), boot_id()


def lift(checkpoint: Checkpoint) -> None:
    """Lift the lock that images tell of; one of another host, or of before a reboot, is not here."""
    inventory = checkpoint.one("inventory")
    if inventory.phaul_lock and inventory.phaul_lock_boot == boot_id():
        hold.undo(_read(inventory.phaul_lock)["data"])


def boot_id() -> str:
    """What tells this run of this host from all others (random(4))."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _read(text: str) -> dict[str, Any]:
    """An entry from images, which come from anywhere. `ImageError` if it is none of ours."""
    try:
        data = json.loads(text)["data"]
        identity, bare = str(data["id"]), [int(one) for one in data["bare"]]
        int(identity, 16)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ImageError("the images tell of a network lock in a way that makes no sense") from error
    return {"kind": "hold", "data": {"id": identity, "netns": "", "bare": bare}}

"""What the operator wants of the source; and the arbiter's register, which the source makes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from phaul_engine.memory.source import Codec

from phaul import config, events
from phaul.errors import ArbiterError
from phaul.events import Event
from phaul.source.rounds import Wanted


@dataclass(frozen=True)
class Orders:
    """What the operator wants of the source. `moved` are ADDR/PREFIX@DEV, as the destination has them; `options` are
    the engine's (`tcp`, ...), `workload` and `facts` say what runtime knows the program, and how. `peer` is the
    destination in the operator's words, `keep_images` a directory or empty. `hauled` are directories that go along, the
    first round by `rsync` if the destination has it; those in `rooms` the runtime here looks after. Those in
    `subvolumes` go by btrfs; `flagged`: with file attributes, which the destination knows."""

    root: int
    wanted: Wanted
    codec: Codec = Codec.AUTO
    level: int = 1
    verify: bool = False
    keep_images: str = ""
    peer: str = ""
    stop_copy: bool = False
    moved: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    workload: str = "pid"
    facts: dict[str, Any] = field(default_factory=dict)
    hauled: tuple[str, ...] = ()
    rooms: tuple[str, ...] = ()
    rsync: bool = False
    subvolumes: tuple[str, ...] = ()
    flagged: bool = False

    @property
    def program(self) -> str:
        """The program in words."""
        with open(f"/proc/{self.root}/comm") as comm:
            return f"pid {self.root} ({comm.read().strip()})"


def open_register(migration: str, report: Callable[[Event], None]) -> dict[str, Any]:
    """The arbiter's register of this migration, where there is an arbiter: how it is reached, for the row."""
    from phaul.arbiter import Arbiter

    settings = config.load().arbiter
    if not settings.endpoints:
        return {}
    try:
        with contextlib.closing(Arbiter(settings, migration)) as register:
            register.open()
    except ArbiterError as error:
        if settings.required:
            raise
        report(events.Notice("warning", f"{error}; going on without", "[arbiter] in phaul.toml"))
        return {}
    return settings.model_dump(mode="json")

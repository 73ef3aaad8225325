"""What the network hears of the copy: nothing before WAKE; then its addresses, and the packets that came meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phaul_engine.namespaces.net import kind as net_namespace
from phaul_engine.network import replay
from phaul_engine.network.address import Address
from phaul_engine.network.announce import Announcer
from phaul_engine.network.replay import Injector
from phaul_engine.objects.base import Restoration


class Network:
    """That of one migration."""

    def __init__(self, migration: str) -> None:
        self._migration = migration
        self._addresses: list[Address] = []
        self._announcers: list[Announcer] = []
        self._injector: Injector | None = None
        self._frames: list[bytes] = []
        self._awake = False

    def prepare(self, moved: Sequence[str]) -> list[dict[str, Any]]:
        """For addresses that go along, ADDRESS/PREFIX@DEVICE. Returned is what the journal must hold of it."""
        if not moved:
            return []
        self._addresses = [Address.prepare(text) for text in moved]
        by_device: dict[str, list[str]] = {}
        for one in self._addresses:
            by_device.setdefault(one.interface, []).append(one.address)
        self._announcers = [Announcer.prepare(device, addresses) for device, addresses in by_device.items()]
        self._injector = Injector.prepare(self._migration, self._addresses[0].interface)
        return [*(one.undo_add() for one in self._addresses), self._injector.entry()]

    def prepare_own(self, restoration: Restoration) -> list[dict[str, Any]]:
        """Of a tree with a network namespace: where held packets come in, and what is plugged in the end. Returned is
        what the journal must hold of it."""
        entries = net_namespace.plug_entries(restoration)
        heard = net_namespace.heard_at(restoration)
        if heard is not None and self._injector is None:
            self._injector = Injector.prepare(self._migration, *heard)
            entries.append(self._injector.entry())
        return entries

    def take(self, body: bytes) -> None:
        """Packets for the copy, which gets them when it has been woken."""
        frames = list(replay.unpack(body))
        if self._awake and self._injector is not None:
            self._injector.inject(frames)
        else:
            self._frames += frames

    def be_heard(self) -> None:
        """The addresses are here from now on."""
        for address in self._addresses:
            address.add()
        for announcer in self._announcers:
            announcer.send()

    def replay(self) -> None:
        """The sockets answer: what has come for them meanwhile, comes now."""
        self._awake = True
        if self._injector is not None:
            self._injector.inject(self._frames)
        self._frames.clear()

    def forget(self) -> None:
        """The copy is killed: nobody hears what comes for it."""
        if self._injector is not None:
            self._injector.close()
            self._injector = None

    def close(self) -> None:
        """Close what is open; what has been done stays."""
        for address in self._addresses:
            address.close()
        for announcer in self._announcers:
            announcer.close()
        self.forget()

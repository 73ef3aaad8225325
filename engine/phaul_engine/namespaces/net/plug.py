"""The moment in which a namespace begins to speak: the outer ends of its veth pairs become ports of their bridges, and
its addresses are announced.

Everything is laid out before the freeze. What is to be done stands in the journal too (`entries`), so that whoever
finds the tree after the commit, and its agent dead, can do it (`redo`).
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from phaul_engine.errors import RebuildError
from phaul_engine.network.announce import Announcer

from . import addresses, bridge, link
from .device import Making, Outer
from .netlink import Namespace, attribute
from .state import State

KIND = "plug"
_SELF = "/proc/self/ns/net"


@dataclass
class Plug:
    """One pair: its outer end, the bridge, and the request that makes that one its port, empty if there is none; who is
    told of which addresses."""

    inner: str
    outer: Outer
    index: int
    request: bytes
    told: list[str]
    announcer: Announcer | None

    def close(self) -> None:
        """Close the socket."""
        if self.announcer is not None:
            self.announcer.close()

    def entry(self, netns: str) -> dict[str, Any]:
        """What the journal must hold for `redo`; `netns` is a path of the namespace."""
        data = {"inner": self.inner, "outer": self.outer.name, "bridge": self.outer.bridge}
        data |= {"port": self.outer.settings.hex()} if self.outer.settings else {}
        return {"kind": KIND, "data": {**data, "netns": netns, "addresses": self.told}}

    def do(self, home: Namespace) -> None:
        """Plug it, and say so. What is plugged into nothing stays so: the host decides."""
        if self.request:
            try:
                home.route.request(link.SETLINK, 0, self.request)
                if self.outer.settings:
                    bridge.set_port(home, self.index, self.outer.settings)
            except OSError as error:
                words = f"{self.outer.name} cannot be plugged into {self.outer.bridge}"
                raise RebuildError(f"{words}: {error.strerror}") from error
        if self.announcer is not None:
            with suppress(OSError):  # the device is down: nobody can hear it
                self.announcer.send()


def prepare(making: Making, state: State) -> list[Plug]:
    """For all pairs of a namespace whose outer ends were made."""
    told = addresses.announced(state.addresses)
    names = {device.ifindex: os.fsdecode(device.name) for device in state.devices}
    where = f"/proc/self/fd/{making.namespace.net}"
    return [
        _prepare(making.home, names[index], outer, told.get(index, []), where)
        for index, outer in making.plugs.items()
        if index in names
    ]


def _prepare(home: Namespace, inner: str, outer: Outer, told: list[str], netns: str) -> Plug:
    index, request = 0, b""
    if outer.bridge:
        port, master = link.read_link(home, name=outer.name), link.read_link(home, name=outer.bridge)
        if port is None or master is None:
            gone = outer.name if port is None else outer.bridge
            raise RebuildError(f"{gone}, which {inner} goes with, is not here any more")
        index = port.index
        request = link.head(index) + attribute(link.MASTER, master.index.to_bytes(4, "little"))
    announcer = None
    if told:
        with suppress(OSError, StopIteration):  # it is down
            announcer = Announcer.prepare(inner, told, netns)
    return Plug(inner, outer, index, request, told, announcer)


def redo(data: dict[str, Any]) -> None:
    """Make sure that a pair is plugged and announced."""
    net = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Namespace(net) as home:
            inner, name, master, netns = (str(data[key]) for key in ("inner", "outer", "bridge", "netns"))
            outer = Outer(name, master, bytes.fromhex(str(data.get("port", ""))))
            one = _prepare(home, inner, outer, list(data["addresses"]), netns)
            try:
                one.do(home)
            finally:
                one.close()
    finally:
        os.close(net)


def fall_silent(netns: str) -> None:
    """The tree goes on elsewhere: the devices of its frozen copy are down before they go. Nothing is said of that, if
    the namespace is mute already (`network.hold`)."""
    net = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Namespace(net) as namespace:
            for found in link.read_links(namespace).values():
                if not found.flags & link.LOOPBACK:
                    link.set_flags(namespace, found.index, 0, link.UP)
    finally:
        os.close(net)

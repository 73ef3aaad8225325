"""Pairs of virtual Ethernet devices (veth(4)).

Both ends may be in the tree, in one namespace or two; the pair is made when the namespaces of both are there. If one
end is outside, as a container's usually is, an outer end is made in the engine's own namespace, up but plugged into
nothing, so that what the inner one may say meanwhile is heard by nobody. It is plugged into its bridge when the tree
goes on.
"""

from __future__ import annotations

import os
import secrets
from typing import ClassVar

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import netdev_pb2

from . import link
from .device import DeviceKind, Making, Outer, Source, cannot, common, device_kind, info, request_new
from .link import Link
from .netlink import CREATE, EXCL, attribute

_PEER = 1  # VETH_INFO_PEER


@device_kind
class Veth(DeviceKind):
    """One end of a pair."""

    kind: ClassVar = "veth"
    type: ClassVar = netdev_pb2.VETH

    def collect(self, found: Link, entry: netdev_pb2.net_device_entry, source: Source) -> None:
        entry.peer_ifindex = found.lower
        if found.elsewhere is None:
            entry.peer_nsid = source.number
            return
        entry.ClearField("peer_nsid")
        source.outside[found.index] = found.elsewhere
        if source.at_home(found.elsewhere):
            describe_outer(found.lower, entry, source)
            if entry.outer_mtu == entry.mtu:
                entry.ClearField("outer_mtu")

    def create(self, entry: netdev_pb2.net_device_entry, making: Making) -> bool:
        if not entry.HasField("peer_nsid"):
            self._create_outside(entry, making)
            return True
        if entry.peer_nsid != making.number and entry.peer_nsid not in making.others:
            return False
        if link.read_link(making.namespace, index=entry.ifindex) is not None:
            return True  # made with its other end
        peer = link.head(entry.peer_ifindex)
        if entry.peer_nsid != making.number:
            peer += attribute(link.NET_NS_FD, making.others[entry.peer_nsid].net.to_bytes(4, "little"))
        request_new(making.namespace, entry, self.kind, attribute(_PEER, peer))
        return True

    def _create_outside(self, entry: netdev_pb2.net_device_entry, making: Making) -> None:
        outer = making.outer(self.kind, entry)
        said = (self.kind, os.fsdecode(entry.name)) in making.outers
        name, bridge = (outer.name, outer.bridge) if outer else ("", "")
        taken = bool(name) and link.read_link(making.home, name=name) is not None
        if taken and said:
            raise RebuildError(f"the name {name} for the outer end of {os.fsdecode(entry.name)} is taken here")
        if taken or not name:
            name = f"ph{secrets.token_hex(4)}"
        if bridge and link.read_link(making.home, name=bridge) is None:
            raise RebuildError(
                f"{os.fsdecode(entry.name)} is to be plugged into {bridge}, and there is no such bridge here",
                advice="say which (--external 'veth[INNER]:OUTER@BRIDGE')",
            )
        mtu = entry.outer_mtu or entry.mtu
        peer = link.head() + attribute(link.NAME, os.fsencode(name) + b"\0")
        peer += attribute(link.MTU, mtu.to_bytes(4, "little"))
        peer += attribute(link.NET_NS_FD, making.home.net.to_bytes(4, "little"))
        body = link.head(entry.ifindex) + common(entry) + info(self.kind, attribute(_PEER, peer))
        try:
            making.namespace.route.request(link.NEWLINK, CREATE | EXCL, body)
        except OSError as error:
            raise cannot(entry, self.kind, error) from error
        made = link.read_link(making.home, name=name)
        if made is not None:
            # nothing of the host's own is to be said or heard at it
            making.home.route.request(link.SETLINK, 0, link.head(made.index) + link.generate(link.GENERATE_NONE))
            link.set_flags(making.home, made.index, link.UP, link.UP)
        making.plugs[entry.ifindex] = Outer(name, bridge, making.ports.get(name, b""))


def describe_outer(index: int, entry: netdev_pb2.net_device_entry, source: Source) -> None:
    """Note name and bridge of a device of the engine's namespace that a device of the tree goes with."""
    outer = link.read_link(source.home, index=index)
    if outer is None:
        return
    entry.outer_name, entry.outer_mtu = os.fsencode(outer.name), outer.mtu
    bridge = link.read_link(source.home, index=outer.master) if outer.master else None
    if bridge is not None:
        entry.outer_bridge = os.fsencode(bridge.name)

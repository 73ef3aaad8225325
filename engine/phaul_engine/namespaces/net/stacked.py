"""Devices that stand on another one: macvlan, ipvlan, vlan. What they stand on may be outside of the namespace."""

from __future__ import annotations

import os
from typing import ClassVar

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import macvlan_pb2, netdev_pb2

from . import link
from .device import DeviceKind, Making, Source, device_kind, request_new
from .link import Link
from .netlink import attribute, attribute_list, attributes, pack
from .veth import describe_outer

_MODE, _FLAGS, _ADDRESS_MODE, _ADDRESSES = 1, 2, 3, 5  # IFLA_MACVLAN_*
_SOURCE_MODE, _SET_ADDRESSES = 16, 3  # MACVLAN_MODE_SOURCE, MACVLAN_MACADDR_SET


class Stacked(DeviceKind):
    """What they have in common."""

    def collect(self, found: Link, entry: netdev_pb2.net_device_entry, source: Source) -> None:
        entry.peer_ifindex = found.lower
        if found.elsewhere is None:
            entry.peer_nsid = source.number
            return
        entry.ClearField("peer_nsid")
        entry.lower_outside = True
        if source.at_home(found.elsewhere):
            describe_outer(found.lower, entry, source)
            entry.ClearField("outer_bridge")
            entry.ClearField("outer_mtu")

    def create(self, entry: netdev_pb2.net_device_entry, making: Making) -> bool:
        data = self.restored_data(entry)
        outer = making.outer(self.kind, entry) if not entry.HasField("peer_nsid") or entry.lower_outside else None
        if outer is None and entry.HasField("peer_nsid"):
            lower = attribute(link.LINK, entry.peer_ifindex.to_bytes(4, "little"))
            request_new(making.namespace, entry, self.kind, data, lower)
            return True
        name = os.fsdecode(entry.name)
        beneath = link.read_link(making.home, name=outer.name) if outer else None
        if beneath is None:
            raise RebuildError(
                f"network device {name} ({self.kind}) stands on {outer.name if outer else 'a device'} of the host, "
                "which is not here",
                advice=f"say on which it is to stand (--external '{self.kind}[{name}]:DEVICE')",
            )
        place = attribute(link.NET_NS_FD, making.namespace.net.to_bytes(4, "little"))
        lower = attribute(link.LINK, beneath.index.to_bytes(4, "little"))
        request_new(making.home, entry, self.kind, data, lower + place)
        return True


@device_kind
class Macvlan(Stacked):
    """macvlan."""

    kind: ClassVar = "macvlan"
    type: ClassVar = netdev_pb2.MACVLAN
    settable: ClassVar = frozenset({_MODE, _FLAGS, _ADDRESS_MODE, _ADDRESSES, 7, 9})

    def data(self, found: Link) -> bytes:
        data = super().data(found)
        mode = int.from_bytes(attributes(found.data).get(_MODE, b""), "little")
        kept = [one for one in attribute_list(data) if one.kind != _ADDRESSES or mode == _SOURCE_MODE]
        if mode == _SOURCE_MODE and any(one.kind == _ADDRESSES for one in kept):
            kept = [one for one in kept if one.kind != _ADDRESS_MODE]
            return attribute(_ADDRESS_MODE, _SET_ADDRESSES.to_bytes(4, "little")) + pack(kept)
        return pack(kept)

    def collect(self, found: Link, entry: netdev_pb2.net_device_entry, source: Source) -> None:
        super().collect(found, entry, source)
        told = attributes(found.data)
        mode, flags = (int.from_bytes(told.get(kind, b""), "little") for kind in (_MODE, _FLAGS))
        entry.macvlan.CopyFrom(macvlan_pb2.macvlan_link_entry(mode=mode, flags=flags))

    def restored_data(self, entry: netdev_pb2.net_device_entry) -> bytes:
        if entry.data:
            return super().restored_data(entry)
        data = attribute(_MODE, entry.macvlan.mode.to_bytes(4, "little"))
        if entry.macvlan.flags:
            data += attribute(_FLAGS, (entry.macvlan.flags & 0xFFFF).to_bytes(2, "little"))
        return data


@device_kind
class Ipvlan(Stacked):
    """ipvlan."""

    kind: ClassVar = "ipvlan"
    settable: ClassVar = frozenset({1, 2})


@device_kind
class Vlan(Stacked):
    """IEEE 802.1Q."""

    kind: ClassVar = "vlan"
    settable: ClassVar = frozenset(range(1, 6))

"""Bridges, what is set of their ports, their VLANs and the lasting entries of their forwarding tables (bridge(8))."""

from __future__ import annotations

import struct
from typing import ClassVar

from phaul_engine.images.pb import netdev_pb2

from . import link
from .device import DeviceKind, Making, device_kind, info
from .link import Link
from .netlink import CREATE, REPLACE, Attribute, Message, Namespace, attribute, attribute_list, attributes, pack

_FILTERING, _GROUP_ADDRESS, _FILTERED = 7, 20, b"\1"
_OPTIONS = 46  # IFLA_BR_MULTI_BOOLOPT: struct br_boolopt_multi, values and a mask
_USUAL_GROUP = bytes.fromhex("0180c2000000")
# IFLA_BR_* that can be set; 10 to 19 and 47, 48 tell of the state it is in, 21 is an order.
_SETTABLE = (set(range(1, 10)) | set(range(20, 50))) - {21, 26, 40, 47, 48}
_PORT = frozenset({2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 25, 27, 28, 29, 30, 31, 32, 33, 34, 37, 39, 40, 42, 43, 44})
_AF_BRIDGE = 7
_NEWNEIGH, _DELNEIGH, _GETNEIGH = 28, 29, 30
_MASTER_ENTRY, _SELF_ENTRY = 0x04, 0x02  # NTF_MASTER, NTF_SELF
_PERMANENT, _NOARP = 0x80, 0x40
_ENTRY = struct.Struct("=BxxxiHBB")  # struct ndmsg
_ENTRY_ATTRIBUTES = frozenset({1, 2, 5, 6, 7, 8, 9, 14})  # NDA_DST, LLADDR, VLAN, PORT, VNI, IFINDEX, MASTER, ...
_VLAN_INFO, _FILTER_VLANS = 2, 2  # IFLA_BRIDGE_VLAN_INFO, RTEXT_FILTER_BRVLAN
_BRIDGE_FLAGS, _FLAG_MASTER, _FLAG_SELF = 0, 1, 2


@device_kind
class Bridge(DeviceKind):
    """bridge."""

    kind: ClassVar = "bridge"
    type: ClassVar = netdev_pb2.BRIDGE
    settable: ClassVar = frozenset(_SETTABLE)

    def data(self, found: Link) -> bytes:
        kept = []
        for one in attribute_list(super().data(found)):
            if one.kind == _GROUP_ADDRESS and one.value == _USUAL_GROUP:
                continue
            if one.kind == _OPTIONS:  # which of them this kernel has is not to be asked of another
                values = one.value[:4]
                kept.append(Attribute(_OPTIONS, values + values))
            else:
                kept.append(one)
        return pack(kept)

    def create(self, entry: netdev_pb2.net_device_entry, making: Making) -> bool:
        without = entry.__class__()
        without.CopyFrom(entry)
        # The default VLAN of ports can be set only as long as it does not filter.
        without.data = pack(one for one in attribute_list(entry.data) if one.kind != _FILTERING)
        return super().create(without, making)

    def complete(self, entry: netdev_pb2.net_device_entry, making: Making) -> None:
        if attributes(entry.data).get(_FILTERING) == _FILTERED:
            data = info(self.kind, attribute(_FILTERING, _FILTERED))
            making.namespace.route.request(link.NEWLINK, 0, link.head(entry.ifindex) + data)


def port_data(found: Link) -> bytes:
    """What can be set of a port."""
    return pack(one for one in attribute_list(found.port) if one.kind in _PORT)


def set_port(namespace: Namespace, index: int, data: bytes) -> None:
    """Set it."""
    inner = attribute(link.INFO_SLAVE_KIND, b"bridge")
    inner += attribute(link.INFO_SLAVE_DATA, pack(one for one in attribute_list(data) if one.kind in _PORT))
    namespace.route.request(link.NEWLINK, 0, link.head(index) + attribute(link.LINK_INFO, inner))


def read_entries(namespace: Namespace) -> list[Message]:
    """The entries of forwarding tables that somebody made, in a form that makes them again. What a bridge learned it
    learns again; those of the ports' own addresses it makes itself."""
    links = link.read_links(namespace)
    found = []
    for message in namespace.route.dump(_GETNEIGH, _ENTRY.pack(_AF_BRIDGE, 0, 0, 0, 0)):
        _, index, state, flags, kind = _ENTRY.unpack_from(message.body)
        told = attributes(message.body[12:])
        device = links.get(index)
        own = device is not None and told.get(2) in {one.address for one in links.values()}
        remote = device is not None and device.kind == "vxlan" and flags & _SELF_ENTRY
        if own or not state & (_PERMANENT | _NOARP) or (flags & _SELF_ENTRY and not remote):
            continue
        kept = pack(one for one in attribute_list(message.body[12:]) if one.kind in _ENTRY_ATTRIBUTES - {9})
        flags = _SELF_ENTRY if remote else _MASTER_ENTRY
        found.append(Message(_NEWNEIGH, _ENTRY.pack(_AF_BRIDGE, index, state, flags, kind) + kept))
    return found


def apply_entries(namespace: Namespace, wanted: list[Message]) -> None:
    """Have these and no others."""
    there = read_entries(namespace)
    for message in there:
        if message not in wanted:
            namespace.route.request(_DELNEIGH, 0, message.body)
    for message in wanted:
        if message not in there:
            namespace.route.request(_NEWNEIGH, CREATE | REPLACE, message.body)


def read_vlans(namespace: Namespace) -> list[Message]:
    """The VLANs of bridges that filter, and of their ports, each device's as a request that adds them."""
    links = link.read_links(namespace)
    if not any(one.kind == "bridge" and attributes(one.data).get(_FILTERING) == _FILTERED for one in links.values()):
        return []
    found = []
    body = link.head(family=_AF_BRIDGE) + attribute(link.EXT_MASK, struct.pack("=I", _FILTER_VLANS))
    for message in namespace.route.dump(link.GETLINK, body):
        one = link.parse(message.body)
        spec = [inner for inner in attribute_list(one.found.get(link.AF_SPEC, b"")) if inner.kind == _VLAN_INFO]
        device = links.get(one.index)
        flags = _FLAG_SELF if device is not None and device.kind == "bridge" else _FLAG_MASTER
        inner = attribute(_BRIDGE_FLAGS, struct.pack("=H", flags)) + pack(spec)
        found.append(Message(link.SETLINK, link.head(one.index, family=_AF_BRIDGE) + attribute(link.AF_SPEC, inner)))
    return found


def apply_vlans(namespace: Namespace, wanted: list[Message]) -> None:
    """Have these and no others."""
    there = read_vlans(namespace)
    if there == wanted:
        return
    for message in there:
        if message not in wanted:
            _drop_vlans(namespace, message)
    for message in wanted:
        namespace.route.request(link.SETLINK, 0, message.body)


def _drop_vlans(namespace: Namespace, message: Message) -> None:
    namespace.route.request(link.DELLINK, 0, message.body)

"""Devices that are nothing but their attributes, and the loopback device, which is always there."""

from __future__ import annotations

import os
import struct
from typing import ClassVar

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import netdev_pb2, sit_pb2

from . import link
from .device import DeviceKind, Making, Source, device_kind, externals
from .link import Link
from .netlink import attribute, attribute_list, attributes, pack

_NEW_INDEX = 49  # IFLA_NEW_IFINDEX
_REMOTE_CHECKSUMS = (21, 22)  # IFLA_VXLAN_REMCSUM_TX and _RX: to be told that they are off is too much for it
_INHERIT_TTL = 28  # IFLA_VXLAN_TTL_INHERIT: told as a number, and set by being there


@device_kind
class Loopback(DeviceKind):
    """lo."""

    kind: ClassVar = "loopback"
    type: ClassVar = netdev_pb2.LOOPBACK

    def create(self, entry: netdev_pb2.net_device_entry, making: Making) -> bool:
        return True


@device_kind
class Physical(DeviceKind):
    """A device of the host that was put into the namespace; another one is put there if the user says which."""

    kind: ClassVar = "physical"
    type: ClassVar = netdev_pb2.EXTLINK

    def collect(self, found: Link, entry: netdev_pb2.net_device_entry, source: Source) -> None:
        if ("netdev", found.name) not in externals(source.collection.options):
            source.block(
                found.name,
                "a device of the host",
                "hardware does not move",
                f"say what is to stand for it there (--external 'netdev[{found.name}]:DEVICE')",
            )

    def create(self, entry: netdev_pb2.net_device_entry, making: Making) -> bool:
        name = os.fsdecode(entry.name)
        said = making.outers.get(("netdev", name))
        found = link.read_link(making.home, name=said.name) if said and said.name else None
        if found is None:
            raise RebuildError(
                f"no device of this host is named for {name}", advice=f"--external 'netdev[{name}]:DEVICE'"
            )
        body = link.head(found.index) + attribute(link.NAME, entry.name + b"\0")
        body += attribute(link.NET_NS_FD, making.namespace.net.to_bytes(4, "little"))
        body += attribute(_NEW_INDEX, entry.ifindex.to_bytes(4, "little"))
        link.set_flags(making.home, found.index, 0, link.UP)
        making.home.route.request(link.SETLINK, 0, body)
        return True


@device_kind
class Dummy(DeviceKind):
    """dummy."""

    kind: ClassVar = "dummy"


@device_kind
class Ifb(DeviceKind):
    """ifb."""

    kind: ClassVar = "ifb"


@device_kind
class Vrf(DeviceKind):
    """vrf; its table."""

    kind: ClassVar = "vrf"
    settable: ClassVar = frozenset({1})


@device_kind
class Vxlan(DeviceKind):
    """vxlan."""

    kind: ClassVar = "vxlan"
    settable: ClassVar = frozenset(range(1, 35))

    def data(self, found: Link) -> bytes:
        told = attribute_list(super().data(found))
        kept = [one for one in told if one.kind not in (_INHERIT_TTL, *_REMOTE_CHECKSUMS) or any(one.value)]
        return pack(one._replace(value=b"") if one.kind == _INHERIT_TTL else one for one in kept)


@device_kind
class Geneve(DeviceKind):
    """geneve."""

    kind: ClassVar = "geneve"
    settable: ClassVar = frozenset(range(1, 16))


class Tunnel(DeviceKind):
    """IP in IP and the like. Some kinds have a first device in every namespace, which is there already."""

    settable: ClassVar = frozenset(range(1, 32))

    def create(self, entry: netdev_pb2.net_device_entry, making: Making) -> bool:
        there = link.read_link(making.namespace, name=os.fsdecode(entry.name))
        if there is None or there.index == entry.ifindex:
            return there is not None or super().create(entry, making)
        raise RebuildError(f"network device {there.name} of this kernel stands where another has to ({there.index})")


def _tunnel(name: str) -> type[DeviceKind]:
    return device_kind(type(name, (Tunnel,), {"kind": name, "__doc__": f"{name}."}))


for _name in ("ipip", "gre", "gretap", "erspan", "vti", "ip6tnl", "ip6gre", "ip6gretap", "ip6erspan", "vti6"):
    _tunnel(_name)

# Field of CRIU's entry, and IFLA_IPTUN_* with its size; addresses are words.
_SIT_NUMBERS = {
    "link": (1, 4),
    "ttl": (4, 1),
    "tos": (5, 1),
    "flags": (8, 2),
    "proto": (9, 1),
    "pmtudisc": (10, 1),
    "rd_prefixlen": (13, 2),
    "relay_prefixlen": (14, 2),
    "encap_type": (15, 2),
    "encap_flags": (16, 2),
    "encap_sport": (17, 2),
    "encap_dport": (18, 2),
}
_SIT_PORTS = (17, 18)  # in network order
_SIT_ADDRESSES = {"local": 2, "remote": 3, "rd_prefix": 11, "relay_prefix": 12}


@device_kind
class Sit(Tunnel):
    """IPv6 in IPv4."""

    kind: ClassVar = "sit"
    type: ClassVar = netdev_pb2.SIT

    def collect(self, found: Link, entry: netdev_pb2.net_device_entry, source: Source) -> None:
        told, sit = attributes(found.data), sit_pb2.sit_entry()
        for field, (kind, _) in _SIT_NUMBERS.items():
            if any(told.get(kind, b"")):
                setattr(sit, field, int.from_bytes(told[kind], "big" if kind in _SIT_PORTS else "little"))
        for field, kind in _SIT_ADDRESSES.items():
            if any(told.get(kind, b"")):
                getattr(sit, field).extend(struct.unpack(f"<{len(told[kind]) // 4}I", told[kind]))
        entry.sit.CopyFrom(sit)

    def restored_data(self, entry: netdev_pb2.net_device_entry) -> bytes:
        if entry.data:
            return super().restored_data(entry)
        data = b""
        for field, (kind, size) in _SIT_NUMBERS.items():
            if entry.sit.HasField(field):
                value = int(getattr(entry.sit, field))
                data += attribute(kind, value.to_bytes(size, "big" if kind in _SIT_PORTS else "little"))
        for field, kind in _SIT_ADDRESSES.items():
            words = list(getattr(entry.sit, field))
            if words:
                data += attribute(kind, struct.pack(f"<{len(words)}I", *words))
        return data

"""Kinds of network devices: what each needs to be told of in images, and how it is made again.

One kind is one subclass of `DeviceKind` in a module of its own (or beside its like), registered with `device_kind`.
What all devices have in common (names, flags, addresses, queues, ports of bridges) is in `devices`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import ClassVar

from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.pb import netdev_pb2
from phaul_engine.objects.base import Collection

from . import link
from .link import Link
from .netlink import CREATE, EXCL, Namespace, attribute, attribute_list, attributes, pack

_NSID, _NSID_FD = 1, 3  # NETNSA_*
_GETNSID = 90
_EXTERNAL = re.compile(r"(\w+)\[([^\]]+)\](?::([^@]*)(?:@(.+))?)?")


@dataclass(frozen=True)
class Outer:
    """What stands for something outside of the namespace: a device's name, a bridge that it is to be a port of, and
    what is to be set of it as one (`catching.Port`)."""

    name: str
    bridge: str = ""
    settings: bytes = b""


def externals(options: dict[str, object]) -> dict[tuple[str, str], Outer]:
    """What the user said of devices (`external`: veth[INNER]:OUTER@BRIDGE, macvlan[INNER]:OUTER, netdev[INNER]:OUTER),
    by kind and inner name."""
    given = options.get("external") or ()
    found = {}
    for text in given if isinstance(given, list | tuple) else ():
        match = _EXTERNAL.fullmatch(str(text))
        if match:
            found[match[1], match[2]] = Outer(match[3] or "", match[4] or "")
    return found


@dataclass
class Source:
    """A namespace that is being collected: its devices, and where blockers go. `number` is its name in images, `home`
    the engine's own namespace."""

    namespace: Namespace
    home: Namespace
    number: int
    links: dict[int, Link]
    collection: Collection
    outside: dict[int, int] = field(default_factory=dict)  # by index of a veth: the kernel's number of its peer's place

    def block(self, device: str, kind: str, why: str, advice: str) -> None:
        """A device that cannot be carried."""
        self.collection.block(f"network device {device}", kind, why, advice)

    def at_home(self, nsid: int) -> bool:
        """Whether the kernel's number of another namespace is that of the engine's."""
        return nsid_of(self.namespace, self.home.net) == nsid


@dataclass
class Making:
    """A namespace that is being made. `others` are those of the same tree that are there already, by number."""

    namespace: Namespace
    home: Namespace
    number: int
    outers: dict[tuple[str, str], Outer] = field(default_factory=dict)
    others: dict[int, Namespace] = field(default_factory=dict)
    plugs: dict[int, Outer] = field(default_factory=dict)  # by inner index: the outer end that was made, and its bridge
    ports: dict[str, bytes] = field(default_factory=dict)  # by names of outer ends: what is to be set of them as ports

    def outer(self, kind: str, entry: netdev_pb2.net_device_entry) -> Outer | None:
        """What is to stand for the outside of a device: as the user says, or else as it was."""
        said = self.outers.get((kind, os.fsdecode(entry.name)))
        if said is not None and said.name:
            return said
        if not entry.outer_name:
            return None
        return Outer(os.fsdecode(entry.outer_name), os.fsdecode(entry.outer_bridge))


class DeviceKind:
    """A kind of device. `kind` is what rtnetlink calls it, `settable` the attributes of its own that can be set."""

    kind: ClassVar[str]
    type: ClassVar[netdev_pb2.nd_type] = netdev_pb2.NAMED
    settable: ClassVar[frozenset[int]] = frozenset()

    def data(self, found: Link) -> bytes:
        """Its own attributes, as they can be set."""
        return pack(one for one in attribute_list(found.data) if one.kind in self.settable)

    def collect(self, found: Link, entry: netdev_pb2.net_device_entry, source: Source) -> None:
        """Put what is its own into the entry; what all devices have is there."""

    def restored_data(self, entry: netdev_pb2.net_device_entry) -> bytes:
        """Its own attributes from an image, which may be CRIU's."""
        return pack(one for one in attribute_list(entry.data) if one.kind in self.settable)

    def create(self, entry: netdev_pb2.net_device_entry, making: Making) -> bool:
        """Make it, down, with name, index, addresses and its own attributes. False if it cannot be made yet."""
        request_new(making.namespace, entry, self.kind, self.restored_data(entry))
        return True

    def complete(self, entry: netdev_pb2.net_device_entry, making: Making) -> None:
        """After all devices are there and before any is up."""


_kinds: dict[str, DeviceKind] = {}


def device_kind(kind: type[DeviceKind]) -> type[DeviceKind]:
    """Class decorator: register a kind."""
    _kinds[kind.kind] = kind()
    return kind


def kind_of(found: Link) -> DeviceKind | None:
    """The kind of a device, None if none of ours."""
    if not found.kind:
        return _kinds["loopback" if found.flags & link.LOOPBACK else "physical"]
    return _kinds.get(found.kind)


def is_known(kind: str) -> bool:
    """Whether there is a kind of that name."""
    return kind in _kinds


def kind_of_entry(entry: netdev_pb2.net_device_entry) -> DeviceKind:
    """The kind that an image entry belongs to."""
    name = os.fsdecode(entry.kind)
    for kind in _kinds.values():
        if kind.type == entry.type and (entry.type != netdev_pb2.NAMED or kind.kind == name):
            return kind
    raise ImageError(f"network device {os.fsdecode(entry.name)} is of a kind ({name or entry.type}) that is not known")


def request_new(
    namespace: Namespace, entry: netdev_pb2.net_device_entry, kind: str, data: bytes, more: bytes = b""
) -> None:
    """Have the kernel make a device; `more` are attributes besides the usual."""
    body = link.head(entry.ifindex) + common(entry) + more + info(kind, data)
    try:
        namespace.route.request(link.NEWLINK, CREATE | EXCL, body)
    except OSError as error:
        raise cannot(entry, kind, error) from error


def cannot(entry: netdev_pb2.net_device_entry, kind: str, error: OSError) -> RebuildError:
    """The error for a device that cannot be made."""
    unknown = error.errno in (95, 93)  # EOPNOTSUPP, EPROTONOSUPPORT
    return RebuildError(
        f"network device {os.fsdecode(entry.name)} ({kind}) cannot be made here: {error.strerror}",
        advice=f"load the module for {kind} on this host (modprobe {kind})" if unknown else "",
    )


def common(entry: netdev_pb2.net_device_entry) -> bytes:
    """The attributes that every kind is made with."""
    body = attribute(link.NAME, entry.name + b"\0") + attribute(link.MTU, entry.mtu.to_bytes(4, "little"))
    if entry.address:
        body += attribute(link.ADDRESS, entry.address)
    queues = [one for one in attribute_list(entry.attributes) if one.kind in (link.TX_QUEUES, link.RX_QUEUES)]
    return body + pack(queues)


def info(kind: str, data: bytes) -> bytes:
    """IFLA_LINKINFO."""
    inner = attribute(link.INFO_KIND, kind.encode())
    if data:
        inner += attribute(link.INFO_DATA, data)
    return attribute(link.LINK_INFO, inner)


def nsid_of(namespace: Namespace, other: int) -> int | None:
    """What number a namespace knows another (a descriptor) by, None if by none."""
    body = b"\0\0\0\0" + attribute(_NSID_FD, other.to_bytes(4, "little"))
    try:
        answer = namespace.route.ask(_GETNSID, body)
    except OSError:
        return None
    value = attributes(answer.body[4:]).get(_NSID)
    number = int.from_bytes(value or b"\xff" * 4, "little", signed=True)
    return number if number >= 0 else None

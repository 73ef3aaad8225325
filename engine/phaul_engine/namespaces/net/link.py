"""Network devices as rtnetlink(7) tells of them, and requests about one (linux/include/uapi/linux/if_link.h)."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass

from phaul_engine.network.interfaces import TAP_PREFIX

from .netlink import Attribute, Namespace, attribute, attribute_list, attributes, pack

NEWLINK, DELLINK, GETLINK = 16, 17, 18
SETLINK = 19
NEW_PROPERTIES, DELETE_PROPERTIES = 108, 109  # RTM_NEWLINKPROP, RTM_DELLINKPROP

ADDRESS, BROADCAST, NAME, MTU, LINK = 1, 2, 3, 4, 5
MASTER, QUEUE_LENGTH, LINK_MODE, LINK_INFO, ALIAS = 10, 13, 17, 18, 20
AF_SPEC, GROUP, NET_NS_FD, EXT_MASK, TX_QUEUES, RX_QUEUES = 26, 27, 28, 29, 31, 32
LINK_NETNSID, PROTO_DOWN, GSO_SEGMENTS, GSO_SIZE, XDP = 37, 39, 40, 41, 43
PROPERTIES, OTHER_NAME, GRO_SIZE, GSO_SIZE4, GRO_SIZE4 = 52, 53, 58, 63, 64
INFO_KIND, INFO_DATA, INFO_SLAVE_KIND, INFO_SLAVE_DATA = 1, 2, 4, 5
_INET6, _TOKEN, _GENERATION = 10, 7, 8  # IFLA_INET6_TOKEN, IFLA_INET6_ADDR_GEN_MODE
_XDP_ATTACHED = 2
_SKIP_STATISTICS = 8  # RTEXT_FILTER_SKIP_STATS
GENERATE_USUAL, GENERATE_NONE = 0, 1  # IN6_ADDR_GEN_MODE_EUI64, IN6_ADDR_GEN_MODE_NONE

UP, LOOPBACK = 0x1, 0x8
SETTABLE_FLAGS = 0xF3A5  # of IFF_*: up, debug, notrailers, noarp, promisc, allmulti, multicast and what is above it
"""What a request can change (linux/net/core/dev.c, __dev_change_flags)."""

_OWN = (BROADCAST, QUEUE_LENGTH, LINK_MODE, ALIAS, GROUP, PROTO_DOWN)
_CARRIED = (*_OWN, TX_QUEUES, RX_QUEUES, GSO_SEGMENTS, GSO_SIZE, GRO_SIZE, GSO_SIZE4, GRO_SIZE4)


@dataclass(frozen=True)
class Link:
    """A network device. `lower` is the index of what it stands on or its other end, `elsewhere` the kernel's number of
    the namespace that this is in, if it is another one. `data` and `port` are packed attributes of its kind."""

    index: int
    flags: int
    kind: str
    found: dict[int, bytes]
    data: bytes
    port_kind: str
    port: bytes

    @property
    def name(self) -> str:
        """Its name."""
        return os.fsdecode(self.found[NAME].rstrip(b"\0"))

    @property
    def mtu(self) -> int:
        """Bytes."""
        return _number(self.found.get(MTU))

    @property
    def address(self) -> bytes:
        """The hardware address, empty where the kind has none."""
        return self.found.get(ADDRESS, b"")

    @property
    def master(self) -> int:
        """Index of the bridge (or the like) that it is a port of, or 0."""
        return _number(self.found.get(MASTER))

    @property
    def lower(self) -> int:
        """See the class."""
        return _number(self.found.get(LINK))

    @property
    def elsewhere(self) -> int | None:
        """See the class."""
        value = self.found.get(LINK_NETNSID)
        return None if value is None else int(struct.unpack("=i", value)[0])

    @property
    def other_names(self) -> list[bytes]:
        """Alternative names."""
        names = attribute_values(self.found.get(PROPERTIES, b""), OTHER_NAME)
        return [name.rstrip(b"\0") for name in names]

    @property
    def programmed(self) -> bool:
        """Whether an XDP program is attached."""
        return any(attributes(self.found.get(XDP, b"")).get(_XDP_ATTACHED, b"\0"))

    @property
    def carried(self) -> bytes:
        """The attributes of the link itself that can be given to another."""
        return pack(Attribute(kind, self.found[kind]) for kind in _CARRIED if kind in self.found) + self.generation

    @property
    def generation(self) -> bytes:
        """How the kernel makes IPv6 addresses of it, as an attribute to set; empty if it has no IPv6."""
        inet6 = attributes(attributes(self.found.get(AF_SPEC, b"")).get(_INET6, b""))
        if _GENERATION not in inet6:
            return b""
        inner = attribute(_GENERATION, inet6[_GENERATION])
        if any(inet6.get(_TOKEN, b"")):
            inner += attribute(_TOKEN, inet6[_TOKEN])
        return attribute(AF_SPEC, attribute(_INET6, inner))


def attribute_values(body: bytes, kind: int) -> list[bytes]:
    """The values of all attributes of one number."""
    return [one.value for one in attribute_list(body) if one.kind == kind]


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "little")


def head(index: int = 0, flags: int = 0, change: int = 0, family: int = 0) -> bytes:
    """struct ifinfomsg."""
    return struct.pack("=BxHiII", family, 0, index, flags, change)


def parse(body: bytes) -> Link:
    """From the body of a RTM_NEWLINK message."""
    _, _, index, flags, _ = struct.unpack_from("=BxHiII", body)
    found = attributes(body[16:])
    info = attributes(found.get(LINK_INFO, b""))
    return Link(
        index,
        flags,
        info.get(INFO_KIND, b"").rstrip(b"\0").decode(),
        found,
        info.get(INFO_DATA, b""),
        info.get(INFO_SLAVE_KIND, b"").rstrip(b"\0").decode(),
        info.get(INFO_SLAVE_DATA, b""),
    )


def read_links(namespace: Namespace) -> dict[int, Link]:
    """All devices of a namespace, by index, in the kernel's order; but those through which packets are held."""
    body = head() + attribute(EXT_MASK, struct.pack("=I", _SKIP_STATISTICS))
    links = [parse(message.body) for message in namespace.route.dump(GETLINK, body)]
    return {link.index: link for link in links if not link.name.startswith(TAP_PREFIX)}


def read_link(namespace: Namespace, *, index: int = 0, name: str = "") -> Link | None:
    """One device, None if there is none of that index or name."""
    body = head(index) + attribute(EXT_MASK, struct.pack("=I", _SKIP_STATISTICS))
    if name:
        body += attribute(NAME, os.fsencode(name) + b"\0")
    try:
        return parse(namespace.route.ask(GETLINK, body).body)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise


def generate(mode: int) -> bytes:
    """The attribute that says how the kernel makes IPv6 addresses of a link."""
    return attribute(AF_SPEC, attribute(_INET6, attribute(_GENERATION, bytes([mode]))))


def set_flags(namespace: Namespace, index: int, flags: int, change: int = SETTABLE_FLAGS) -> None:
    """Have a device up or down, and so on."""
    namespace.route.request(NEWLINK, 0, head(index, flags & change, change))


def delete(namespace: Namespace, index: int) -> None:
    """Remove a device, if it has not gone with another one."""
    try:
        namespace.route.request(DELLINK, 0, head(index))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise

"""Connections that the packet filter follows, and those that it expects (nf_conntrack). Raw images are the kernel's own
messages, as CRIU writes them."""

from __future__ import annotations

import errno
import struct
from contextlib import suppress

from phaul_engine.errors import RebuildError

from .netlink import (
    CREATE,
    EXCL,
    NESTED,
    NETLINK_NETFILTER,
    Attribute,
    Message,
    Namespace,
    attribute,
    attribute_list,
    attributes,
    pack,
)

_NEW, _GET, _DELETE = 1 << 8 | 0, 1 << 8 | 1, 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_*
_NEW_EXPECTED, _GET_EXPECTED = 2 << 8 | 0, 2 << 8 | 1  # NFNL_SUBSYS_CTNETLINK_EXP
_HEAD = 4  # struct nfgenmsg
_ORIGINAL, _REPLY, _STATUS, _NAT_SOURCE, _TIMEOUT, _NAT_DESTINATION, _ZONE = 1, 2, 3, 6, 7, 13, 18  # CTA_*
_KEPT = {1, 2, 3, 4, 5, 7, 8, 14, 15, 16, 18, 22, 24}  # without counters, numbers, times, and what is told of the rest
_TUPLE_ADDRESSES, _TUPLE_PORTS = 1, 2  # CTA_TUPLE_IP, CTA_TUPLE_PROTO
_SOURCE4, _DESTINATION4, _SOURCE6, _DESTINATION6 = 1, 2, 3, 4
_SOURCE_PORT, _DESTINATION_PORT = 2, 3
_NAT_ADDRESS4, _NAT_PORTS, _NAT_ADDRESS6 = 1, 3, 4  # CTA_NAT_V4_MINIP, CTA_NAT_PROTO, CTA_NAT_V6_MINIP
_PORT_FROM, _PORT_TO = 1, 2
_SOURCE_NAT, _DESTINATION_NAT = 0x10, 0x20  # IPS_SRC_NAT, IPS_DST_NAT
_NONE = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)


def read(namespace: Namespace, any_followed: bool = True) -> tuple[list[Message], list[Message]]:
    """Connections and expected connections; none where the kernel follows none. To ask is dear: it walks a table that
    all namespaces have in common."""
    if not any_followed:
        return [], []
    sock, head = namespace.netlink(NETLINK_NETFILTER), struct.pack("=BBH", 0, 0, 0)
    found = []
    for kind in (_GET, _GET_EXPECTED):
        try:
            found.append(sock.dump(kind, head))
        except OSError as error:
            if error.errno not in _NONE:
                raise
            found.append([])
    return found[0], found[1]


def _settable(message: Message) -> bytes:
    """A request that makes a connection known, with the translation that its two directions show."""
    told = attributes(message.body[_HEAD:])
    kept = [one for one in attribute_list(message.body[_HEAD:]) if one.kind in _KEPT]
    status = int.from_bytes(told.get(_STATUS, b""), "big")
    reply = _ends(told.get(_REPLY, b""))
    if status & _SOURCE_NAT:
        kept.append(Attribute(_NAT_SOURCE, _translation(reply[2], reply[3]), NESTED))
    if status & _DESTINATION_NAT:
        kept.append(Attribute(_NAT_DESTINATION, _translation(reply[0], reply[1]), NESTED))
    return message.body[:_HEAD] + pack(kept)


def _ends(value: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Source address and port, destination address and port of a direction."""
    told = attributes(value)
    addresses, ports = attributes(told.get(_TUPLE_ADDRESSES, b"")), attributes(told.get(_TUPLE_PORTS, b""))
    source = addresses.get(_SOURCE4) or addresses.get(_SOURCE6, b"")
    destination = addresses.get(_DESTINATION4) or addresses.get(_DESTINATION6, b"")
    return source, ports.get(_SOURCE_PORT, b""), destination, ports.get(_DESTINATION_PORT, b"")


def _translation(address: bytes, port: bytes) -> bytes:
    body = attribute(_NAT_ADDRESS4 if len(address) == 4 else _NAT_ADDRESS6, address)
    if port:
        body += attribute(_NAT_PORTS | NESTED, attribute(_PORT_FROM, port) + attribute(_PORT_TO, port))
    return body


def _identity(message: Message) -> bytes:
    """A connection but for the time that it has left."""
    kept = [one for one in attribute_list(message.body[_HEAD:]) if one.kind in _KEPT - {_TIMEOUT}]
    return message.body[:_HEAD] + pack(kept)


def apply(namespace: Namespace, wanted: list[Message], expected: list[Message], before: list[Message]) -> None:
    """Make connections known, and forget those of `before` that are not wanted any more."""
    sock = namespace.netlink(NETLINK_NETFILTER)
    known, goal = ({_identity(one): one for one in messages} for messages in (before, wanted))
    for identity, one in known.items():
        if identity not in goal:
            told = attribute_list(one.body[_HEAD:])
            key = pack(inner for inner in told if inner.kind in (_ORIGINAL, _ZONE))
            with suppress(FileNotFoundError):  # it ended meanwhile
                sock.request(_DELETE, 0, one.body[:_HEAD] + key)
    requests = [(_NEW, _settable(one)) for identity, one in goal.items() if identity not in known]
    requests += [(_NEW_EXPECTED, one.body) for one in expected]
    for kind, body in requests:
        try:
            sock.request(kind, CREATE | EXCL, body)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise RebuildError(f"a followed connection cannot be made known here: {error.strerror}") from error

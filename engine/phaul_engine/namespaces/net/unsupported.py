"""What a network namespace may have that does not move, each by its name."""

from __future__ import annotations

import errno
import struct

from phaul_engine.objects.base import Collection

from . import iptables
from .device import Source
from .netlink import Namespace, Netlink, attributes

_GET_QDISC, _GET_POLICY, _GET_STATE, _GET_ROUTE = 38, 0x15, 0x12, 26
_NETLINK_XFRM = 6
_QDISC_KIND = 1
_OURS = ("clsact",)  # the hold of a migration, where there is no TCX
_MULTICAST_FAMILIES = (128, 129)  # RTNL_FAMILY_IPMR, RTNL_FAMILY_IP6MR
_ABSENT = (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)


def judge(source: Source) -> None:
    """Block for each thing that would be lost."""
    where = f"the network namespace numbered {source.number}"
    _judge_queues(source)
    _judge_security(source.namespace, source.collection, where)
    for family in _MULTICAST_FAMILIES:
        if _dumped(source.namespace.route, _GET_ROUTE, struct.pack("=8BI", family, *[0] * 8)):
            source.collection.block(
                where, "multicast routes", "they belong to the socket of a routing daemon", "stop that daemon"
            )
    if source.namespace.inside(_arp_tables):
        source.collection.block(
            where, "rules of arp_tables", "they are not supported", "use nftables (arptables-nft), or remove them"
        )


def _arp_tables() -> bool:
    try:
        with open(iptables.ARP) as file:
            return bool(file.read().split())
    except FileNotFoundError:
        return False


def _judge_queues(source: Source) -> None:
    for one in source.namespace.route.dump(_GET_QDISC, bytes(20)):
        index, handle = struct.unpack_from("=iI", one.body, 4)
        kind = attributes(one.body[20:]).get(_QDISC_KIND, b"").rstrip(b"\0").decode(errors="replace")
        device = source.links.get(index)
        if device is None or not handle or kind in _OURS:
            continue  # what the kernel gives each device has no handle
        source.block(
            device.name,
            f"a queueing discipline ({kind})",
            "what tc set up is not supported",
            f"remove it (tc qdisc del dev {device.name} {'ingress' if kind == 'ingress' else 'root'})",
        )


def _judge_security(namespace: Namespace, collection: Collection, where: str) -> None:
    try:
        sock = namespace.netlink(_NETLINK_XFRM)
    except OSError as error:
        if error.errno in _ABSENT:
            return
        raise
    for kind, size, what in ((_GET_POLICY, 64, "IPsec policies"), (_GET_STATE, 40, "IPsec associations")):
        if _dumped(sock, kind, bytes(size)):
            collection.block(where, what, "xfrm is not supported", "stop the IPsec daemon, or ip xfrm flush")


def _dumped(sock: Netlink, kind: int, body: bytes) -> bool:
    try:
        return bool(sock.dump(kind, body))
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise

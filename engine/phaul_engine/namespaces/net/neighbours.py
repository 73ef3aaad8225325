"""Neighbours that somebody entered: lasting ones, and addresses that are answered for others (ip-neighbour(8)).

What the kernel learned it learns again: at the destination the same address may belong to another device.
"""

from __future__ import annotations

import errno
import struct

from phaul_engine.errors import RebuildError

from .netlink import CREATE, REPLACE, Message, Namespace, attribute_list, pack

_NEW, _DELETE, _GET = 28, 29, 30  # RTM_*NEIGH
_HEAD = struct.Struct("=BxxxiHBB")  # struct ndmsg
_PERMANENT, _PROXY = 0x80, 0x08
_KEPT = {1, 2, 5, 6, 7, 8, 12, 15}  # NDA_DST, LLADDR, VLAN, PORT, VNI, IFINDEX, PROTOCOL, FLAGS_EXT
_AF_INET, _AF_INET6 = 2, 10


def read(namespace: Namespace) -> list[Message]:
    """Those of both families, as they can be entered again."""
    found = []
    for flags in (0, _PROXY):
        for one in namespace.route.dump(_GET, _HEAD.pack(0, 0, 0, flags, 0)):
            family, index, state, flag, kind = _HEAD.unpack_from(one.body)
            if family not in (_AF_INET, _AF_INET6) or not (state & _PERMANENT or flag & _PROXY):
                continue
            kept = pack(inner for inner in attribute_list(one.body[_HEAD.size :]) if inner.kind in _KEPT)
            found.append(Message(_NEW, _HEAD.pack(family, index, state, flag, kind) + kept))
    return found


def apply(namespace: Namespace, wanted: list[Message]) -> None:
    """Have these and no others."""
    there = read(namespace)
    for one in there:
        if one not in wanted:
            try:
                namespace.route.request(_DELETE, 0, one.body)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
    for one in wanted:
        if one not in there:
            try:
                namespace.route.request(_NEW, CREATE | REPLACE, one.body)
            except OSError as error:
                raise RebuildError(f"a neighbour cannot be entered here: {error.strerror}") from error

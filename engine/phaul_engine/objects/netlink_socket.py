"""Netlink sockets: protocol, address, groups and options (netlink(7)).

What such a socket tells is about the host it is on. Messages that wait unread would be about the old one, so they are
a blocker in the freeze; what happens on the new host from then on is heard.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import ClassVar, cast

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import fdinfo_pb2

from . import inet, socket_options
from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import settle_status, signal_owner, status_flags
from .socket_options import SOL_NETLINK

_ADD_MEMBERSHIP, _LIST_MEMBERSHIPS = 1, 9
_UNCONNECTED, _CONNECTED = 0, 1  # linux/net/netlink/af_netlink.h


@descriptor_kind
class Netlink(DescriptorKind):
    """A netlink socket."""

    name = "netlink socket"
    types: ClassVar = (fdinfo_pb2.NETLINKSK,)

    def claims(self, descriptor: Descriptor) -> bool:
        sort = inet.sort_of(descriptor)
        return sort is not None and sort[0] == socket.AF_NETLINK

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.NETLINKSK, id=file_id)
        message = entry.nlsk
        sort = cast("inet.Sort", inet.sort_of(descriptor))
        message.id, message.ino, message.protocol = file_id, descriptor.status.st_ino, sort[2]
        message.flags, message.state = status_flags(descriptor), _UNCONNECTED
        message.fown.CopyFrom(signal_owner(descriptor, collection))
        with inet.borrowed(descriptor.own, sort) as sock:
            message.portid = sock.getsockname()[0]
            message.dst_portid, message.dst_group = sock.getpeername()
            if message.dst_portid or message.dst_group:
                message.state = _CONNECTED
            options = socket_options.read(sock)
            socket_options.encode(options, message.opts)
            words = sock.getsockopt(SOL_NETLINK, _LIST_MEMBERSHIPS, 128)
            message.groups.extend(struct.unpack(f"{len(words) // 4}I", words))
            if not collection.survey and _waiting(sock):
                why = "messages wait unread in it, which are about this host"
                collection.block(
                    descriptor, "a netlink socket", why, "try again when they have been read", passing=True
                )
        return entry

    def settles(self, early: fdinfo_pb2.file_entry, final: fdinfo_pb2.file_entry) -> bool:
        a, b = early.nlsk, final.nlsk
        return (a.protocol, a.portid, list(a.groups), a.dst_portid, a.dst_group) == (
            *(b.protocol, b.portid, list(b.groups)),
            *(b.dst_portid, b.dst_group),
        )

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        message = entry.nlsk
        sock = inet.make((socket.AF_NETLINK, socket.SOCK_RAW, message.protocol), restoration)
        try:
            if message.portid:
                sock.bind((message.portid, 0))
            for index, word in enumerate(message.groups):
                for bit in range(32):
                    if word >> bit & 1:
                        sock.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, 32 * index + bit + 1)
            if message.state == _CONNECTED:
                sock.connect((message.dst_portid, message.dst_group))
            socket_options.write(sock, socket_options.decode(message.opts))
        except OSError as error:
            sock.close()
            what = f"a netlink socket of protocol {message.protocol} with port id {message.portid}"
            raise RebuildError(f"cannot make {what} here: {os.strerror(error.errno or 0)}") from error
        except RebuildError:
            sock.close()
            raise
        return sock.detach()

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        message = entry.nlsk
        settle_status(fd, message.flags, message.fown, restoration)
        with inet.borrowed(fd, (socket.AF_NETLINK, socket.SOCK_RAW, message.protocol)) as sock:
            socket_options.write(sock, socket_options.decode(message.opts))


def _waiting(sock: socket.socket) -> bool:
    """Whether there is something to read. Not by select(2): a big tree's descriptors have high numbers here."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))

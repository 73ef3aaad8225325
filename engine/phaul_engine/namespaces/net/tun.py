"""TUN and TAP devices (Documentation/networking/tuntap.rst). One lives by the descriptors that are attached to it, or
for ever if it is persistent. It is made persistent at first; `objects/tun.py` attaches the descriptors, and whoever
attached the last lets go of what was not persistent."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import ClassVar

from phaul_engine.images.pb import netdev_pb2, tun_pb2

from .device import DeviceKind, Making, Source, cannot, device_kind
from .link import Link
from .netlink import attributes

DEVICE = "/dev/net/tun"
SET_INTERFACE, SET_PERSIST, SET_OWNER, SET_GROUP, SET_INDEX = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE, 0x400454DA
GET_HEADER_SIZE, SET_HEADER_SIZE, GET_BUFFER, SET_BUFFER = 0x800454D7, 0x400454D8, 0x800454D3, 0x400454D4
TUN, TAP, MULTI_QUEUE, PERSIST, NO_INFO, HEADER = 0x1, 0x2, 0x100, 0x800, 0x1000, 0x4000
SETTABLE = TUN | TAP | MULTI_QUEUE | NO_INFO | HEADER
USUAL_HEADER, USUAL_BUFFER = 10, 0x7FFFFFFF
_OWNER, _GROUP, _TYPE, _INFO, _HEADER, _PERSIST, _MULTI_QUEUE = 1, 2, 3, 4, 5, 6, 7  # IFLA_TUN_*
_NOBODY = -1


def request(name: bytes, flags: int) -> bytes:
    """struct ifreq for TUNSETIFF."""
    return struct.pack("16sH22x", name, flags)


@device_kind
class Tun(DeviceKind):
    """tun, with what IFLA_TUN_* tells; the rest is told by descriptors."""

    kind: ClassVar = "tun"
    type: ClassVar = netdev_pb2.TUN

    def collect(self, found: Link, entry: netdev_pb2.net_device_entry, source: Source) -> None:
        told = {kind: int.from_bytes(value, "little") for kind, value in attributes(found.data).items()}
        flags = told.get(_TYPE, TUN)
        for kind, flag in ((_HEADER, HEADER), (_PERSIST, PERSIST), (_MULTI_QUEUE, MULTI_QUEUE)):
            flags |= flag if told.get(kind) else 0
        flags |= 0 if told.get(_INFO) else NO_INFO
        owner, group = (_signed(told.get(kind, 0xFFFFFFFF)) for kind in (_OWNER, _GROUP))
        entry.tun.CopyFrom(
            tun_pb2.tun_link_entry(flags=flags, owner=owner, group=group, vnethdr=USUAL_HEADER, sndbuf=USUAL_BUFFER)
        )

    def create(self, entry: netdev_pb2.net_device_entry, making: Making) -> bool:
        try:
            fd = making.namespace.inside(lambda: os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
            try:
                self._make(fd, entry)
            finally:
                os.close(fd)
        except OSError as error:
            raise cannot(entry, self.kind, error) from error
        return True

    def _make(self, fd: int, entry: netdev_pb2.net_device_entry) -> None:
        tun = entry.tun
        fcntl.ioctl(fd, SET_INDEX, struct.pack("=I", entry.ifindex))
        fcntl.ioctl(fd, SET_INTERFACE, request(entry.name, tun.flags & SETTABLE))
        fcntl.ioctl(fd, SET_PERSIST, 1)
        for order, value in ((SET_OWNER, tun.owner), (SET_GROUP, tun.group)):
            if value != _NOBODY:
                fcntl.ioctl(fd, order, value & 0xFFFFFFFF)
        if tun.vnethdr != USUAL_HEADER and tun.flags & HEADER:
            fcntl.ioctl(fd, SET_HEADER_SIZE, struct.pack("=i", tun.vnethdr))
        if tun.sndbuf != USUAL_BUFFER:
            fcntl.ioctl(fd, SET_BUFFER, struct.pack("=i", tun.sndbuf))


def _signed(value: int) -> int:
    return value - (1 << 32) if value & 0x80000000 else value

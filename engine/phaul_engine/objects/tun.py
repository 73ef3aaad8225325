"""Descriptors of TUN and TAP devices (Documentation/networking/tuntap.rst): queues of a device of the tree's own.

The devices themselves are made with their namespace (`namespaces.net.tun`), persistent. Packets that wait in a queue
are lost, as any network may lose packets.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import ClassVar

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import fdinfo_pb2, netdev_pb2, tun_pb2
from phaul_engine.namespaces.net import kind as network
from phaul_engine.namespaces.net import tun as device

from .base import Collection, Descriptor, DescriptorKind, Restoration, descriptor_kind
from .description import settle_status, signal_owner, status_flags

_DEVICE = os.makedev(10, 200)
_GET_INTERFACE, _GET_NAMESPACE, _SET_QUEUE = 0x800454D2, 0x54E3, 0x400454D9
_DETACH = 0x400  # IFF_DETACH_QUEUE
_WHY = "the interface belongs to this host's network"
_ADVICE = "move the container that it belongs to, or close the descriptor"


@descriptor_kind
class TunFile(DescriptorKind):
    """Attached to the device of its name, or not yet attached to any."""

    name = "TUN descriptor"
    types: ClassVar = (fdinfo_pb2.TUNF,)

    def claims(self, descriptor: Descriptor) -> bool:
        by_path = bool(descriptor.info.flags & os.O_PATH)
        return stat.S_ISCHR(descriptor.status.st_mode) and descriptor.status.st_rdev == _DEVICE and not by_path

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        entry = tun_pb2.tunfile_entry(id=file_id, flags=status_flags(descriptor))
        entry.fown.CopyFrom(signal_owner(descriptor, collection))
        number = network.number_of(collection, descriptor.owner.net)
        attached = _interface(descriptor.own)
        if attached is not None:
            number = _number_of_device(descriptor.own, collection)
            name, flags = attached
            entry.netdev, entry.detached = name, bool(flags & _DETACH)
        if number is None:
            collection.block(descriptor, "a TUN/TAP interface", _WHY, _ADVICE)
        else:
            entry.ns_id = number
            _complete_device(descriptor.own, entry, number, collection)
        return fdinfo_pb2.file_entry(type=fdinfo_pb2.TUNF, id=file_id, tunf=entry)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        namespace = network.made(restoration, entry.tunf.ns_id)
        if namespace is None:
            raise RebuildError(f"TUN descriptor {entry.id} belongs to a network namespace that the images do not have")
        fd = namespace.inside(lambda: os.open(device.DEVICE, os.O_RDWR | os.O_CLOEXEC))
        try:
            if entry.tunf.netdev:
                flags = _device(entry, restoration).tun.flags & device.SETTABLE
                fcntl.ioctl(fd, device.SET_INTERFACE, device.request(entry.tunf.netdev, flags))
                if entry.tunf.detached:
                    fcntl.ioctl(fd, _SET_QUEUE, device.request(b"", _DETACH))
        except OSError as error:
            os.close(fd)
            name = os.fsdecode(entry.tunf.netdev)
            raise RebuildError(f"TUN descriptor {entry.id} cannot be attached to {name}: {error.strerror}") from error
        return fd

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        if entry.tunf.HasField("flags"):
            settle_status(fd, entry.tunf.flags, entry.tunf.fown, restoration)

    def release(self, restoration: Restoration) -> None:
        for entry in _entries(restoration):
            if entry.tunf.netdev and not _device(entry, restoration).tun.flags & device.PERSIST:
                fcntl.ioctl(restoration.made[entry.id], device.SET_PERSIST, 0)


def _entries(restoration: Restoration) -> Iterator[fdinfo_pb2.file_entry]:
    for record in restoration.checkpoint.records("files"):
        if record.message.type == fdinfo_pb2.TUNF and record.message.id in restoration.made:
            yield record.message


def _interface(fd: int) -> tuple[bytes, int] | None:
    """Name and flags of the device that a descriptor is attached to."""
    try:
        answer = fcntl.ioctl(fd, _GET_INTERFACE, bytes(40))
    except OSError as error:
        if error.errno == errno.EBADFD:
            return None
        raise
    return answer[:16].rstrip(b"\0"), struct.unpack_from("=H", answer, 16)[0]


def _number_of_device(fd: int, collection: Collection) -> int | None:
    net = fcntl.ioctl(fd, _GET_NAMESPACE)
    try:
        return network.number_of(collection, net)
    finally:
        os.close(net)


def _complete_device(fd: int, entry: tun_pb2.tunfile_entry, number: int, collection: Collection) -> None:
    """Of a device, what only its descriptors tell."""
    for record in collection.checkpoint.records("netdev", number):
        if record.message.name == entry.netdev and record.message.HasField("tun"):
            tun = record.message.tun
            tun.vnethdr = struct.unpack("=i", fcntl.ioctl(fd, device.GET_HEADER_SIZE, bytes(4)))[0]
            tun.sndbuf = struct.unpack("=i", fcntl.ioctl(fd, device.GET_BUFFER, bytes(4)))[0]


def _device(entry: fdinfo_pb2.file_entry, restoration: Restoration) -> netdev_pb2.net_device_entry:
    for record in restoration.checkpoint.records("netdev", entry.tunf.ns_id):
        if record.message.name == entry.tunf.netdev and record.message.HasField("tun"):
            found: netdev_pb2.net_device_entry = record.message
            return found
    raise RebuildError(f"TUN descriptor {entry.id} is attached to a device that the images do not have")

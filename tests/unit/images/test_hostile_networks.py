"""Images of network namespaces that say something impossible are refused before anything is made."""

from __future__ import annotations

import struct

import pytest
from phaul_engine.errors import ImageError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import netdev_pb2
from phaul_engine.namespaces.net import device, devices, sysctls
from phaul_engine.namespaces.net.netlink import attribute_list
from phaul_engine.namespaces.net.state import from_images

_MAGICS = {"ifaddr": 0x47361222, "route": 0x45311224, "route6": 0x45311224, "rule": 0x71706986}


def _checkpoint(kind: str = "", data: bytes = b"") -> Checkpoint:
    checkpoint = Checkpoint()
    checkpoint.put("netns", 9, netdev_pb2.netns_entry())
    if kind:
        checkpoint.put(kind, 9, None, data)
    return checkpoint


@pytest.mark.parametrize("kind", [*_MAGICS, "netns-ct", "netns-exp"])
@pytest.mark.parametrize("length", [0, 15, 17, 1 << 31])
def test_messages_that_do_not_end(kind: str, length: int) -> None:
    head = struct.pack("<I", _MAGICS[kind]) if kind in _MAGICS else b""
    with pytest.raises(ImageError, match="does not end where it should"):
        from_images(_checkpoint(kind, head + struct.pack("=IHHII", length, 20, 0, 0, 0)), 9)


@pytest.mark.parametrize(("kind", "message"), [("ifaddr", 20), ("route", 24), ("route6", 24), ("rule", 32)])
def test_messages_with_nothing_in_them(kind: str, message: int) -> None:
    data = struct.pack("<I", _MAGICS[kind]) + struct.pack("=IHHII", 16, message, 0, 0, 0)
    with pytest.raises(ImageError, match="has a message without"):
        from_images(_checkpoint(kind, data), 9)


@pytest.mark.parametrize("kind", list(_MAGICS))
def test_another_magic(kind: str) -> None:
    with pytest.raises(ImageError, match="does not begin as such"):
        from_images(_checkpoint(kind, b"\1\2\3\4"), 9)


def test_attributes_that_do_not_end() -> None:
    with pytest.raises(ImageError, match="does not end where it should"):
        attribute_list(struct.pack("=HH", 100, 1))


@pytest.mark.parametrize("name", [b"", b"ipv4", b"../../kernel/core_pattern", b"ipv4/../../x", b"/ipv4/x", b"ipv4//x"])
def test_settings_elsewhere(name: bytes) -> None:
    entry = netdev_pb2.netns_entry()
    entry.sysctls.add(name=name, value=b"1")
    with pytest.raises(ImageError, match="is no name of a setting"):
        sysctls.wanted_values(entry, [])


def test_a_device_of_a_kind_that_is_not_known() -> None:
    assert devices
    entry = netdev_pb2.net_device_entry(type=netdev_pb2.NAMED, ifindex=2, mtu=1, flags=0, name=b"x", kind=b"nonsense")
    with pytest.raises(ImageError, match=r"of a kind .nonsense. that is not known"):
        device.kind_of_entry(entry)

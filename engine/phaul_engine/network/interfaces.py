"""Network interfaces as the hold needs them: names, numbers, addresses, and TAPs.

All functions act in the calling thread's network namespace. Sources: netdevice(7), linux/include/uapi/linux/if_tun.h,
Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCGIFMTU, _SIOCSIFMTU = 0x8913, 0x8914, 0x8921, 0x8922
_SIOCGIFHWADDR, _SIOCSIFTXQLEN = 0x8927, 0x8943
_IFF_UP, _IFF_LOOPBACK, _IFF_NOARP = 0x1, 0x8, 0x80
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454CA, 0x400454CB, 0x400454D0, 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6, _TUN_F_TSO_ECN = 1, 2, 4, 8
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
_NETLINK_ROUTE, _RTM_NEWADDR, _RTM_GETADDR, _NLMSG_DONE = 0, 20, 22, 3
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_IFA_ADDRESS, _IFA_LOCAL = 1, 2  # on a point-to-point link the first is the peer's
TAP_PREFIX = "ph-"
QUEUE_LENGTH = 20_000  # frames a TAP keeps for us: several ms of 10 Gbit/s in full-size frames


@dataclass(frozen=True)
class Interface:
    """An interface that carries Ethernet frames."""

    index: int
    name: str
    address: bytes
    mtu: int
    loopback: bool


def ethernet_interfaces() -> list[Interface]:
    """All interfaces that are up and carry Ethernet frames, lo among them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        found = []
        for index, name in socket.if_nameindex():
            flags = struct.unpack_from("H", _request(sock, _SIOCGIFFLAGS, name), 16)[0]
            hardware = _request(sock, _SIOCGIFHWADDR, name)
            kind, address = struct.unpack_from("H6s", hardware, 16)
            if flags & _IFF_UP and kind in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK):
                mtu = struct.unpack_from("i", _request(sock, _SIOCGIFMTU, name), 16)[0]
                found.append(Interface(index, name, address, mtu, bool(flags & _IFF_LOOPBACK)))
        return found


def _request(sock: socket.socket, request: int, name: str, value: bytes = b"") -> bytes:
    return fcntl.ioctl(sock, request, struct.pack("16s24s", name.encode(), value))


@dataclass
class Tap:
    """A TAP: what is sent to it is read from `fd`, what is written to `fd` comes in at it.

    Frames have a struct virtio_net_hdr in front, so that segments stay together and checksums need not be filled in.
    """

    fd: int
    name: str
    index: int

    @classmethod
    def create(cls, name: str, mtu: int) -> Tap:
        """A new TAP, up, without any traffic of its own. It is persistent: it outlives us as a drain."""
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 | _TUN_F_TSO_ECN)
            fcntl.ioctl(fd, _TUNSETPERSIST, 1)
            with suppress(FileNotFoundError), open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as quiet:
                quiet.write("1")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                _request(sock, _SIOCSIFMTU, name, struct.pack("i", mtu))
                _request(sock, _SIOCSIFTXQLEN, name, struct.pack("i", QUEUE_LENGTH))
                _request(sock, _SIOCSIFFLAGS, name, struct.pack("H", _IFF_UP | _IFF_NOARP))
            return cls(fd, name, socket.if_nametoindex(name))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close it; it stays until `remove_tap`."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def remove_tap(name: str) -> None:
    """Delete a persistent TAP that nobody holds any more; none there is as good."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        if name in (known for _, known in socket.if_nameindex()):
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
            fcntl.ioctl(fd, _TUNSETPERSIST, 0)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    finally:
        os.close(fd)


def holder_of(address: str) -> str | None:
    """The name of the interface of our network namespace that has an address; None if none has."""
    wanted = str(ipaddress.ip_address(address))
    return next((device for found, device in addresses() if found == wanted), None)


def addresses() -> Iterator[tuple[str, str]]:
    """All addresses of our network namespace and their devices, by rtnetlink(7)."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE) as netlink:
        netlink.bind((0, 0))
        netlink.settimeout(5)
        netlink.send(struct.pack("=IHHIIBBBBI", 24, _RTM_GETADDR, _DUMP, 1, 0, 0, 0, 0, 0, 0))
        while True:
            data = netlink.recv(1 << 18)
            offset = 0
            while offset < len(data):
                length, kind = struct.unpack_from("=IH", data, offset)
                if kind == _NLMSG_DONE:
                    return
                if kind == _RTM_NEWADDR:
                    index = struct.unpack_from("=I", data, offset + 20)[0]
                    yield _address(data[offset + 24 : offset + length]), socket.if_indextoname(index)
                offset += length + 3 & ~3


def _address(attributes: bytes) -> str:
    found: dict[int, bytes] = {}
    offset = 0
    while offset < len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, offset)
        found[kind] = attributes[offset + 4 : offset + length]
        offset += length + 3 & ~3
    return str(ipaddress.ip_address(found.get(_IFA_LOCAL) or found[_IFA_ADDRESS]))

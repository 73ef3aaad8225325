"""Telling the neighbours that an address is here now.

Linux does not do it when an address is added (arp_notify speaks of devices coming up): without it, a peer on the same
network goes on sending to the old host until its neighbour entry expires. Sources: RFC 5227 (gratuitous ARP),
RFC 4861 7.2.6 (unsolicited neighbour advertisements), packet(7).
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from phaul_engine.objects.tcp_stream import checksum

from .hold import inside
from .interfaces import ethernet_interfaces

_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_BROADCAST = b"\xff" * 6
_ALL_NODES = socket.inet_pton(socket.AF_INET6, "ff02::1")
_ALL_NODES_ETHER = b"\x33\x33\x00\x00\x00\x01"
_REQUEST, _REPLY = 1, 2
_ADVERTISEMENT, _OVERRIDE, _TARGET_ADDRESS = 136, 0x20000000, 2


@dataclass
class Announcer:
    """Prebuilt frames and a socket to send them; made before the freeze."""

    frames: list[bytes]
    sock: socket.socket

    @classmethod
    def prepare(cls, interface: str, addresses: list[str], netns: str = "") -> Announcer:
        """For these addresses at an interface. Raises `OSError` if there is no such interface."""

        def make() -> tuple[socket.socket, bytes]:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            sock.bind((interface, 0))
            hardware = next(one.address for one in ethernet_interfaces() if one.name == interface)
            return sock, hardware

        sock, hardware = inside(netns, make)
        frames = [frame for address in addresses for frame in announcements(address, hardware)]
        return cls(frames, sock)

    def send(self) -> None:
        """Announce; repeating it a little later helps where a frame is lost."""
        for frame in self.frames:
            self.sock.send(frame)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def announcements(address: str, hardware: bytes) -> list[bytes]:
    """The frames that announce an address: for IPv4 an ARP request and a reply, since some heed only one."""
    if ":" in address:
        return [_neighbour_advertisement(socket.inet_pton(socket.AF_INET6, address), hardware)]
    packed = socket.inet_pton(socket.AF_INET, address)
    head = _BROADCAST + hardware + struct.pack(">H", _ETH_P_ARP)
    return [
        head + struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, operation, hardware, packed, target, packed)
        for operation, target in ((_REQUEST, bytes(6)), (_REPLY, hardware))
    ]


def _neighbour_advertisement(address: bytes, hardware: bytes) -> bytes:
    message = struct.pack(">BBHI16sBB6s", _ADVERTISEMENT, 0, 0, _OVERRIDE, address, _TARGET_ADDRESS, 1, hardware)
    pseudo = address + _ALL_NODES + struct.pack(">II", len(message), socket.IPPROTO_ICMPV6)
    message = message[:2] + struct.pack(">H", checksum(pseudo + message)) + message[4:]
    head = struct.pack(">IHBB", 6 << 28, len(message), socket.IPPROTO_ICMPV6, 255)
    return _ALL_NODES_ETHER + hardware + struct.pack(">H", _ETH_P_IPV6) + head + address + _ALL_NODES + message

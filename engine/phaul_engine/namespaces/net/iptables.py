"""Rules of the older tables, ip_tables and ip6_tables (iptables-legacy(8)), as its save command tells them.

Whether they changed is told by the kernel's own tables without their counters, so that nothing is run in the freeze
where nothing changed; counters are those of the last time that rules were read.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from . import tools
from .netlink import Namespace

_GET_INFO, _GET_ENTRIES = 64, 65  # IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES; the same for IPv6
_NAME = 32
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Legacy:
    """One family of them. `offset` is where struct ipt_entry or ip6t_entry has target_offset, `counters` those."""

    family: int
    level: int
    names: str
    tool: str
    offset: int
    counters: int

    @property
    def what(self) -> str:
        """For people."""
        return f"{self.tool} rules"

    def tables(self, namespace: Namespace) -> list[str]:
        """The tables that are in use; using one makes it."""
        try:
            return namespace.inside(lambda: open(self.names).read().split())
        except FileNotFoundError:
            return []

    def entries(self, sock: socket.socket, name: bytes) -> bytes:
        """A table as the kernel has it, without its counters."""
        told = _asked(sock, self.level, _GET_INFO, struct.pack(f"={_NAME}s52x", name))
        size = struct.unpack_from("=I", told, len(told) - 4)[0]
        body = bytearray(_asked(sock, self.level, _GET_ENTRIES, struct.pack(f"={_NAME}sI4x", name, size) + bytes(size)))
        for start in self._starts(body):
            body[start + self.counters : start + self.counters + 16] = bytes(16)
        return told + bytes(body)

    def _starts(self, body: bytearray) -> Iterator[int]:
        position = _NAME + 8
        while position + self.counters + 16 <= len(body):
            yield position
            step = struct.unpack_from("=H", body, position + self.offset + 2)[0]
            if step == 0:
                return
            position += step

    def save(self, namespace: Namespace) -> bytes:
        """All tables as text, with counters; empty if none is in use."""
        if not self.tables(namespace):
            return b""
        program = tools.need(self.what, f"{self.tool}-legacy-save", f"{self.tool}-save")
        return tools.run(namespace, self.what, program, "-c")

    def restore(self, namespace: Namespace, text: bytes) -> None:
        """Set them. Tables that the text does not name are emptied."""
        wanted = [line[1:].strip().decode() for line in text.splitlines() if line.startswith(b"*")]
        unnamed = [name for name in self.tables(namespace) if name not in wanted]
        for name in unnamed:
            text += b"*%s\nCOMMIT\n" % name.encode()
        if not text.strip() or not (wanted or unnamed):
            return
        program = tools.need(self.what, f"{self.tool}-legacy-restore", f"{self.tool}-restore")
        tools.run(namespace, self.what, program, "-w", "-c", given=text)


class Tables:
    """The rules of one family in one namespace. The list of tables and a socket to ask for their content stay open."""

    def __init__(self, family: Legacy, namespace: Namespace) -> None:
        self._family, self._namespace = family, namespace
        self._known: tuple[dict[str, bytes], bytes] = ({}, b"")
        self._names, self._sock = namespace.inside(self._open)

    def _open(self) -> tuple[int, socket.socket]:
        names = -1
        with suppress(FileNotFoundError):
            names = os.open(self._family.names, os.O_RDONLY | os.O_CLOEXEC)
        return names, socket.socket(self._family.family, socket.SOCK_RAW, socket.IPPROTO_RAW)

    def read(self) -> bytes:
        """All tables as text, told by the tool where they changed since the last time."""
        names = os.pread(self._names, 4096, 0).decode().split() if self._names >= 0 else []
        now = {name: self._family.entries(self._sock, name.encode()) for name in names}
        if now != self._known[0]:
            self._known = now, self._family.save(self._namespace)
        return self._known[1]

    def close(self) -> None:
        """Close both."""
        self._sock.close()
        if self._names >= 0:
            os.close(self._names)


def _asked(sock: socket.socket, level: int, option: int, buffer: bytes) -> bytes:
    """getsockopt(2) with a buffer that says what is asked."""
    room, size = ctypes.create_string_buffer(buffer, len(buffer)), ctypes.c_uint32(len(buffer))
    if _libc.getsockopt(sock.fileno(), level, option, room, ctypes.byref(size)) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "getsockopt")
    return room.raw[: size.value]


IPV4 = Legacy(socket.AF_INET, socket.SOL_IP, "/proc/thread-self/net/ip_tables_names", "iptables", 88, 96)
IPV6 = Legacy(socket.AF_INET6, socket.IPPROTO_IPV6, "/proc/thread-self/net/ip6_tables_names", "ip6tables", 140, 152)
ARP = "/proc/thread-self/net/arp_tables_names"
FAMILIES: tuple[Legacy, ...] = (IPV4, IPV6)

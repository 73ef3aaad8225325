"""The address that moves: put on or taken off with messages that need no look-up (rtnetlink(7)).

An IPv6 address that is put on works only when a kernel worker has found time to make its local route (linux/net/ipv6/
addrconf.c, addrconf_dad_work); what arrives until then is dropped, and the peers' timers run. So `add` makes such a
route itself, and `tidy` removes it when the kernel's own is there.
"""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from phaul_engine.errors import EngineError

from .announce import Announcer
from .hold import inside
from .rtnetlink import CREATE, REPLACE, Route, attribute

_RTM_NEWADDR, _RTM_DELADDR = 20, 21
_RTM_NEWROUTE, _RTM_DELROUTE = 24, 25
_RTA_DST, _RTA_OIF, _RTA_PRIORITY = 1, 4, 6
_LOCAL_TABLE, _PROTOCOL_STATIC, _TYPE_LOCAL = 255, 4, 2
_HELPER_METRIC = 7  # the kernel's own local routes have 0
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 0x02


@dataclass
class Address:
    """An address with its prefix at an interface of a network namespace."""

    address: str
    prefix: int
    interface: str
    netns: str
    index: int
    route: Route
    _bridged: bool = False

    @classmethod
    def prepare(cls, text: str, netns: str = "") -> Address:
        """From ADDR/PREFIX@INTERFACE, as on the command line. `EngineError` if it makes no sense here."""
        place, at, interface = text.partition("@")
        address, slash, prefix = place.partition("/")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        longest = 128 if family == socket.AF_INET6 else 32
        try:
            socket.inet_pton(family, address)
        except OSError:
            raise EngineError(f"{text!r} is not of the form ADDRESS/PREFIX@INTERFACE") from None
        if not (at and slash and prefix.isdigit() and int(prefix) <= longest):
            raise EngineError(f"{text!r} is not of the form ADDRESS/PREFIX@INTERFACE")

        def make() -> tuple[int, Route]:
            return socket.if_nametoindex(interface), Route()

        try:
            index, route = inside(netns, make)
        except OSError as error:
            raise EngineError(f"there is no interface {interface} here") from error
        return cls(address, int(prefix), interface, netns, index, route)

    @property
    def _family(self) -> int:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET

    def add(self) -> None:
        """Put the address on; that it is there already is as good. No duplicate detection: it is meant to move."""
        self._request(_RTM_NEWADDR, CREATE | REPLACE, self._address(), errno.EEXIST)
        if self._family == socket.AF_INET6:
            self._request(_RTM_NEWROUTE, CREATE | REPLACE, self._route(), errno.EEXIST)
            self._bridged = True

    def tidy(self) -> None:
        """Some time after `add`: remove what bridged the time until the address worked by itself."""
        if self._family == socket.AF_INET6:
            self._request(_RTM_DELROUTE, 0, self._route(), errno.ESRCH)
            self._bridged = False

    def remove(self) -> None:
        """Take the address off; that it is not there is as good."""
        self.tidy()
        self._request(_RTM_DELADDR, 0, self._address(), errno.EADDRNOTAVAIL)

    def undo_add(self) -> dict[str, Any]:
        """The journal's entry that undoes `add`."""
        return self._entry("remove")

    def undo_remove(self) -> dict[str, Any]:
        """The journal's entry that undoes `remove`."""
        return self._entry("add")

    def _entry(self, act: str) -> dict[str, Any]:
        place = f"{self.address}/{self.prefix}@{self.interface}"
        return {"kind": "address", "data": {"act": act, "address": place, "netns": self.netns}}

    def _address(self) -> bytes:
        """struct ifaddrmsg and attributes."""
        packed = socket.inet_pton(self._family, self.address)
        flags = _IFA_F_NODAD if self._family == socket.AF_INET6 else 0
        body = struct.pack("<BBBBI", self._family, self.prefix, flags, 0, self.index)
        return body + attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)

    def _route(self) -> bytes:
        """struct rtmsg and attributes."""
        packed = socket.inet_pton(self._family, self.address)
        head = (self._family, 8 * len(packed), 0, 0, _LOCAL_TABLE, _PROTOCOL_STATIC, 0, _TYPE_LOCAL, 0)
        body = struct.pack("<8BI", *head) + attribute(_RTA_DST, packed)
        return (
            body
            + attribute(_RTA_OIF, self.index.to_bytes(4, "little"))
            + attribute(_RTA_PRIORITY, _HELPER_METRIC.to_bytes(4, "little"))
        )

    def _request(self, message: int, flags: int, body: bytes, harmless: int) -> None:
        try:
            self.route.request(message, flags, body)
        except OSError as error:
            if error.errno == harmless:
                return
            act = "put on" if message in (_RTM_NEWADDR, _RTM_NEWROUTE) else "taken off"
            raise EngineError(
                f"{self.address}/{self.prefix} cannot be {act} {self.interface}: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Close the socket, and `tidy` if there is reason to."""
        with suppress(EngineError):
            if self._bridged:
                self.tidy()
        self.route.close()


def undo(data: dict[str, Any]) -> None:
    """Do what a journal entry says. Doing it twice does no harm."""
    _do(data, data["act"])


def redo(data: dict[str, Any]) -> None:
    """Do again what a journal entry would undo, and tell the neighbours."""
    _do(data, "remove" if data["act"] == "add" else "add")


def _do(data: dict[str, Any], act: str) -> None:
    address = Address.prepare(data["address"], data["netns"])
    try:
        if act == "remove":
            address.remove()
            return
        address.add()
        announcer = Announcer.prepare(address.interface, [address.address], data["netns"])
        announcer.send()
        announcer.close()
    finally:
        address.close()

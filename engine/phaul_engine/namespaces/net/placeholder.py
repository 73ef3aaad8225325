"""A device that is a port of a bridge while another one cannot be: for a runtime that removes a bridge without ports.

It is an end of a veth pair that is down, so that nothing goes through it, and changes neither the bridge's address nor
its largest packet.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from phaul_engine.errors import RebuildError

from . import link
from .device import info
from .netlink import CREATE, EXCL, Namespace, attribute

_ADDRESS = b"\xfe\xff\xff"  # a bridge takes the lowest of its ports' for its own
_SELF = "/proc/self/ns/net"


def make_name() -> str:
    """One for such a device."""
    return f"ph{secrets.token_hex(4)}"


def occupy(name: str, bridge: str) -> None:
    """Make a pair with the end `name`, a port of a bridge. RebuildError if there is no such bridge, or that fails."""
    with _home() as home:
        master = link.read_link(home, name=bridge)
        if master is None:
            raise RebuildError(f"the bridge {bridge} is not here any more")
        body = link.head() + attribute(link.NAME, os.fsencode(name) + b"\0")
        body += attribute(link.ADDRESS, _ADDRESS + secrets.token_bytes(3))
        body += attribute(link.MTU, master.mtu.to_bytes(4, "little"))
        body += attribute(link.MASTER, master.index.to_bytes(4, "little")) + info("veth", b"")
        try:
            home.route.request(link.NEWLINK, CREATE | EXCL, body)
        except OSError as error:
            raise RebuildError(f"no device can be made that is a port of {bridge}: {error.strerror}") from error


def vacate(name: str) -> None:
    """Remove it, if it is there. OSError if that fails."""
    with _home() as home:
        found = link.read_link(home, name=name)
        if found is not None:
            link.delete(home, found.index)


@contextmanager
def _home() -> Iterator[Namespace]:
    net = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Namespace(net) as home:
            yield home
    finally:
        os.close(net)

"""Looks at a network namespace at the source, any number of times.

In the freeze only what can have changed without a word is read again: the kernel tells of changes of devices,
addresses, routes and rules through a socket that listens from the first look on, and of packet filters by a generation.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace

from phaul_engine.errors import EngineError
from phaul_engine.images.pb import netdev_pb2
from phaul_engine.network.interfaces import TAP_PREFIX
from phaul_engine.objects.base import Collection

from . import (
    addresses,
    bridge,
    conntrack,
    devices,
    ipset,
    iptables,
    link,
    neighbours,
    nftables,
    routes,
    sysctls,
    unsupported,
)
from .device import Source
from .link import Link
from .netlink import Namespace, Netlink
from .nftables import Ruleset
from .state import State
from .sysctls import Sysctls

# RTNLGRP_*: links, addresses, routes and rules of both families, next hops.
_GROUPS = (1, 5, 7, 8, 9, 11, 19, 32)


class Reader:
    """Reads one namespace. `number` is what it is called in images, `home` the engine's own; both descriptors are the
    reader's from now on."""

    def __init__(self, net: int, home: int, number: int) -> None:
        self._namespace, self._home = Namespace(net), Namespace(home)
        self._number = number
        self._changes = Netlink(net)
        self._changes.listen(_GROUPS)
        self._sysctls = Sysctls(self._namespace)
        self._usual = sysctls.usual_values()
        self._ruleset: tuple[int | None, Ruleset] | None = None
        self._legacy = [iptables.Tables(family, self._namespace) for family in iptables.FAMILIES]
        self._known_devices: set[tuple[int, str]] = set()
        self._values: dict[str, bytes] = {}
        self._last: State | None = None
        self._links: dict[int, Link] = {}

    @property
    def namespace(self) -> Namespace:
        """What it reads."""
        return self._namespace

    def close(self) -> None:
        """Close what is open."""
        self._changes.close()
        self._sysctls.close()
        for tables in self._legacy:
            tables.close()
        for namespace in (self._namespace, self._home):
            namespace.close()
            os.close(namespace.net)

    def read(self, collection: Collection) -> State:
        """How it is now. What cannot be carried goes to `collection.block`."""
        namespace = self._namespace
        changed = any(_matters(kind, body) for kind, body in self._changes.heard())
        if collection.survey or changed or self._last is None:
            self._last = self._look(collection)
        elif self._last.fleeting:
            self._read_paths(self._last)
        last = self._last
        self._read_sysctls(last)
        last.neighbours = neighbours.read(namespace)
        if any(one.kind in ("bridge", "vxlan") for one in self._links.values()):
            last.entries, last.vlans = bridge.read_entries(namespace), bridge.read_vlans(namespace)
        self._read_filters(last, collection)
        last.connections, last.expected = conntrack.read(namespace, self._sysctls.connections())
        return _copied(last)

    def _look(self, collection: Collection) -> State:
        """Devices, and how they are reached."""
        source = Source(self._namespace, self._home, self._number, link.read_links(self._namespace), collection)
        unsupported.judge(source)
        self._links, self._values = source.links, {}
        known = {(index, one.name) for index, one in source.links.items()}
        if known != self._known_devices:
            self._sysctls.refresh()
            self._known_devices = known
        state = State(devices=devices.collect(source), outside=source.outside)
        self._read_paths(state)
        return state

    def _read_paths(self, state: State) -> None:
        namespace = self._namespace
        state.addresses = addresses.read(namespace)
        families = (socket.AF_INET, socket.AF_INET6)
        state.routes, state.routes6 = (routes.read_routes(namespace, family) for family in families)
        state.rules, state.rules6 = (routes.read_rules(namespace, family) for family in families)
        state.hops = routes.read_hops(namespace)

    def _read_sysctls(self, state: State) -> None:
        values = self._sysctls.read()
        if values == self._values:
            return
        self._values = values
        state.entry = netdev_pb2.netns_entry()
        sysctls.describe(values, self._usual, state.entry)
        sysctls.describe_devices(values, self._usual, state.devices)

    def _read_filters(self, state: State, collection: Collection) -> None:
        """Packet filters, with the programs that tell them, where they changed."""
        try:
            generation = nftables.generation(self._namespace)
            if self._ruleset is None or self._ruleset[0] != generation:
                self._ruleset = generation, nftables.read(self._namespace)
            state.ruleset = self._ruleset[1]
            state.legacy = (self._legacy[0].read(), self._legacy[1].read())
            state.sets = ipset.save(self._namespace)
        except EngineError as error:
            where = f"the network namespace numbered {self._number}"
            collection.block(where, "packet filters that cannot be told", str(error), error.advice)


def _matters(kind: int, body: bytes) -> bool:
    """Whether a change is not one of the devices that packets are held with."""
    if kind in (link.NEWLINK, link.DELLINK):
        return not link.parse(body).name.startswith(TAP_PREFIX)
    return True


def _copied(state: State) -> State:
    """What is done to entries later (`kind`, `objects.tun`) is not to be remembered."""
    copies = []
    for device in state.devices:
        copy = netdev_pb2.net_device_entry()
        copy.CopyFrom(device)
        copies.append(copy)
    return replace(state, devices=copies)

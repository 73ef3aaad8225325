"""All that is carried of a network namespace, between the kernel and images, in both directions.

`reader` looks at a namespace at the source; `to_images` and `from_images` are the same as records; `Builder` makes it
at the destination, and later, in the freeze, brings what differs to its last state.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import netdev_pb2

from . import (
    addresses,
    bridge,
    conntrack,
    devices,
    ipset,
    iptables,
    neighbours,
    nftables,
    routes,
    sysctls,
)
from .device import Making
from .netlink import Message, pack_messages, unpack_messages
from .nftables import Ruleset
from .sysctls import Sysctls


@dataclass
class State:
    """A network namespace."""

    entry: netdev_pb2.netns_entry = field(default_factory=netdev_pb2.netns_entry)
    devices: list[netdev_pb2.net_device_entry] = field(default_factory=list)
    addresses: list[Message] = field(default_factory=list)
    routes: list[Message] = field(default_factory=list)
    routes6: list[Message] = field(default_factory=list)
    rules: list[Message] = field(default_factory=list)
    rules6: list[Message] = field(default_factory=list)
    hops: list[Message] = field(default_factory=list)
    neighbours: list[Message] = field(default_factory=list)
    entries: list[Message] = field(default_factory=list)
    vlans: list[Message] = field(default_factory=list)
    ruleset: Ruleset = field(default_factory=Ruleset)
    legacy: tuple[bytes, bytes] = (b"", b"")
    sets: bytes = b""
    connections: list[Message] = field(default_factory=list)
    expected: list[Message] = field(default_factory=list)
    outside: dict[int, int] = field(default_factory=dict)  # at the source: see Source

    @property
    def fleeting(self) -> bool:
        """Whether addresses or routes have a time to live, which passes without a word."""
        return any(map(addresses.fleeting, self.addresses)) or any(map(routes.fleeting, self.routes6))


def to_images(state: State, number: int, checkpoint: Checkpoint) -> None:
    """Put records into a checkpoint; raw images that would say nothing are left out."""
    entry = netdev_pb2.netns_entry()
    entry.CopyFrom(state.entry)
    for name, messages in (
        ("rules6", state.rules6),
        ("neighbours", state.neighbours),
        ("nexthops", state.hops),
        ("bridge_entries", state.entries),
        ("bridge_vlans", state.vlans),
    ):
        if messages:
            setattr(entry, name, pack_messages(messages))
    for family, text in state.ruleset.foreign:
        entry.iptables_nft.append(bytes([family]) + text)
    if state.sets:
        entry.ipsets = state.sets
    checkpoint.put("netns", number, entry)
    for device in state.devices:
        checkpoint.put("netdev", number, device)
    for kind, data in (
        ("ifaddr", addresses.to_image(state.addresses)),
        ("route", routes.routes_image(state.routes)),
        ("route6", routes.routes_image(state.routes6)),
        ("rule", routes.rules_image(state.rules)),
        ("iptables", state.legacy[0]),
        ("ip6tables", state.legacy[1]),
        ("nftables", state.ruleset.text),
        ("netns-ct", pack_messages(state.connections)),
        ("netns-exp", pack_messages(state.expected)),
    ):
        if data:
            checkpoint.put(kind, number, None, data)


def from_images(checkpoint: Checkpoint, number: int) -> State:
    """The opposite. `ImageError` for what makes no sense."""
    entry: netdev_pb2.netns_entry = checkpoint.one("netns", number)

    def raw(kind: str) -> bytes:
        return b"".join(record.payload for record in checkpoint.records(kind, number))

    state = State(entry, [record.message for record in checkpoint.records("netdev", number)])
    state.addresses = addresses.from_image(raw("ifaddr")) if raw("ifaddr") else []
    state.routes = routes.routes_from_image(raw("route")) if raw("route") else []
    state.routes6 = routes.routes_from_image(raw("route6")) if raw("route6") else []
    state.rules = routes.rules_from_image(raw("rule")) if raw("rule") else []
    state.rules6 = routes.rules_from_bytes(entry.rules6)
    for name, field_name in (
        ("neighbours", "neighbours"),
        ("hops", "nexthops"),
        ("entries", "bridge_entries"),
        ("vlans", "bridge_vlans"),
    ):
        setattr(state, name, unpack_messages(getattr(entry, field_name), f"the image of {field_name}"))
    foreign = tuple((one[0], one[1:]) for one in entry.iptables_nft if one)
    state.ruleset = Ruleset(nftables.without_lock(raw("nftables")), foreign)
    state.legacy = nftables.without_lock(raw("iptables")), nftables.without_lock(raw("ip6tables"))
    state.sets = entry.ipsets
    state.connections = unpack_messages(raw("netns-ct"), "the image of followed connections")
    state.expected = unpack_messages(raw("netns-exp"), "the image of expected connections")
    return state


@dataclass
class Builder:
    """Makes a namespace as a state says."""

    making: Making
    pending: list[netdev_pb2.net_device_entry] = field(default_factory=list)
    _sysctls: Sysctls = field(init=False)
    done: State | None = None

    def __post_init__(self) -> None:
        self._sysctls = Sysctls(self.making.namespace)

    def close(self) -> None:
        """Close what is open."""
        self._sysctls.close()

    def build(self, state: State) -> None:
        """Make everything, or what differs. Devices whose other end cannot be yet are left `pending`, and what needs
        them: it is to be called again."""
        making, namespace = self.making, self.making.namespace
        before = self.done
        if before is None or before.devices != state.devices or self.pending:
            self.pending = devices.apply(state.devices, making)
            self._sysctls.refresh()
        here = [device for device in state.devices if device not in self.pending]
        if before is None or before.devices != state.devices or before.entry != state.entry:
            self._configure(state, here)
        elif before is None or before.addresses != state.addresses:
            addresses.apply(namespace, [one for one in state.addresses if self._has(one, here)])
        if not self.pending:
            self._lead(state, before)
            self._filter(state, before)
            self.done = state

    def _configure(self, state: State, here: list[netdev_pb2.net_device_entry]) -> None:
        """Settings and flags. Nobody but the image says which addresses there are."""
        wanted, usual = sysctls.wanted_values(state.entry, here)
        sysctls.apply(self._sysctls, wanted, usual)
        devices.quiet(here, self.making)
        devices.raise_up(here, self.making)
        addresses.apply(self.making.namespace, [one for one in state.addresses if self._has(one, here)])
        devices.generate_addresses(here, self.making)
        sysctls.apply(self._sysctls, wanted, usual)

    @staticmethod
    def _has(message: Message, here: list[netdev_pb2.net_device_entry]) -> bool:
        return any(device.ifindex == addresses.index_of(message) for device in here)

    def _lead(self, state: State, before: State | None) -> None:
        """Where packets go. What depends on devices is looked at again when they changed: it may be gone with them."""
        namespace, old = self.making.namespace, before or State()
        anew = before is None or old.devices != state.devices or old.addresses != state.addresses
        if anew or (old.hops, old.routes, old.routes6) != (state.hops, state.routes, state.routes6):
            routes.apply_hops(namespace, state.hops)
            routes.apply_routes(namespace, state.routes, socket.AF_INET)
            routes.apply_routes(namespace, state.routes6, socket.AF_INET6)
        for family, rules, known in (
            (socket.AF_INET, state.rules, old.rules),
            (socket.AF_INET6, state.rules6, old.rules6),
        ):
            if rules and rules != known:
                routes.apply_rules(namespace, rules, family)
        if anew or old.neighbours != state.neighbours:
            neighbours.apply(namespace, state.neighbours)
        if (state.entries or state.vlans or old.entries or old.vlans) and (
            anew or (old.entries, old.vlans) != (state.entries, state.vlans)
        ):
            bridge.apply_vlans(namespace, state.vlans)
            bridge.apply_entries(namespace, state.entries)

    def _filter(self, state: State, before: State | None) -> None:
        """What packets pass."""
        namespace = self.making.namespace
        old = before or State()
        if state.sets != old.sets:
            ipset.restore(namespace, state.sets)
        if state.ruleset != old.ruleset:
            nftables.apply(namespace, state.ruleset)
        for family, text, known in zip(iptables.FAMILIES, state.legacy, old.legacy, strict=True):
            if text != known:
                family.restore(namespace, text)
        if state.connections != old.connections or state.expected != old.expected:
            conntrack.apply(namespace, state.connections, state.expected, old.connections)

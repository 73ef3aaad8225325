"""What a tree's networks need of another host: bridges, devices to stand on, kinds of devices, programs for filters.

Known from images; asked of a host before anything is touched there. A need is a few words that both hosts understand.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import netdev_pb2
from phaul_engine.objects import places

from . import devices, link, nftables, tools, tun
from .device import externals, info, is_known, kind_of_entry
from .netlink import CREATE, EXCL, Namespace, attribute

_BRIDGE, _DEVICE, _KIND, _PROGRAM = "a bridge ", "a network device ", "network devices of kind ", "the program "
_ALWAYS = ("loopback", "physical")
PLUGGED = "bridges of a runtime"
"""Option: whether a runtime makes the veth pairs there, and has said what it has their bridges be."""
_SELF = "/proc/self/ns/net"

assert devices  # registers the kinds


def needed(checkpoint: Checkpoint, options: Mapping[str, object]) -> dict[str, str]:
    """The needs of a tree, each with what of it has the need."""
    found: dict[str, str] = {}
    outers = externals(dict(options))
    for number in checkpoint.idents("netns"):
        entry = checkpoint.one("netns", number)
        for record in checkpoint.records("netdev", number):
            who = f"network device {os.fsdecode(record.message.name)}"
            for need in _of_device(record.message, outers):
                if not (need.startswith(_BRIDGE) and options.get(PLUGGED)):
                    found.setdefault(need, who)
        texts = {kind: checkpoint.has(kind, number) for kind in ("nftables", "iptables", "ip6tables")}
        programs = ["nft"] if texts["nftables"] or entry.iptables_nft else []
        programs += [f"{kind}-legacy-restore" for kind in ("iptables", "ip6tables") if texts[kind]]
        programs += [f"{nftables.SAVERS[one[0]]}-restore" for one in entry.iptables_nft if one[0] in nftables.SAVERS]
        programs += ["ipset"] if entry.ipsets else []
        for program in programs:
            found.setdefault(_PROGRAM + program, "its packet filter")
    return found


def _of_device(entry: netdev_pb2.net_device_entry, outers: Mapping[tuple[str, str], object]) -> Iterator[str]:
    kind = os.fsdecode(entry.kind) if entry.type == netdev_pb2.NAMED else kind_of_entry(entry).kind
    if kind not in _ALWAYS and is_known(kind):
        yield _KIND + kind
    if (kind, os.fsdecode(entry.name)) in outers or not entry.outer_name:
        return
    if entry.type == netdev_pb2.VETH and entry.outer_bridge:
        yield _BRIDGE + os.fsdecode(entry.outer_bridge)
    elif entry.type != netdev_pb2.VETH:
        yield _DEVICE + os.fsdecode(entry.outer_name)


def advice(need: str) -> str | None:
    """What to do about a need that this host does not meet; empty if it does, None if these words are of no need."""
    for head in (_BRIDGE, _DEVICE, _KIND, _PROGRAM):
        name = need.removeprefix(head)
        if name == need:
            continue
        if head == _PROGRAM:
            return "" if tools.find(name) else f"install {name} there"
        if head == _KIND:
            return "" if _makes(name) else f"load the module for {name} there (modprobe {name})"
        return "" if _has(name, bridge=head == _BRIDGE) else f"make {name} there, on the same network"
    return None


def _has(name: str, *, bridge: bool) -> bool:
    net = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Namespace(net) as home, suppress(OSError):  # no name of a device can be so long
            found = link.read_link(home, name=name)
            return found is not None and (not bridge or found.kind in ("bridge", "openvswitch"))
    finally:
        os.close(net)
    return False


def _makes(kind: str) -> bool:
    """Whether the kernel makes devices of a kind: asked in a namespace that ends with the question."""
    if not is_known(kind):
        return False
    if kind == "tun":
        return os.path.exists(tun.DEVICE)

    def ask() -> bool:
        net = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with Namespace(net) as fresh:
                body = link.head() + attribute(link.NAME, b"probe\0") + info(kind, b"")
                fresh.route.request(link.NEWLINK, CREATE | EXCL, body)
        except OSError as error:
            return error.errno != errno.EOPNOTSUPP
        finally:
            os.close(net)
        return True

    return places.in_new_network(ask)

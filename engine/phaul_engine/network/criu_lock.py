"""Lifting the lock that CRIU leaves behind with the connections it stores (its option --network-lock).

By default that is a rule of iptables for each direction of each connection, in the network namespace of the dump, which
CRIU deletes at the restore. What is known of them is what iptables-save(8) shows after a dump.
"""

from __future__ import annotations

import ipaddress
import shutil
import socket
import subprocess
from collections.abc import Iterator

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import sk_inet_pb2
from phaul_engine.objects import inet

_IPTABLES = (0, 1)  # inventory_entry.network_lock_method; 0 in images of before CRIU 3.18
_CONNECTED = frozenset((1, 4, 5, 8, 9, 11))  # linux/include/net/tcp_states.h
_MARK = "0xC114"  # of packets that CRIU lets pass
_SECONDS = 10


def lift(checkpoint: Checkpoint) -> None:
    """Delete the rules for the connections in CRIU's images; rules that are not there are not missed."""
    inventory = checkpoint.one("inventory")
    if inventory.phaul_lock or inventory.network_lock_method not in _IPTABLES:
        return
    for record in checkpoint.records("files"):
        isk = record.message.isk
        if record.message.HasField("isk") and isk.type == socket.SOCK_STREAM and isk.state in _CONNECTED:
            for command in _deletions(isk):
                subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS, stdin=subprocess.DEVNULL)


def _deletions(isk: sk_inet_pb2.inet_sk_entry) -> Iterator[list[str]]:
    here, there = (ipaddress.ip_address(inet.text(list(words), isk.family)) for words in (isk.src_addr, isk.dst_addr))
    if isinstance(here, ipaddress.IPv6Address) and isinstance(there, ipaddress.IPv6Address):
        here, there = here.ipv4_mapped or here, there.ipv4_mapped or there
    tool = shutil.which("iptables" if here.version == 4 else "ip6tables")
    if tool is None:
        return
    ends = ((str(here), isk.src_port), (str(there), isk.dst_port))
    for chain, (source, target) in (("OUTPUT", ends), ("INPUT", ends[::-1])):
        words = [tool, "-w", "-t", "filter", "-D", chain, "-p", "tcp", "-m", "mark", "!", "--mark", _MARK]
        words += ["-s", source[0], "--sport", str(source[1]), "-d", target[0], "--dport", str(target[1])]
        yield [*words, "-j", "DROP"]

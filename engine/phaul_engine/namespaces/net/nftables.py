"""nftables (nft(8)): tables of all families, as text that nft reads.

Rules that iptables-nft made use extensions which nft cannot write down; tables with such are told by iptables-nft
itself. Counters are those of the last time that the ruleset was read: in the freeze it is read again only if it was
changed, which the kernel tells by a generation.
"""

from __future__ import annotations

import errno
import re
import socket
import struct
from dataclasses import dataclass

from phaul_engine.errors import EngineError

from . import tools
from .netlink import NETLINK_NETFILTER, Namespace, attribute_list, attributes

_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_GET_TABLE, _GET_CHAIN, _GET_RULE, _GET_GENERATION = (_SUBSYSTEM | number for number in (1, 4, 7, 16))
_CHAIN_TABLE, _CHAIN_NAME = 1, 3  # NFTA_CHAIN_*
_TABLE_NAME, _TABLE_FLAGS, _OWNED = 1, 2, 2  # NFTA_TABLE_NAME, NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER
_RULE_TABLE, _RULE_EXPRESSIONS, _EXPRESSION_NAME = 1, 4, 1
_FOREIGN = (b"match", b"target")
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
SAVERS = {2: "iptables-nft", 10: "ip6tables-nft", 3: "arptables-nft", 7: "ebtables-nft"}
"""The iptables tools by family."""
_INCOMPATIBLE = b"is incompatible"
_WHAT = "nftables rules"
_LOCK = re.compile(
    rb"^\s*chain CRIU \{\n[^}]*\}\n|^[^\n#\"]* jump CRIU\n|^:CRIU [^\n]*\n|^-A CRIU [^\n]*\n|^-A \w+ -j CRIU\n",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Ruleset:
    """What nft tells, and what each of the iptables tools does, by family."""

    text: bytes = b""
    foreign: tuple[tuple[int, bytes], ...] = ()


def without_lock(text: bytes) -> bytes:
    """Rules, nft's or iptables', without those by which CRIU held all packets when it stored them."""
    return _LOCK.sub(b"", text)


def generation(namespace: Namespace) -> int | None:
    """It changes with every change of the ruleset. None where the kernel has no nftables."""
    try:
        answer = namespace.netlink(NETLINK_NETFILTER).ask(_GET_GENERATION, struct.pack("=BBH", 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL):
            return None
        raise
    return int.from_bytes(attributes(answer.body[4:]).get(1, b""), "big")


def _tables(namespace: Namespace) -> list[tuple[int, bytes, int]]:
    """Family, name and flags of all tables."""
    found = []
    for one in namespace.netlink(NETLINK_NETFILTER).dump(_GET_TABLE, struct.pack("=BBH", 0, 0, 0)):
        told = attributes(one.body[4:])
        flags = int.from_bytes(told.get(_TABLE_FLAGS, b""), "big")
        found.append((one.body[0], told[_TABLE_NAME].rstrip(b"\0"), flags))
    return found


def _foreign(namespace: Namespace) -> set[tuple[int, bytes]]:
    """The tables in which rules use extensions of iptables."""
    found = set()
    for one in namespace.netlink(NETLINK_NETFILTER).dump(_GET_RULE, struct.pack("=BBH", 0, 0, 0)):
        told = attributes(one.body[4:])
        for element in attribute_list(told.get(_RULE_EXPRESSIONS, b"")):
            name = attributes(element.value).get(_EXPRESSION_NAME, b"").rstrip(b"\0")
            if name in _FOREIGN:
                found.add((one.body[0], told[_RULE_TABLE].rstrip(b"\0")))
    return found


def read(namespace: Namespace) -> Ruleset:
    """All tables. `EngineError` if one cannot be told."""
    tables = _tables(namespace) if generation(namespace) is not None else []
    if not tables:
        return Ruleset()
    for family, name, flags in tables:
        if flags & _OWNED:
            raise EngineError(
                f"the nftables table {_spell(family, name)} belongs to a netlink socket",
                advice="stop the program that holds it; it makes the table anew",
            )
    foreign = _foreign(namespace)
    if not foreign:
        return Ruleset(tools.run(namespace, _WHAT, tools.need(_WHAT, "nft"), "list ruleset"))
    text = b""
    for family, name, _ in tables:
        if (family, name) not in foreign:
            text += tools.run(namespace, _WHAT, tools.need(_WHAT, "nft"), f"list table {_spell(family, name)}")
    return Ruleset(text, tuple((family, _save(namespace, family, name)) for family, name in sorted(foreign)))


def _spell(family: int, name: bytes) -> str:
    return f"{_FAMILIES.get(family, family)} {name.decode(errors='replace')}"


def _save(namespace: Namespace, family: int, name: bytes) -> bytes:
    tool = SAVERS.get(family)
    where = f"the table {_spell(family, name)}, which has rules of iptables"
    if tool is None:
        raise EngineError(f"{where}, cannot be told")
    program = tools.need(where, f"{tool}-save")
    words = ["-c"] if family == socket.AF_INET or family == socket.AF_INET6 else []
    text = tools.run(namespace, where, program, *words, *(["-t", name.decode()] if words else []))
    if _INCOMPATIBLE in text:
        raise EngineError(f"{where}, has rules of nft too: neither tool can tell it", advice="take one of the two")
    chains = _chains(namespace, family, name)
    lines = text.splitlines(keepends=True)  # it tells of the usual chains whether they are there or not
    return b"".join(line for line in lines if not line.startswith(b":") or line[1:].split()[0] in chains)


def _chains(namespace: Namespace, family: int, table: bytes) -> set[bytes]:
    found = set()
    for one in namespace.netlink(NETLINK_NETFILTER).dump(_GET_CHAIN, struct.pack("=BBH", family, 0, 0)):
        told = attributes(one.body[4:])
        if told[_CHAIN_TABLE].rstrip(b"\0") == table:
            found.add(told[_CHAIN_NAME].rstrip(b"\0"))
    return found


def apply(namespace: Namespace, wanted: Ruleset) -> None:
    """Have this ruleset and no other."""
    if generation(namespace) is None:
        if wanted != Ruleset():
            raise EngineError("the kernel here has no nftables", advice="load it (modprobe nf_tables)")
        return
    if not _tables(namespace) and wanted == Ruleset():
        return
    program = tools.need(_WHAT, "nft")
    tools.run(namespace, _WHAT, program, "-f", "-", given=b"flush ruleset\n" + wanted.text)
    for family, text in wanted.foreign:
        tool = SAVERS.get(family)
        if tool is None:
            raise EngineError(f"iptables rules of family {family} cannot be set")
        words = ["-c", "-n"] if family in (socket.AF_INET, socket.AF_INET6) else []
        tools.run(namespace, _WHAT, tools.need(_WHAT, f"{tool}-restore"), *words, given=text)

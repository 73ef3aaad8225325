"""The kinds of image files: names, magics, messages, and how long what follows a record is.

Names, magics and layout are those of CRIU 4.2. A kind that only older versions wrote is not in the table; such a file
is refused, not skipped.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf.message import Message

from phaul_engine.errors import ImageError
from phaul_engine.images.pb import (
    apparmor_pb2,
    autofs_pb2,
    binfmt_misc_pb2,
    bpfmap_data_pb2,
    bpfmap_file_pb2,
    cgroup_pb2,
    core_pb2,
    cpuinfo_pb2,
    fdinfo_pb2,
    fh_pb2,
    file_lock_pb2,
    fs_pb2,
    ghost_file_pb2,
    inventory_pb2,
    ipc_msg_pb2,
    ipc_sem_pb2,
    ipc_shm_pb2,
    ipc_var_pb2,
    memfd_pb2,
    mm_pb2,
    mnt_pb2,
    netdev_pb2,
    pagemap_pb2,
    pidfd_pb2,
    pidns_pb2,
    pipe_data_pb2,
    pstree_pb2,
    remap_file_path_pb2,
    seccomp_pb2,
    sk_packet_pb2,
    stats_pb2,
    tcp_stream_pb2,
    timens_pb2,
    tty_pb2,
    userns_pb2,
    utsns_pb2,
)

COMMON_MAGIC = 0x54564319
SERVICE_MAGIC = 0x55105940

Ident: TypeAlias = int | str | None


class Naming(enum.Enum):
    """What stands behind the stem in a file's name."""

    NONE = ""
    DECIMAL = "-%d"
    HEX = "-%x"
    WORD = "-%s"


class Rest(enum.Enum):
    """Payloads that are not told by a length field of the record."""

    TO_END = enum.auto()  # all that is left of the file
    MESSAGES = enum.auto()  # System V messages, each with a head of its own


PayloadRule: TypeAlias = Callable[[Any], "int | Rest"]


@dataclass(frozen=True)
class Kind:
    """A kind of image file.

    `message` is None for raw files: no magic, no records, all payload. `head` is the message of the first record
    where that differs. `single` kinds hold one record. `unique` names the fields that no two records may share (the
    description of a fifo is two records with one id: how it is open, and the file it stands for). `align` is what a
    payload is padded to.
    """

    stem: str
    magic: int
    message: type[Message] | None
    naming: Naming = Naming.NONE
    head: type[Message] | None = None
    single: bool = False
    unique: tuple[str, ...] = ()
    payload: PayloadRule | None = None
    align: int = 1
    service: bool = False
    suffix: str = ".img"

    def name(self, ident: Ident) -> str:
        """The file's name. `ImageError` if the ident is not of the form that the kind's names have."""
        match self.naming, ident:
            case Naming.NONE, None:
                return self.stem + self.suffix
            case Naming.DECIMAL | Naming.HEX, int() if 0 <= ident < 1 << 64:
                return f"{self.stem}{self.naming.value % ident}{self.suffix}"
            case Naming.WORD, str() if _WORD.fullmatch(ident):
                return f"{self.stem}{self.naming.value % ident}{self.suffix}"
        raise ImageError(f"{ident!r} cannot stand in the name of a {self.stem} image")

    def message_at(self, index: int, records: list[Any]) -> type[Message] | None:
        """The class of record `index`, given the messages before it; None where no record may be."""
        if self.single and index:
            return None
        if self.head is None or index == 0:
            return self.head or self.message
        if self.head is ghost_file_pb2.ghost_file_entry and not records[0].chunks:
            return None
        return self.message


_WORD = re.compile(r"[a-z]{1,32}")
_NUMBER = {Naming.DECIMAL: re.compile(r"0|[1-9][0-9]{0,19}"), Naming.HEX: re.compile(r"0|[1-9a-f][0-9a-f]{0,15}")}


def _ghost(message: Any) -> int | Rest:
    if isinstance(message, ghost_file_pb2.ghost_chunk_entry):
        return int(message.len)
    return 0 if message.chunks else Rest.TO_END


def _records(stem: str, magic: int, message: type[Message], **more: Any) -> Kind:
    return Kind(stem, magic, message, **more)


def _each(stem: str, magic: int, message: type[Message], **more: Any) -> Kind:
    """One file with one record for each process, thread or namespace."""
    return Kind(stem, magic, message, Naming.DECIMAL, single=True, **more)


def _several(stem: str, magic: int, message: type[Message], **more: Any) -> Kind:
    return Kind(stem, magic, message, Naming.DECIMAL, **more)


def _raw(stem: str, suffix: str = ".img") -> Kind:
    return Kind(stem, 0, None, Naming.DECIMAL, suffix=suffix)


_PIPE_DATA: dict[str, Any] = {"unique": ("pipe_id",), "payload": lambda m: int(m.bytes)}
_PAGEMAP = {"head": pagemap_pb2.pagemap_head}

KINDS: dict[str, Kind] = {
    kind.stem: kind
    for kind in (
        _records("inventory", 0x58313116, inventory_pb2.inventory_entry, single=True),
        _records("pstree", 0x50273030, pstree_pb2.pstree_entry, unique=("pid",)),
        _each("core", 0x55053847, core_pb2.core_entry),
        _each("ids", 0x54432030, core_pb2.task_kobj_ids_entry),
        _each("mm", 0x57492820, mm_pb2.mm_entry),
        _each("fs", 0x51403912, fs_pb2.fs_entry),
        _several("fdinfo", 0x56213732, fdinfo_pb2.fdinfo_entry, unique=("fd",)),
        _records("files", 0x56303138, fdinfo_pb2.file_entry, unique=("type", "id")),
        _several("pagemap", 0x56084025, pagemap_pb2.pagemap_entry, **_PAGEMAP),
        _several("pagemap-shmem", 0x56084025, pagemap_pb2.pagemap_entry, **_PAGEMAP),
        _raw("pages"),
        Kind(
            "ghost-file",
            0x52583605,
            ghost_file_pb2.ghost_chunk_entry,
            Naming.HEX,
            head=ghost_file_pb2.ghost_file_entry,
            payload=_ghost,
        ),
        Kind(
            "tcp-stream",
            0x51465506,
            tcp_stream_pb2.tcp_stream_entry,
            Naming.HEX,
            single=True,
            payload=lambda m: int(m.inq_len + m.outq_len),
        ),
        _records("sk-queues", 0x56264026, sk_packet_pb2.sk_packet_entry, payload=lambda m: int(m.length)),
        _records(
            "pipes-data", 0x56453709, pipe_data_pb2.pipe_data_entry, unique=("pipe_id",), payload=lambda m: m.bytes
        ),
        _records(
            "fifo-data", 0x59333054, pipe_data_pb2.pipe_data_entry, unique=("pipe_id",), payload=lambda m: m.bytes
        ),
        _records("tty-info", 0x59453036, tty_pb2.tty_info_entry, unique=("id",)),
        _records("tty-data", 0x59413026, tty_pb2.tty_data_entry),
        _records("remap-fpath", 0x59133954, remap_file_path_pb2.remap_file_path_entry),
        _records("memfd", 0x48453499, memfd_pb2.memfd_inode_entry, unique=("inode_id",)),
        _records("cgroup", 0x59383330, cgroup_pb2.cgroup_entry, single=True),
        _records("filelocks", 0x54323616, file_lock_pb2.file_lock_entry),
        _records("seccomp", 0x64413049, seccomp_pb2.seccomp_entry, single=True),
        _records("apparmor", 0x59423047, apparmor_pb2.apparmor_entry, single=True),
        _records("cpuinfo", 0x61404013, cpuinfo_pb2.cpuinfo_entry, single=True),
        _records("bpfmap-file", 0x57506142, bpfmap_file_pb2.bpfmap_file_entry),
        _records(
            "bpfmap-data",
            0x64324033,
            bpfmap_data_pb2.bpfmap_data_entry,
            unique=("map_id",),
            payload=lambda m: int(m.keys_bytes + m.values_bytes),
        ),
        _records("pidfd", 0x54435556, pidfd_pb2.pidfd_entry),
        _records("binfmt-misc", 0x67343323, binfmt_misc_pb2.binfmt_misc_entry),
        _several("autofs", 0x49353943, autofs_pb2.autofs_entry),
        _each("utsns", 0x54473203, utsns_pb2.utsns_entry),
        _each("timens", 0x43114433, timens_pb2.timens_entry),
        _each("pidns", 0x61157326, pidns_pb2.pidns_entry),
        _each("userns", 0x55474906, userns_pb2.userns_entry),
        _each("ipcns-var", 0x53115007, ipc_var_pb2.ipc_var_entry),
        _several(
            "ipcns-shm",
            0x46283044,
            ipc_shm_pb2.ipc_shm_entry,
            payload=lambda m: 0 if m.in_pagemaps else int(m.size),
            align=4,
        ),
        _several("ipcns-msg", 0x55453737, ipc_msg_pb2.ipc_msg_entry, payload=lambda m: Rest.MESSAGES),
        _several("ipcns-sem", 0x59573019, ipc_sem_pb2.ipc_sem_entry, payload=lambda m: 2 * int(m.nsems), align=8),
        _several("mountpoints", 0x55563928, mnt_pb2.mnt_entry, unique=("mnt_id",)),
        _several("netdev", 0x57373951, netdev_pb2.net_device_entry),
        _each("netns", 0x55933752, netdev_pb2.netns_entry),
        *(_raw(stem) for stem in ("ifaddr", "route", "route6", "rule", "iptables", "ip6tables", "nftables")),
        *(_raw(stem) for stem in ("netns-ct", "netns-exp")),
        *(_raw(stem, ".tar.gz.img") for stem in ("tmpfs", "tmpfs-dev")),
        Kind("stats", 0x57093306, stats_pb2.stats_entry, Naming.WORD, single=True, service=True, suffix=""),
        Kind("irmap-cache", 0x57004059, fh_pb2.irmap_cache_entry, service=True, suffix=""),
    )
}


def kind_of(stem: str) -> Kind:
    """The kind with this stem; `ImageError` if there is none."""
    kind = KINDS.get(stem)
    if kind is None:
        raise ImageError(f"there is no kind of image called {stem!r}")
    return kind


def parse_name(name: str) -> tuple[Kind, Ident] | None:
    """Kind and ident of a file by its name; None for a name that is no image's.

    A name that ends in .img but is of no known kind raises `ImageError`: what is in it would be lost silently.
    """
    for suffix in (".tar.gz.img", ".img", ""):
        if not name.endswith(suffix):
            continue
        whole = name[: len(name) - len(suffix)]
        stem, _, tail = whole.rpartition("-")
        for kind, text in ((KINDS.get(whole), None), (KINDS.get(stem), tail)):
            if kind is not None and kind.suffix == suffix and _names(kind, text):
                return kind, _ident(kind, text)
    if name.endswith(".img"):
        raise ImageError(f"there is no kind of image called {name!r}", advice="it may be of another version of CRIU")
    return None


def _names(kind: Kind, text: str | None) -> bool:
    """Whether `text` is what stands behind the stem in names of this kind, in its one canonical spelling."""
    if text is None or kind.naming is Naming.NONE:
        return text is None and kind.naming is Naming.NONE
    pattern = _WORD if kind.naming is Naming.WORD else _NUMBER[kind.naming]
    return pattern.fullmatch(text) is not None and (kind.naming is Naming.WORD or _number(kind, text) < 1 << 64)


def _ident(kind: Kind, text: str | None) -> Ident:
    return text if text is None or kind.naming is Naming.WORD else _number(kind, text)


def _number(kind: Kind, text: str) -> int:
    return int(text, 10 if kind.naming is Naming.DECIMAL else 16)

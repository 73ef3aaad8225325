"""The disks of a container: directories with a ploop image (OpenVZ 7) or files in qcow2 (OpenVZ 9), or no image at all.

An image is a block device, which one kernel alone may have mounted, so it never moves as it is: the file system in it
does. What is read here says whether one can be made like it: ploop's DiskDescriptor.xml (prl-xml in QEMU's interop
documents) and the header of qcow2 (qcow2 there).
"""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from phaul.errors import PhaulError

from . import config

Format: TypeAlias = Literal["ploop", "qcow2"]

DESCRIPTOR = "DiskDescriptor.xml"
ROOT = "root.hdd"
_DESCRIPTOR_MAX = 1 << 20  # bytes
_SECTOR = 512
_TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
_NOBODY = "{00000000-0000-0000-0000-000000000000}"
_QCOW2 = struct.Struct(">4sIQIIQIIQQIIQ")  # up to snapshots_offset
_MAGIC = b"QFI\xfb"


@dataclass(frozen=True)
class Disk:
    """A disk. `path` is what its parameter in the configuration names, below the private area where it is relative;
    `size` in bytes; `images` are the files of it, the writable one last; `block` is the size of a cluster in bytes."""

    path: str
    format: Format
    size: int
    images: tuple[str, ...]
    block: int
    encrypted: bool = False
    snapshots: int = 0
    mounted_at: str = ""  # inside; empty for the root

    @property
    def root(self) -> bool:
        """Whether the container's root is on it."""
        return not self.mounted_at


def of(private: str, parameters: Mapping[str, str]) -> Iterator[Disk]:
    """The disks that a configuration names, and the root one that every private area with images has. PhaulError for
    what cannot be read."""
    named = [one for one in config.disks(parameters.get("DISK", "")) if one.get("enabled") != "no"]
    ctid = parameters.get("VEID", "")
    found = {str(Path(private, config.expand(one.get("path", ""), ctid))): one.get("mnt", "") for one in named}
    root = str(Path(private, ROOT))
    if root not in found and Path(root).exists():
        found = {root: "", **found}
    for path, inside in found.items():
        yield _read(Path(path), "" if path == root else inside or "/")


def _read(path: Path, mounted_at: str) -> Disk:
    if path.is_dir():
        return ploop(path, _content(path / DESCRIPTOR), mounted_at)
    return qcow2(path, mounted_at)


def ploop(path: Path, content: bytes, mounted_at: str = "") -> Disk:
    """A ploop image by its descriptor; PhaulError for one that this is not."""
    where = path / DESCRIPTOR
    try:
        tree = ET.fromstring(content)
        size = _number(tree, "Disk_Parameters/Disk_size") * _SECTOR
        block = _number(tree, "StorageData/Storage/Blocksize") * _SECTOR
        images = [
            (one.findtext("GUID", ""), one.findtext("File", "")) for one in tree.iterfind("StorageData/Storage/Image")
        ]
    except (ET.ParseError, ValueError) as error:
        raise PhaulError(f"{where} is no description of a disk: {error}") from error
    shots = {one.findtext("GUID", ""): one.findtext("ParentGUID", "") for one in tree.iterfind("Snapshots/Shot")}
    chain: list[str] = []
    guid = tree.findtext("Snapshots/TopGUID", _TOP)
    while guid in shots and len(chain) <= len(shots):
        chain.append(guid)
        guid = shots[guid]
    if guid != _NOBODY or len(chain) > len(shots):
        raise PhaulError(f"{where} does not lead from the top of the disk to its base")
    files = dict(images)
    if not set(chain) <= files.keys():
        raise PhaulError(f"{where} names no file for a part of the disk")
    key = tree.findtext("Disk_Parameters/Encryption/KeyId") or ""
    ordered = tuple(str(path / files[one]) for one in reversed(chain))
    return Disk(str(path), "ploop", size, ordered, block, bool(key), len(shots) - 1, mounted_at)


def qcow2(path: Path, mounted_at: str = "") -> Disk:
    """A qcow2 image by its header; PhaulError for a file that is none."""
    try:
        with open(path, "rb") as file:
            content = file.read(_QCOW2.size)
    except OSError as error:
        raise PhaulError(f"{path}: {error.strerror}") from error
    if len(content) < _QCOW2.size or content[:4] != _MAGIC:
        raise PhaulError(f"{path} is no disk in qcow2")
    _, version, backing, _, bits, size, crypt, _, _, _, _, snapshots, _ = _QCOW2.unpack(content)
    if version not in (2, 3) or not 9 <= bits <= 21:
        raise PhaulError(f"{path} is a disk in a version of qcow2 that is not known ({version})")
    if backing:
        raise PhaulError(f"{path} is a difference to another image", advice="have it as one image: qemu-img convert")
    return Disk(str(path), "qcow2", size, (str(path),), 1 << bits, bool(crypt), snapshots, mounted_at)


def _number(tree: ET.Element, path: str) -> int:
    value = int(tree.findtext(path, ""))
    if not 0 < value < 1 << 40:
        raise ValueError(f"{path} is {value}")
    return value


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_DESCRIPTOR_MAX + 1)
    except OSError as error:
        raise PhaulError(f"{path}: {error.strerror}") from error
    if len(content) > _DESCRIPTOR_MAX or b"<!DOCTYPE" in content:  # entities
        raise PhaulError(f"{path} is no description of a disk")
    return content

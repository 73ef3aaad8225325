"""Disks of containers, by descriptions as the formats' documents have them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from phaul.errors import PhaulError
from phaul.workloads.openvz import disks

TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
BASE = "{12345678-9abc-def1-2345-6789abcdef12}"
NOBODY = "{00000000-0000-0000-0000-000000000000}"


def description(*shots: tuple[str, str], top: str = "", key: str = "") -> bytes:
    """A disk of 10 GiB with these images, each with its parent, as ploop writes it."""
    images = "".join(
        f"<Image><GUID>{guid}</GUID><Type>Compressed</Type><File>root.hds.{number}</File></Image>"
        for number, (guid, _) in enumerate(shots)
    )
    chain = "".join(f"<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>" for guid, parent in shots)
    secret = f"<Encryption><KeyId>{key}</KeyId></Encryption>" if key else ""
    return f"""<?xml version="1.0"?>
<Parallels_disk_image Version="1.0">
  <Disk_Parameters><Disk_size>20971520</Disk_size><Cylinders>10240</Cylinders><Heads>16</Heads><Sectors>128</Sectors>
    <Padding>0</Padding>{secret}</Disk_Parameters>
  <StorageData><Storage><Start>0</Start><End>20971520</End><Blocksize>2048</Blocksize>{images}</Storage></StorageData>
  <Snapshots>{f"<TopGUID>{top}</TopGUID>" if top else ""}{chain}</Snapshots>
</Parallels_disk_image>
""".encode()


def header(
    *, version: int = 3, backing: int = 0, bits: int = 16, size: int = 10 << 30, crypt: int = 0, snapshots: int = 0
) -> bytes:
    """The first bytes of a qcow2 image of 10 GiB."""
    tables = (20, 0x30000, 0x10000, 1)
    magic = b"QFI\xfb"
    return struct.pack(">4sIQIIQIIQQIIQ", magic, version, backing, 0, bits, size, crypt, *tables, snapshots, 0)


def test_a_ploop_image() -> None:
    disk = disks.ploop(Path("/vz/private/101/root.hdd"), description((TOP, NOBODY)))
    assert (disk.size, disk.block, disk.snapshots, disk.encrypted, disk.root) == (10 << 30, 1 << 20, 0, False, True)
    assert disk.images == ("/vz/private/101/root.hdd/root.hds.0",)


def test_snapshots_are_told_from_the_base_to_the_top() -> None:
    disk = disks.ploop(Path("/d"), description((BASE, NOBODY), (TOP, BASE)))
    assert (disk.images, disk.snapshots) == (("/d/root.hds.0", "/d/root.hds.1"), 1)
    other = "{aaaaaaaa-9abc-def1-2345-6789abcdef12}"
    disk = disks.ploop(Path("/d"), description((TOP, BASE), (BASE, NOBODY), (other, BASE), top=other))
    assert disk.images == ("/d/root.hds.1", "/d/root.hds.2")
    assert disks.ploop(Path("/d"), description((TOP, NOBODY), key="k")).encrypted


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<x/>",
        b"\x00",
        description(),
        description((TOP, BASE)),  # its parent is not there
        description((TOP, BASE), (BASE, TOP)),  # a circle
        description((BASE, NOBODY)),  # no top
        description((TOP, NOBODY), top=BASE),
        description((TOP, NOBODY)).replace(b"20971520", b"-1"),
        description((TOP, NOBODY)).replace(b"2048", b"many"),
    ],
)
def test_descriptions_that_are_none(content: bytes) -> None:
    with pytest.raises(PhaulError):
        disks.ploop(Path("/d"), content)


def test_a_description_with_entities_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "root.hdd").mkdir()
    bomb = b'<!DOCTYPE x [<!ENTITY a "aa">]>' + description((TOP, NOBODY))
    (tmp_path / "root.hdd" / "DiskDescriptor.xml").write_bytes(bomb)
    with pytest.raises(PhaulError, match="no description"):
        list(disks.of(str(tmp_path), {}))


def test_a_qcow2_image(tmp_path: Path) -> None:
    (tmp_path / "root.hdd").write_bytes(header(snapshots=2))
    (disk,) = disks.of(str(tmp_path), {"VEID": "101"})
    assert (disk.format, disk.size, disk.block, disk.snapshots) == ("qcow2", 10 << 30, 1 << 16, 2)


@pytest.mark.parametrize(
    "content",
    [b"", b"QFI\xfb", header()[:-1], header(version=1), header(version=4), header(bits=8), header(backing=0x200)],
)
def test_qcow2_images_that_are_not_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "disk").write_bytes(content)
    with pytest.raises(PhaulError):
        disks.qcow2(tmp_path / "disk")


def test_disks_that_a_configuration_names(tmp_path: Path) -> None:
    for name in ("root.hdd", "data-101"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "DiskDescriptor.xml").write_bytes(description((TOP, NOBODY)))
    value = "enabled=yes,size=102400,path=data-$VEID,mnt=/home;enabled=no,path=gone"
    found = list(disks.of(str(tmp_path), {"DISK": value, "VEID": "101"}))
    assert [(disk.path, disk.mounted_at, disk.root) for disk in found] == [
        (str(tmp_path / "root.hdd"), "", True),
        (str(tmp_path / "data-101"), "/home", False),
    ]

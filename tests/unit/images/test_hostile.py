"""Images that somebody made to do harm, or that are merely broken: each is refused, and nothing is touched."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from phaul_engine.errors import ImageError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.directory import MAX_FILE, ImageDirectory
from phaul_engine.images.framing import head_of
from phaul_engine.images.kinds import KINDS
from phaul_engine.images.pages import PageImages

from tests.unit.images.checkpoints import PID, complete, save

U32 = struct.Struct("<I")
INVENTORY = bytes.fromhex("0802")  # img_version: 2


def image(stem: str, *records: bytes, tail: bytes = b"") -> bytes:
    """A file of a kind with these messages."""
    return head_of(KINDS[stem]) + b"".join(U32.pack(len(record)) + record for record in records) + tail


def pagemap(*entries: bytes) -> bytes:
    """A pagemap for pages-1.img."""
    return image("pagemap", b"\x08\x01", *entries)


def varint(number: int) -> bytes:
    """A number as protobuf has it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def run(vaddr: int, pages: int, flags: int | None = 4, compat: int = 0) -> bytes:
    """A pagemap_entry."""
    body = b"\x08" + varint(vaddr) + b"\x10" + varint(compat) + b"\x28" + varint(pages)
    return body if flags is None else body + b"\x20" + varint(flags)


CORE_WITHOUT_TYPE = b""
PSTREE = bytes.fromhex("0801 1000 1801 2001 2801")
FDINFO = bytes.fromhex("0801 1000 1801 2000")
PIPE_DATA = bytes.fromhex("0801 1003")
GHOST = bytes.fromhex("0800 1000 1800")
GHOST_IN_CHUNKS = GHOST + b"\x48\x01"
TCP = bytes.fromhex("0802 1000 1803 2000 2800 3000 3800")
PACKET = bytes.fromhex("0801 1005")
BPF = bytes.fromhex("0801 1004 1804 2001")
DESC = bytes.fromhex("0800 1000 1800 2000 2800 3000 3800")
IPC = b"\x0a" + bytes([len(DESC)]) + DESC
HUGE = varint((1 << 64) - 1)

FILES: dict[str, tuple[str, bytes]] = {
    "empty file": ("inventory.img", b""),
    "half a magic": ("inventory.img", b"\x16\x31"),
    "only the common magic": ("core-1.img", U32.pack(0x54564319)),
    "magic of another kind": ("core-1.img", image("files")),
    "inventory with a common magic": ("inventory.img", U32.pack(0x54564319) + image("inventory", INVENTORY)),
    "core without a common magic": ("core-1.img", U32.pack(0x55053847)),
    "service magic on an image": ("pstree.img", struct.pack("<2I", 0x55105940, 0x50273030) + U32.pack(0)),
    "common magic on statistics": ("stats-dump", struct.pack("<2I", 0x54564319, 0x57093306)),
    "big-endian magic": ("inventory.img", struct.pack(">I", 0x58313116)),
    "text": ("files.img", b"#!/bin/sh\nrm -rf /\n"),
    "no record where one must be": ("inventory.img", image("inventory")),
    "no head of a pagemap": ("pagemap-1.img", image("pagemap")),
    "half a length": ("pstree.img", image("pstree", tail=b"\x01\x00")),
    "length beyond the end": ("pstree.img", image("pstree", tail=U32.pack(5) + b"ab")),
    "length of four gigabytes": ("pstree.img", image("pstree", tail=U32.pack(0xFFFFFFFF))),
    "negative length": ("core-1.img", image("core", tail=U32.pack(0x80000000))),
    "second record truncated": ("pstree.img", image("pstree", PSTREE, tail=U32.pack(9))),
    "second inventory": ("inventory.img", image("inventory", INVENTORY, INVENTORY)),
    "second core": ("core-1.img", image("core", b"\x08\x01", b"\x08\x01")),
    "noise after the record": ("inventory.img", image("inventory", INVENTORY, tail=b"\0")),
    "message without a required field": ("core-1.img", image("core", CORE_WITHOUT_TYPE)),
    "nested message without required fields": ("core-1.img", image("core", b"\x08\x01\x12\x00")),
    "unknown machine": ("core-1.img", image("core", b"\x08\x63")),
    "registers of another architecture": ("core-1.img", image("core", b"\x08\x03\x42\x00")),
    "unknown field": ("inventory.img", image("inventory", INVENTORY + b"\xf8\x07\x01")),
    "unknown enumerator": ("inventory.img", image("inventory", INVENTORY + b"\x30\x63")),
    "unknown type of descriptor": ("fdinfo-1.img", image("fdinfo", bytes.fromhex("0801 1000 1863 2000"))),
    "field of a wrong wire type": ("inventory.img", image("inventory", b"\x0a\x01\x02")),
    "string longer than its message": ("core-1.img", image("core", b"\x08\x01\x1a\x7f")),
    "varint without an end": ("inventory.img", image("inventory", b"\x08" + b"\xff" * 12)),
    "field number zero": ("inventory.img", image("inventory", INVENTORY + b"\x00\x00")),
    "group without an end": ("inventory.img", image("inventory", INVENTORY + b"\x0b")),
    "cgroups nested without end": (
        "cgroup.img",
        image("cgroup", b"\x12\x80\x20" + b"".join(b"\x12" + varint(4096 - 3 * n) for n in range(1, 1300))),
    ),
    "process twice": ("pstree.img", image("pstree", PSTREE, PSTREE)),
    "descriptor twice": ("fdinfo-1.img", image("fdinfo", FDINFO, FDINFO)),
    "pipe longer than the file": ("pipes-data.img", image("pipes-data", PIPE_DATA, tail=b"ab")),
    "pipe of four gigabytes": ("pipes-data.img", image("pipes-data", b"\x08\x01\x10\xff\xff\xff\xff\x0f")),
    "pipe twice": ("pipes-data.img", image("pipes-data", PIPE_DATA, tail=b"abc") + image("fs", PIPE_DATA)[8:] + b"abc"),
    "fifo longer than the file": ("fifo-data.img", image("fifo-data", PIPE_DATA, tail=b"a")),
    "socket queue cut short": ("sk-queues.img", image("sk-queues", PACKET, tail=b"1234")),
    "stream cut short": ("tcp-stream-1.img", image("tcp-stream", TCP, tail=b"1234")),
    "stream too long": ("tcp-stream-1.img", image("tcp-stream", TCP, tail=b"123456")),
    "stream without a record": ("tcp-stream-1.img", image("tcp-stream")),
    "ghost without a record": ("ghost-file-1.img", image("ghost-file")),
    "ghost in chunks with noise": ("ghost-file-1.img", image("ghost-file", GHOST_IN_CHUNKS, tail=b"abc")),
    "ghost chunk cut short": ("ghost-file-1.img", image("ghost-file", GHOST_IN_CHUNKS, b"\x08\x08\x10\x00", tail=b"1")),
    "ghost chunk of 16 exabytes": (
        "ghost-file-1.img",
        image("ghost-file", GHOST_IN_CHUNKS, b"\x08" + HUGE + b"\x10\x00"),
    ),
    "BPF map cut short": ("bpfmap-data.img", image("bpfmap-data", BPF, tail=b"1234567")),
    "semaphores cut short": ("ipcns-sem-1.img", image("ipcns-sem", IPC + b"\x10\x05", tail=b"12345678")),
    "semaphores without padding": ("ipcns-sem-1.img", image("ipcns-sem", IPC + b"\x10\x01", tail=b"12")),
    "four billion semaphores": ("ipcns-sem-1.img", image("ipcns-sem", IPC + b"\x10\xff\xff\xff\xff\x0f")),
    "shared memory cut short": ("ipcns-shm-1.img", image("ipcns-shm", IPC + b"\x10\x80\x20", tail=bytes(4095))),
    "shared memory of 16 exabytes": ("ipcns-shm-1.img", image("ipcns-shm", IPC + b"\x10" + HUGE)),
    "System V message missing": ("ipcns-msg-1.img", image("ipcns-msg", IPC + b"\x10\x00\x18\x01")),
    "four billion System V messages": (
        "ipcns-msg-1.img",
        image("ipcns-msg", IPC + b"\x10\x00\x18\xff\xff\xff\xff\x0f"),
    ),
    "System V message cut short": (
        "ipcns-msg-1.img",
        image("ipcns-msg", IPC + b"\x10\x00\x18\x01", tail=U32.pack(4) + b"\x08\x01\x10\x09" + bytes(9)),
    ),
    "kind that nobody knows": ("exploit.img", b""),
    "kind of an old version": ("sigacts-1.img", b""),
    "image without its ident": ("core.img", image("core", b"\x08\x01")),
    "ident where there is none": ("files-1.img", image("files")),
    "ident with a leading zero": ("core-01.img", image("core", b"\x08\x01")),
    "negative ident": ("core--1.img", image("core", b"\x08\x01")),
    "ident of 65 bits": ("core-18446744073709551616.img", image("core", b"\x08\x01")),
    "ident in capitals": ("tcp-stream-A.img", image("tcp-stream", TCP, tail=b"12345")),
    "ident with an Arabic digit": ("core-\u0661.img", image("core", b"\x08\x01")),
}

PAGEMAPS: dict[str, bytes] = {
    "page at an odd address": pagemap(run(0x400001, 1)),
    "run of no pages": pagemap(run(0x400000, 0)),
    "run beyond the address space": pagemap(run((1 << 64) - 4096, 2)),
    "run of more pages than there are": pagemap(run(0x400000, (1 << 64) - 1)),
    "runs out of order": pagemap(run(0x402000, 1), run(0x400000, 1)),
    "runs that overlap": pagemap(run(0x400000, 2), run(0x401000, 1)),
    "the same run twice": pagemap(run(0x400000, 1), run(0x400000, 1)),
    "two page counts that differ": pagemap(run(0x400000, 1, compat=2)),
    "pages that are nowhere": pagemap(run(0x400000, 1, flags=0)),
    "pages of a lazy server": pagemap(run(0x400000, 1, flags=2)),
    "pages both here and there": pagemap(run(0x400000, 1, flags=5)),
    "unknown flag": pagemap(run(0x400000, 1, flags=12)),
    "more pages than the file": pagemap(run(0x400000, 3)),
    "more pages than any file": pagemap(run(0, 1 << 51)),
    "pages in a parent that is not there": pagemap(run(0x400000, 1, flags=1)),
    "pages file that is not there": image("pagemap", b"\x08\x07", run(0x400000, 1)),
    "two heads": pagemap(b"\x08\x01"),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with a checkpoint that is complete, beside something that must not change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "victim").write_bytes(b"precious")
    path = tmp_path / "images"
    path.mkdir()
    save(complete(), path)
    return path


def snapshot(path: Path) -> dict[str, tuple[int, bytes]]:
    """All that is under a directory: types and contents."""
    found = {}
    for root, directories, files in os.walk(path):
        for name in directories + files:
            one = Path(root, name)
            mode = one.lstat().st_mode
            link = os.readlink(one).encode() if one.is_symlink() else b""
            found[str(one)] = (mode, link or (one.read_bytes() if one.is_file() else b""))
    return found


def find_pages(images: Path) -> None:
    """Look for the pages of the process."""
    with PageImages(images) as source:
        source.extents("pagemap", PID)


def refused(images: Path, *, pages: bool = False) -> None:
    """Loading, or looking for the pages, is refused, and changes nothing."""
    before = snapshot(images.parent)
    with pytest.raises(ImageError):
        find_pages(images) if pages else Checkpoint.load(images)
    assert snapshot(images.parent) == before


def test_what_is_broken_here_is_whole_otherwise(images: Path) -> None:
    assert Checkpoint.load(images).has("core", PID)
    with PageImages(images) as source:
        assert len(source.extents("pagemap", PID)) == 1


@pytest.mark.parametrize("name", FILES)
def test_file(name: str, images: Path) -> None:
    file, content = FILES[name]
    (images / file).write_bytes(content)
    refused(images)


@pytest.mark.parametrize("name", PAGEMAPS)
def test_pagemap(name: str, images: Path) -> None:
    (images / f"pagemap-{PID}.img").write_bytes(PAGEMAPS[name])
    refused(images, pages=True)


def replace(images: Path, name: str, make: Callable[[Path], None]) -> None:
    """Put something else where an image was."""
    (images / name).unlink()
    make(images / name)


def test_link_to_a_file_outside(images: Path) -> None:
    replace(images, "pstree.img", lambda path: path.symlink_to("../outside/victim"))
    refused(images)


def test_link_to_a_file_inside(images: Path) -> None:
    (images / "other").write_bytes((images / "pstree.img").read_bytes())
    replace(images, "pstree.img", lambda path: path.symlink_to("other"))
    refused(images)


def test_link_through_proc(images: Path) -> None:
    replace(images, "files.img", lambda path: path.symlink_to("/proc/self/fd/0"))
    refused(images)


def test_pages_through_a_link(images: Path) -> None:
    replace(images, "pages-1.img", lambda path: path.symlink_to("/dev/zero"))
    refused(images, pages=True)


def test_fifo_in_place_of_an_image(images: Path) -> None:
    replace(images, "pstree.img", os.mkfifo)
    refused(images)


def test_directory_in_place_of_an_image(images: Path) -> None:
    replace(images, "pstree.img", Path.mkdir)
    refused(images)


def test_image_too_large_to_be_read(images: Path) -> None:
    with (images / "files.img").open("r+b") as file:
        file.truncate(MAX_FILE + 1)  # sparse
    with pytest.raises(ImageError):
        Checkpoint.load(images)


@pytest.mark.parametrize("target", ["/tmp", ".", "../images", "../outside", "../missing", "link", "pstree.img"])
def test_parent_that_leads_astray(target: str, images: Path) -> None:
    (images / "link").symlink_to("../outside")
    (images / "parent").symlink_to(target)
    (images / f"pagemap-{PID}.img").write_bytes(PAGEMAPS["pages in a parent that is not there"])
    refused(images, pages=True)


def test_parent_that_is_no_link(images: Path) -> None:
    (images / "parent").mkdir()
    (images / f"pagemap-{PID}.img").write_bytes(PAGEMAPS["pages in a parent that is not there"])
    refused(images, pages=True)


def test_parents_without_end(images: Path) -> None:
    (images / f"pagemap-{PID}.img").write_bytes(PAGEMAPS["pages in a parent that is not there"])
    previous = images
    for number in range(300):
        (images.parent / str(number)).mkdir()
        (images.parent / str(number) / f"pagemap-{PID}.img").write_bytes((images / f"pagemap-{PID}.img").read_bytes())
        (previous / "parent").symlink_to(f"../{number}")
        previous = images.parent / str(number)
    refused(images, pages=True)


def test_saving_does_not_write_through_links(images: Path) -> None:
    victim = images.parent / "outside" / "victim"
    replace(images, "pstree.img", lambda path: path.symlink_to(victim))
    (images / ".files.img.new").symlink_to(victim)
    (images / "pages-2.img").symlink_to(victim)
    complete().save(images)
    with ImageDirectory(images) as directory:
        os.close(directory.create("pages-2.img"))
    assert victim.read_bytes() == b"precious"
    assert not (images / "pstree.img").is_symlink()


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        Checkpoint.load(tmp_path / "missing")


PIECES: dict[str, bytes] = {
    "nothing": b"",
    "another signature": b"phaulck9",
    "half a head": b"phaulck1" + bytes(5),
    "name without end": b"phaulck1" + struct.pack("<IQ", 4, 0) + b"abc",
    "empty name": b"phaulck1" + struct.pack("<IQ", 0, 0),
    "name of 4 gigabytes": b"phaulck1" + struct.pack("<IQ", 0xFFFFFFFF, 0),
    "contents of 16 exabytes": b"phaulck1" + struct.pack("<IQ", 9, (1 << 64) - 1) + b"files.img",
    "path as a name": b"phaulck1" + struct.pack("<IQ", 12, 0) + b"../files.img",
    "name that is no image's": b"phaulck1" + struct.pack("<IQ", 6, 0) + b"parent",
    "name that is not ASCII": b"phaulck1" + struct.pack("<IQ", 2, 0) + b"\xff\xfe",
    "file twice": b"phaulck1" + (struct.pack("<IQ", 10, 8) + b"pstree.img" + image("pstree")) * 2,
    "malformed contents": b"phaulck1" + struct.pack("<IQ", 10, 1) + b"pstree.img" + b"x",
}


@pytest.mark.parametrize("name", PIECES)
def test_checkpoint_in_one_piece(name: str) -> None:
    with pytest.raises(ImageError):
        Checkpoint.from_bytes(PIECES[name])

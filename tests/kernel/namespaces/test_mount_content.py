"""Content of file systems: into an archive, out of it, and through the hands of tar."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.errors import ImageError
from phaul_engine.namespaces.mnt import api, archive
from phaul_engine.namespaces.mnt.ids import Ids

SAME = Ids(((0, 0, 0xFFFFFFFF),), ((0, 0, 0xFFFFFFFF),))
SHIFTED = Ids(((0, 100000, 65536),), ((0, 200000, 65536),))
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 6, 0xFFFFFFFF), (2, 4, 100033), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
)


@pytest.fixture
def places() -> Iterator[list[int]]:
    """The roots of three tmpfs that are attached nowhere."""
    mounts = [api.new_file_system("tmpfs", "test", ["size=64m"]) for _ in range(3)]
    roots = [os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount) for mount in mounts]
    yield roots
    for fd in (*roots, *mounts):
        os.close(fd)


def furnish(root: int) -> None:
    """One of everything."""
    base = Path(f"/proc/self/fd/{root}")
    (base / "dir/deep").mkdir(parents=True)
    (base / "dir/file").write_bytes(b"content" * 1000)
    (base / "dir/empty").touch()
    os.link(base / "dir/file", base / "dir/deep/other")
    (base / "dir/deep/link").symlink_to("../file")
    (base / "dang\nling \udcff").symlink_to("/nowhere")
    os.mkfifo(base / "fifo", 0o640)
    os.link(base / "fifo", base / "fifo2")
    os.mknod(base / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(base / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{base}/socket")
    os.chmod(base / "socket", 0o755)
    with open(base / "sparse", "wb") as file:
        file.seek(1 << 30)
        file.write(b"far")
        file.truncate(3 << 30)
    with open(base / "hole", "wb") as file:
        file.truncate(1 << 20)
    long = base / ("long" * 50)
    long.write_text("x")
    os.setxattr(long, "trusted.test", b"a\0b\xff=\n")
    os.setxattr(base / "dir", "system.posix_acl_default", ACL)
    os.setxattr(base / "dir/file", "system.posix_acl_access", ACL)
    os.chown(base / "dir/file", 100001, 200002)
    os.chown(base / "dir/deep/link", 100003, 200004, follow_symlinks=False)
    os.chmod(base / "dir/file", 0o4755)
    os.chmod(base / "dir", 0o1777)
    for number, name in enumerate(["dir/file", "dir/deep", "dir", ".", "sparse", "fifo"], start=1):
        os.utime(base / name, ns=(number * 10**9 + 1, 1_700_000_000_123_456_789 + number))


def facts(root: int) -> list[object]:
    """What must be the same."""
    found: list[object] = []
    numbers: dict[int, int] = {}
    for name, directory, leaf, status in archive._walk(root):
        path = f"/proc/self/fd/{directory}/{leaf}"
        inode = numbers.setdefault(status.st_ino, len(numbers))
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = (status.st_size, hash(Path(path).read_bytes()) if status.st_size < 1 << 21 else status.st_blocks)
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        attributes = [
            (key, os.getxattr(path, key, follow_symlinks=False)) for key in os.listxattr(path, follow_symlinks=False)
        ]
        who = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_rdev)
        found.append((name, inode, *who, status.st_mtime_ns, content, sorted(attributes)))
    return found


@pytest.mark.parametrize("ids", [SAME, SHIFTED])
def test_everything_comes_back(places: list[int], ids: Ids) -> None:
    source, target, _ = places
    furnish(source)
    if ids is SHIFTED:
        for _, directory, leaf, status in archive._walk(source):
            if status.st_uid < 100000:
                os.chown(leaf, 100000, 200000, dir_fd=directory, follow_symlinks=False)
        base = f"/proc/self/fd/{source}"
        os.chmod(f"{base}/dir/file", 0o4755)
        os.utime(f"{base}/dir/file", ns=(1, 2))
    data = archive.pack(archive.read(source, ids))
    assert len(data) < 1 << 20, "holes are not in it"
    content = archive.unpack(data)
    assert content["dir/file"].uid == (100001 if ids is SAME else 1)
    archive.fill(target, content, ids)
    assert facts(target) == facts(source)


def test_changes_are_made_in_place(places: list[int]) -> None:
    source, target, _ = places
    furnish(source)
    before = archive.unpack(archive.pack(archive.read(source, SAME)))
    archive.fill(target, before, SAME)
    sign = archive.signature(source)
    assert sign == archive.signature(source)
    base = Path(f"/proc/self/fd/{source}")
    held = os.open("dir/file", os.O_RDONLY, dir_fd=target)
    (base / "dir/file").write_bytes(b"shorter")
    (base / "dir/new").mkdir()
    (base / "dir/new/file").write_text("new")
    (base / "fifo2").unlink()
    (base / "fifo2").write_text("no fifo any more")
    (base / "dir/deep/link").unlink()
    (base / "dir/deep/link").symlink_to("elsewhere")
    (base / "sparse").unlink()
    (base / "dir/empty").rename(base / "moved")
    os.removexattr(base / "dir", "system.posix_acl_default")
    assert sign != archive.signature(source)
    after = archive.unpack(archive.pack(archive.read(source, SAME)))
    archive.fill(target, after, SAME, before)
    assert facts(target) == facts(source)
    assert os.pread(held, 100, 0) == b"shorter"
    os.close(held)


def test_what_was_packed_before_is_not_packed_again(places: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    source = places[0]
    furnish(source)
    members: archive.Members = {}
    archive.pack(archive.read(source, SAME), members)
    base = Path(f"/proc/self/fd/{source}")
    (base / "dir/file").write_bytes(b"shorter")
    (base / "fifo2").unlink()
    after = archive.read(source, SAME)
    whole = archive.pack(after)
    packed = []
    member = archive._member
    monkeypatch.setattr(archive, "_member", lambda name, *rest: packed.append(name) or member(name, *rest))
    assert archive.pack(after, members) == whole
    assert {"dir/file"} < set(packed) < set(after)
    assert archive.pack(after, members) == whole


def test_tar_reads_ours_and_we_read_tars(places: list[int], tmp_path: Path) -> None:
    source, target, third = places
    furnish(source)
    for name in ("socket", "fifo2"):  # tar knows neither sockets nor other names of fifos
        os.unlink(name, dir_fd=source)
    for _, directory, leaf, _ in archive._walk(source):
        path = f"/proc/self/fd/{directory}/{leaf}"
        for key in os.listxattr(path, follow_symlinks=False):
            os.removexattr(path, key, follow_symlinks=False)
    image = tmp_path / "image.tar.gz"
    image.write_bytes(archive.pack(archive.read(source, SAME)))
    base = f"/proc/self/fd/{target}"
    subprocess.run(["tar", "-xzf", image, "--numeric-owner", "-p", "-C", base], check=True, pass_fds=[target])
    assert facts(target) == facts(source)
    made = tmp_path / "tar.tar.gz"
    options = ["--gzip", "--one-file-system", "--check-links", "--preserve-permissions", "--sparse", "--numeric-owner"]
    command = ["tar", "--create", *options, "--format=posix", "-f", str(made), "-C", f"/proc/self/fd/{source}", "."]
    subprocess.run(command, check=True, pass_fds=[source])
    archive.fill(third, archive.unpack(made.read_bytes()), SAME)
    assert facts(third) == facts(source)


def test_damage_is_noticed() -> None:
    with pytest.raises(ImageError):
        archive.unpack(b"no archive")
    whole = archive.pack({".": archive.Item(stat.S_IFDIR | 0o755, 0, 0, 0, 0)})
    with pytest.raises(ImageError):
        archive.unpack(whole[:-9])
    item = archive.Item(stat.S_IFREG | 0o644, 0, 0, 0, 0, size=1, pieces=[(0, b"x")])
    with pytest.raises(ImageError):
        archive.unpack(archive.pack({"a/../../b": item}))

"""Memory files."""

from __future__ import annotations

import fcntl
import os
import stat

import pytest
from phaul_engine import calls
from phaul_engine.errors import ImageError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import memfd_pb2
from phaul_engine.objects import memfd
from phaul_engine.objects.base import Restoration
from phaul_engine.objects.files import FilesPass

from tests.kernel.objects.subject import Act, Copy, at, started, through_bytes

SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_WRITE = 1, 2, 4, 8


def _moves(setup: Act, check: Act) -> None:
    """As `moves`, with the contents carried as the page stream does: between `build` and `settle`."""
    contents: dict[int, bytes] = {}

    with started(setup, check) as subject:

        def also(files: FilesPass, _owner: object) -> None:
            for source in memfd.sources(files.collection).values():
                contents[source.inode_id] = os.pread(source.fd, source.size, 0)

        found = subject.collect(also=also)
        assert not found.blockers, found.blockers
        copy = Copy(through_bytes(found.checkpoint))
        try:
            copy.build()
            for inode_id, content in contents.items():
                os.pwrite(memfd.inode(inode_id, copy.restoration), content, 0)
            copy.settle()
            copy.check(check)
            subject.go_on()
        finally:
            copy.close()


def test_content_offsets_and_sharing() -> None:
    def setup() -> None:
        at(os.memfd_create("a name (deleted)"), 10)
        os.write(10, b"0123456789")
        os.fchmod(10, 0o640)
        os.fchown(10, 12, 34)
        at(os.open("/proc/self/fd/10", os.O_RDONLY), 11)
        os.lseek(11, 4, os.SEEK_SET)
        at(os.memfd_create("another", 0), 12)
        os.ftruncate(12, 1 << 30)

    def check() -> None:
        assert os.readlink("/proc/self/fd/10") == "/memfd:a name (deleted) (deleted)"
        assert os.lseek(10, 0, os.SEEK_CUR) == 10
        assert os.read(11, 3) == b"456"
        assert fcntl.fcntl(11, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert os.fstat(10).st_ino == os.fstat(11).st_ino != os.fstat(12).st_ino
        status = os.fstat(10)
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 12, 34)
        assert calls.get_seals(10) == SEAL_SEAL
        assert os.fstat(12).st_size == 1 << 30

    _moves(setup, check)


def test_seals() -> None:
    def setup() -> None:
        at(os.memfd_create("sealed", os.MFD_ALLOW_SEALING), 10)
        os.write(10, b"for good")
        calls.add_seals(10, SEAL_SHRINK | SEAL_GROW | SEAL_WRITE)
        at(os.memfd_create("open", os.MFD_ALLOW_SEALING), 11)

    def check() -> None:
        assert calls.get_seals(10) == SEAL_SHRINK | SEAL_GROW | SEAL_WRITE
        assert os.pread(10, 20, 0) == b"for good"
        with pytest.raises(PermissionError):
            os.pwrite(10, b"x", 0)
        assert calls.get_seals(11) == 0
        calls.add_seals(11, SEAL_GROW)

    _moves(setup, check)


def test_mapped_and_closed() -> None:
    """A mapping's memory file has no descriptor; the address space asks for it by its link in /proc."""

    def setup() -> None:
        import mmap

        fd = os.memfd_create("mapped")
        os.ftruncate(fd, 4096)
        area = mmap.mmap(fd, 4096)
        area[:4] = b"data"
        os.close(fd)
        globals()["_kept"] = area

    with started(setup) as subject:
        with open(f"/proc/{subject.pid}/maps") as file:
            (where,) = [line.split()[0] for line in file if "/memfd:mapped" in line]
        ids: list[int] = []

        def also(files: FilesPass, owner: object) -> None:
            name = "-".join(f"{int(part, 16):x}" for part in where.split("-"))
            ids.append(files.file_at(owner, f"map_files/{name}", os.O_RDWR, "a mapping"))  # type: ignore[arg-type]
            (source,) = memfd.sources(files.collection).values()
            assert os.pread(source.fd, 4, 0) == b"data"

        found = subject.collect(also=also)
        assert not found.blockers
        restoration = Restoration(through_bytes(found.checkpoint))
        fd = restoration.description(ids[0])
        assert os.fstat(fd).st_size == 4096
        assert os.write(fd, b"x") == 1
        os.close(fd)
        os.close(memfd.inode(1, restoration))


@pytest.mark.parametrize("field", [{"name": b"x" * 300}, {"name": b"a\0b"}, {"seals": 0x1000}, {"size": 1 << 63}])
def test_hostile_inodes(field: dict[str, object]) -> None:
    entry = memfd_pb2.memfd_inode_entry(name=b"x", uid=0, gid=0, size=0, shmid=1, seals=0, inode_id=1)
    for name, value in field.items():
        setattr(entry, name, value)
    checkpoint = Checkpoint()
    checkpoint.put("memfd", None, entry)
    with pytest.raises(ImageError):
        memfd.inode(1, Restoration(checkpoint))
    with pytest.raises(ImageError):
        memfd.inode(2, Restoration(checkpoint))

"""Files opened by name: flags, offsets, sharing, deleted ones, and what cannot be carried."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest
from phaul_engine import calls
from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import fdinfo_pb2
from phaul_engine.objects import regular_file
from phaul_engine.objects.base import Owner, Restoration, kind_of_entry
from phaul_engine.objects.files import FilesPass

from tests.kernel.objects.subject import Copy, at, copied, moves, started, stop, through_bytes

O_LARGEFILE = 0o100000


def _link(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def test_flags_offsets_and_sharing(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"0123456789")

    def setup() -> None:
        at(os.open(file, os.O_RDWR | os.O_APPEND), 10)
        os.lseek(10, 3, os.SEEK_SET)
        os.dup2(10, 11, inheritable=True)
        at(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME), 12)
        at(os.open(file, os.O_WRONLY), 13)
        at(os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), 14)
        at(os.open(file, os.O_PATH), 15)
        os.symlink("data", tmp_path / "symlink")
        at(os.open(tmp_path / "symlink", os.O_PATH | os.O_NOFOLLOW), 16)

    def check() -> None:
        assert fcntl.fcntl(10, fcntl.F_GETFL) == os.O_RDWR | os.O_APPEND | O_LARGEFILE
        assert not os.get_inheritable(10)
        assert os.get_inheritable(11)
        assert os.read(10, 2) == b"34"
        assert os.lseek(11, 0, os.SEEK_CUR) == 5
        assert fcntl.fcntl(12, fcntl.F_GETFL) == os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME | O_LARGEFILE
        assert os.read(12, 4) == b"0123"
        assert os.lseek(13, 0, os.SEEK_CUR) == 0
        assert fcntl.fcntl(13, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        assert os.listdir(14)
        assert fcntl.fcntl(15, fcntl.F_GETFL) & os.O_PATH
        assert stat.S_ISLNK(os.fstat(16).st_mode)

    moves(setup, check)


def test_a_file_is_never_created_or_cut(tmp_path: Path) -> None:
    file = tmp_path / "data"

    def setup() -> None:
        at(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_TRUNC, 0o640), 10)
        os.write(10, b"content")

    def check() -> None:
        assert os.pread(10, 20, 0) == b"content"
        assert os.lseek(10, 0, os.SEEK_CUR) == 7

    moves(setup, check)


def test_descriptions_shared_between_processes(tmp_path: Path) -> None:
    """A parent and a child share one description, and have one each besides, of the same file."""
    file = tmp_path / "data"
    file.write_bytes(bytes(100))

    def setup() -> None:
        at(os.open(file, os.O_RDONLY), 10)
        child = os.fork()
        at(os.open(file, os.O_RDONLY), 11)
        if child == 0:
            os.lseek(10, 7, os.SEEK_SET)
            os.lseek(11, 9, os.SEEK_SET)
            stop()
            os._exit(0)
        os.waitpid(child, os.WUNTRACED)
        (tmp_path / "child").write_text(str(child))

    with started(setup) as subject:
        subject.others = [int((tmp_path / "child").read_text())]
        found = subject.collect()
        tables = [
            {record.message.fd: record.message.id for record in found.checkpoint.records("fdinfo", table)}
            for table in (1, 2)
        ]
        assert tables[0][10] == tables[1][10]
        assert tables[0][11] != tables[1][11]
        with copied(through_bytes(found.checkpoint)) as copy:
            copy.check_tables({1: lambda: _offsets(7, 0), 2: lambda: _offsets(7, 9)})
        os.kill(subject.others[0], 9)


def _offsets(shared: int, own: int) -> None:
    assert (os.lseek(10, 0, os.SEEK_CUR), os.lseek(11, 0, os.SEEK_CUR)) == (shared, own)


def test_deleted_file_with_holes(tmp_path: Path) -> None:
    """Content, holes, owner, times and the name in /proc; two descriptions, by two names, of one inode."""
    size = 64 << 20

    def setup() -> None:
        name, other = tmp_path / "ghost", tmp_path / "other"
        at(os.open(name, os.O_RDWR | os.O_CREAT, 0o640), 10)
        os.link(name, other)
        at(os.open(other, os.O_RDONLY), 11)
        os.fchown(10, 12, 34)
        os.write(10, b"begin")
        os.pwrite(10, b"middle", 32 << 20)
        os.ftruncate(10, size)
        os.utime(10, ns=(1_000_000_000_000_000_000, 1_100_000_000_000_000_000))
        os.unlink(name)
        os.unlink(other)

    def check() -> None:
        status = os.fstat(10)
        assert (status.st_size, status.st_nlink, status.st_uid, status.st_gid) == (size, 0, 12, 34)
        assert stat.S_IMODE(status.st_mode) == 0o640
        assert status.st_mtime_ns == 1_100_000_000_000_000_000
        assert status.st_blocks * 512 < 1 << 20, "the holes have been filled"
        assert (os.pread(10, 6, 0), os.pread(10, 7, 32 << 20)) == (b"begin\0", b"middle\0")
        assert os.lseek(10, 0, os.SEEK_CUR) == 5
        assert os.fstat(11).st_ino == status.st_ino
        assert (_link(10), _link(11)) == (f"{tmp_path}/ghost (deleted)", f"{tmp_path}/other (deleted)")

    moves(setup, check)
    assert not list(tmp_path.iterdir())


def test_deleted_file_changes_after_the_survey(tmp_path: Path) -> None:
    def setup() -> None:
        name = tmp_path / "ghost"
        at(os.open(name, os.O_RDWR | os.O_CREAT), 10)
        os.write(10, b"early" * 1000)
        os.unlink(name)
        stop()
        os.pwrite(10, b"late", 2)
        os.ftruncate(10, 3000)

    def check() -> None:
        content = os.pread(10, 5000, 0)
        assert len(content) == 3000
        assert content[:6] == b"ealate"

    with started(setup, check) as subject:
        early = subject.collect(survey=True)
        subject.step()
        final = subject.collect()
        copy = Copy(through_bytes(early.checkpoint))
        try:
            copy.build()
            copy.replace(through_bytes(final.checkpoint))
            copy.settle()
            copy.check(check)
            subject.go_on()
        finally:
            copy.close()


def test_deleted_file_whose_name_is_taken(tmp_path: Path) -> None:
    name = tmp_path / "log"

    def setup() -> None:
        at(os.open(name, os.O_RDWR | os.O_CREAT), 10)
        os.write(10, b"old")
        os.unlink(name)
        name.write_text("new")

    def check() -> None:
        assert os.pread(10, 9, 0) == b"old"
        assert name.read_text() == "new"

    moves(setup, check)
    assert [entry.name for entry in tmp_path.iterdir()] == ["log"]


def test_deleted_directory_and_its_parent(tmp_path: Path) -> None:
    def setup() -> None:
        (tmp_path / "a/b").mkdir(parents=True)
        at(os.open(tmp_path / "a/b", os.O_RDONLY | os.O_DIRECTORY), 10)
        os.rmdir(tmp_path / "a/b")
        os.rmdir(tmp_path / "a")

    def check() -> None:
        assert stat.S_ISDIR(os.fstat(10).st_mode)
        assert os.fstat(10).st_nlink == 0
        assert os.listdir(10) == []
        assert _link(10) == f"{tmp_path}/a/b (deleted)"

    moves(setup, check)
    assert not list(tmp_path.iterdir())


def test_file_deleted_under_one_of_its_names(tmp_path: Path) -> None:
    def setup() -> None:
        at(os.open(tmp_path / "name", os.O_RDWR | os.O_CREAT), 10)
        os.write(10, b"linked")
        os.link(tmp_path / "name", tmp_path / "other")
        os.unlink(tmp_path / "name")

    def check() -> None:
        assert os.pread(10, 9, 0) == b"linked"
        assert os.fstat(10).st_ino == os.stat(tmp_path / "other").st_ino

    with started(setup, check) as subject:
        found = subject.collect(link_remap=True)
        assert not found.blockers
        with copied(through_bytes(found.checkpoint)) as copy:
            copy.check(check)
        assert [entry.name for entry in tmp_path.iterdir()] == ["other"]
        for _ in range(2):
            assert not subject.collect().blockers
            assert len(list(tmp_path.iterdir())) == 2
        subject.files.close()
        assert [entry.name for entry in tmp_path.iterdir()] == ["other"], "it stays, and its second name too"
        (blocker,) = subject.collect(link_remap=False).blockers
        assert "--link-remap" in str(blocker)
        subject.go_on()


def test_a_name_that_ends_as_deleted_names_do(tmp_path: Path) -> None:
    def setup() -> None:
        at(os.open(tmp_path / "file (deleted)", os.O_RDWR | os.O_CREAT), 10)

    def check() -> None:
        assert os.fstat(10).st_nlink == 1
        assert _link(10) == f"{tmp_path}/file (deleted)"

    moves(setup, check)


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe\n"

    def setup() -> None:
        at(os.open(name, os.O_RDWR | os.O_CREAT), 10)

    moves(setup, lambda: _same_file(10, name))


def _same_file(fd: int, name: bytes) -> None:
    assert os.fstat(fd).st_ino == os.stat(name).st_ino


def test_a_hidden_file_is_a_blocker(tmp_path: Path) -> None:
    """The name leads elsewhere: here from another root of names, as behind a mount."""
    (tmp_path / "file").write_text("x")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        from phaul_engine.objects.base import Collection, Descriptor
        from phaul_engine.proc import access, fdinfo

        proc = access.open_process(os.getpid())
        root = os.open(tmp_path, os.O_PATH)
        owner = Owner(os.getpid(), os.getpid(), "test", proc, root, -1)
        descriptor = Descriptor(owner, fd, fd, str(tmp_path / "file"), fdinfo.read(proc, fd), os.fstat(fd))
        collection = Collection(Checkpoint())
        regular_file.collect_named(descriptor, 1, collection)
        (blocker,) = collection.blockers
        assert "nothing stands there" in str(blocker)
        os.close(proc)
        os.close(root)
    finally:
        os.close(fd)


def test_devices_without_state() -> None:
    names = ("null", "zero", "full", "random", "urandom")

    def setup() -> None:
        for number, name in enumerate(names, 10):
            at(os.open(f"/dev/{name}", os.O_RDWR | (os.O_NONBLOCK if name == "zero" else 0)), number)

    def check() -> None:
        for number, name in enumerate(names, 10):
            assert os.fstat(number).st_rdev == os.stat(f"/dev/{name}").st_rdev
        assert os.read(10, 1) == b""
        assert os.read(11, 4) == bytes(4)
        assert not os.get_blocking(11)
        with pytest.raises(OSError, match="No space"):
            os.write(12, b"x")

    moves(setup, check)


def test_files_of_proc_and_sys() -> None:
    def setup() -> None:
        at(os.open("/proc/self/status", os.O_RDONLY), 10)
        os.lseek(10, 5, os.SEEK_SET)
        at(os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY), 11)
        at(os.open("/proc/meminfo", os.O_RDONLY), 12)

    def check() -> None:
        assert os.lseek(10, 0, os.SEEK_CUR) == 5
        assert b"Name:" in os.pread(10, 4096, 0)
        assert b"[" in os.read(11, 100)
        assert b"MemTotal" in os.read(12, 100)

    moves(setup, check)


def test_a_file_of_a_process_that_stays_is_a_blocker() -> None:
    def setup() -> None:
        at(os.open(f"/proc/{os.getppid()}/stat", os.O_RDONLY), 10)

    with started(setup) as subject:
        (blocker,) = subject.collect(survey=True).blockers
        assert "fd 10" in str(blocker)
        assert "stays" in str(blocker)


def test_directories_of_the_process_and_its_program(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()

    def setup() -> None:
        os.chdir(tmp_path / "deep")

    ids: dict[str, int] = {}

    def also(files: FilesPass, owner: Owner) -> None:
        files.fs(owner, 0o027)
        ids["exe"] = files.file_at(owner, "exe", os.O_RDONLY, "the program")
        assert files.file_at(owner, "exe", os.O_RDONLY) == ids["exe"]

    with started(setup) as subject:
        found = subject.collect(also=also)
        assert not found.blockers
        fs = found.checkpoint.one("fs", subject.pid)
        assert fs.umask == 0o027
        restoration = Restoration(through_bytes(found.checkpoint))
        for file_id, path in ((fs.cwd_id, str(tmp_path / "deep")), (fs.root_id, "/"), (ids["exe"], None)):
            fd = restoration.description(file_id)
            assert _link(fd) == (path or os.readlink(f"/proc/{subject.pid}/exe"))
            os.close(fd)
        again = subject.collect(also=also)
        assert again.checkpoint.one("fs", subject.pid) == fs


def test_what_is_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")

    def setup() -> None:
        at(os.open(tmp_path / "file", os.O_RDWR), 10)

    with started(setup) as subject:
        found = subject.collect(survey=True)
        (use,) = regular_file.uses(found.collection)
        assert (use.path, use.size, use.writable) == (str(tmp_path / "file"), 7, True)
        root = os.open("/", os.O_PATH)
        assert use.digest(root).hex().startswith("ed7002b439e9ac84")
        os.close(root)


def _entry(name: bytes, **fields: int) -> fdinfo_pb2.file_entry:
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=1)
    entry.reg.id, entry.reg.pos, entry.reg.name = 1, 0, name
    entry.reg.flags = fields.pop("flags", 0)
    entry.reg.fown.uid = entry.reg.fown.euid = entry.reg.fown.signum = entry.reg.fown.pid_type = entry.reg.fown.pid = 0
    for field, value in fields.items():
        setattr(entry.reg, field, value)
    return entry


@pytest.mark.parametrize("name", [b"relative", b"/a\0b", b""])
def test_hostile_names(name: bytes) -> None:
    entry = _entry(name)
    with pytest.raises(ImageError):
        kind_of_entry(entry).rebuild(entry, Restoration(Checkpoint()))


def test_hostile_flags_do_not_create(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")
    entry = _entry(os.fsencode(tmp_path / "there"), flags=os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    fd = kind_of_entry(entry).rebuild(entry, Restoration(Checkpoint()))
    os.close(fd)
    assert (tmp_path / "there").read_text() == "kept"
    entry = _entry(os.fsencode(tmp_path / "new"), flags=os.O_RDWR | os.O_CREAT)
    with pytest.raises(RebuildError):
        kind_of_entry(entry).rebuild(entry, Restoration(Checkpoint()))
    assert not (tmp_path / "new").exists()


def test_names_stay_beneath_the_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "root" / "escape").symlink_to("../secret")
    root = os.open(tmp_path / "root", os.O_PATH)
    try:
        for name in (b"/../secret", b"/escape"):
            entry = _entry(name)
            with pytest.raises(RebuildError):
                kind_of_entry(entry).rebuild(entry, Restoration(Checkpoint(), root=root))
    finally:
        os.close(root)


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("four")
    entry = _entry(os.fsencode(tmp_path / "file"), size=5, mode=stat.S_IFREG | 0o644)
    kind, restoration = kind_of_entry(entry), Restoration(Checkpoint())
    fd = kind.rebuild(entry, restoration)
    try:
        with pytest.raises(RebuildError, match="4 bytes here and had 5"):
            kind.settle(entry, fd, restoration)
    finally:
        os.close(fd)


def test_what_is_not_carried_is_named(tmp_path: Path) -> None:
    import ctypes

    def setup() -> None:
        libc = ctypes.CDLL(None)
        at(libc.syscall(425, 8, ctypes.create_string_buffer(120)), 10)  # io_uring_setup
        at(libc.syscall(323, 0), 11)  # userfaultfd
        at(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK), 12)

    with started(setup) as subject:
        texts = [str(blocker) for blocker in subject.collect(survey=True).blockers]
        assert len(texts) == 3
        assert any(f"fd 10 of pid {subject.pid} (subject) is an io_uring instance: " in text for text in texts)
        assert any("a userfaultfd" in text for text in texts)
        assert any("kernel log" in text for text in texts)


def test_a_signal_owner_outside_is_a_blocker(tmp_path: Path) -> None:
    def setup() -> None:
        at(os.open(tmp_path, os.O_RDONLY), 10)
        calls.set_owner(10, calls.SignalOwner(1, os.getppid(), 0, 0))

    with started(setup) as subject:
        (blocker,) = subject.collect(survey=True).blockers
        assert "SIGIO" in str(blocker)

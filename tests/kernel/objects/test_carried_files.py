"""Files on tmpfs that are carried like memory."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import memfd_pb2
from phaul_engine.network import undo
from phaul_engine.objects import carried_file, memfd
from phaul_engine.objects.files import FilesPass
from phaul_engine.proc import lives

from tests.kernel.objects.subject import Copy, at, started, through_bytes


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs, as /dev/shm is one."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def _moved(place: Path) -> tuple[Checkpoint, bytes, os.stat_result]:
    """What a program with a file for reading and writing, and again for reading, is collected as, with the content of
    the file. The program has ended, and its file is `away`: the directory is another host's now."""
    contents: list[bytes] = []

    def setup() -> None:
        at(os.open(place / "file", os.O_RDWR | os.O_CREAT, 0o640), 10)
        os.write(10, b"content")
        os.fchown(10, 12, 34)
        at(os.open(place / "file", os.O_RDONLY), 11)
        at(os.open(place / "other", os.O_RDONLY), 12)

    (place / "other").write_text("only read, so it is a file like any other")
    with started(setup) as subject:

        def also(files: FilesPass, _owner: object) -> None:
            (source,) = memfd.sources(files.collection).values()
            contents.append(os.pread(source.fd, source.size, 0))

        found = subject.collect(also=also, **{carried_file.OPTION: True})
        assert not found.blockers, found.blockers
        subject.go_on()
    return through_bytes(found.checkpoint), contents[0], (place / "file").rename(place / "away").stat()


def _check(place: Path) -> None:
    assert os.readlink("/proc/self/fd/10") == os.readlink("/proc/self/fd/11") == str(place / "file")
    assert os.fstat(10).st_ino == os.fstat(11).st_ino == os.stat(place / "file").st_ino
    assert os.lseek(10, 0, os.SEEK_CUR) == 7
    assert os.read(11, 100) == b"content"
    status = os.fstat(10)
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, 12, 34)


def _build(checkpoint: Checkpoint, content: bytes) -> Copy:
    copy = Copy(checkpoint)
    try:
        copy.build()
    except RebuildError:
        copy.close()
        raise
    (record,) = checkpoint.records("memfd")
    page = content.ljust(4096, b"\0")
    os.pwrite(memfd.inode(record.message.inode_id, copy.restoration), page, 0)
    copy.settle()
    return copy


def test_it_gets_its_name_after_the_commit(place: Path) -> None:
    checkpoint, content, _ = _moved(place)
    copy = _build(checkpoint, content)
    assert not (place / "file").exists()
    copy.check(lambda: _check(place))
    assert sorted(os.listdir(place)) == ["away", "file", "other"]


def test_a_crash_before_the_commit_removes_it_and_one_after_it_does_not(place: Path) -> None:
    checkpoint, content, _ = _moved(place)
    for act, left in ((undo.undo, ["away", "other"]), (undo.redo, ["away", "file", "other"])):
        copy = _build(checkpoint, content)
        (entry,) = carried_file.staged_entries(copy.restoration)
        act(entry)
        act(entry)
        assert sorted(os.listdir(place)) == left
        carried_file.publish(set(), copy.restoration)  # finds nothing any more
        copy.close()
        assert sorted(os.listdir(place)) == left
    assert (place / "file").read_bytes() == content


def test_what_the_program_deleted_meanwhile_is_not_published(place: Path) -> None:
    checkpoint, content, _ = _moved(place)
    copy = _build(checkpoint, content)
    copy.replace(Checkpoint())
    copy.close()
    assert sorted(os.listdir(place)) == ["away", "other"]


def test_a_name_that_is_taken(place: Path) -> None:
    checkpoint, content, _ = _moved(place)
    (place / "file").write_text("of another program")
    with pytest.raises(RebuildError, match="exists here"):
        _build(checkpoint, content)
    assert sorted(os.listdir(place)) == ["away", "file", "other"]


def test_at_the_source_the_name_goes_with_the_copy(place: Path) -> None:
    checkpoint, _, status = _moved(place)
    sleeper = subprocess.Popen(["sleep", "60"])
    (place / "away").rename(place / "file")
    ((entry),) = carried_file.undo_entries(checkpoint, [sleeper.pid])
    carried_file.remove(entry["data"])
    assert (place / "file").exists(), "its program lives"
    sleeper.kill()
    sleeper.wait()
    (place / "file").rename(place / "kept")
    (place / "file").write_text("made since")
    carried_file.remove(entry["data"])
    assert (place / "file").read_text() == "made since"
    (place / "kept").rename(place / "file")
    assert (place / "file").stat().st_ino == status.st_ino
    carried_file.remove(entry["data"])
    carried_file.remove(entry["data"])
    assert os.listdir(place) == ["other"]


def _gone() -> list[int]:
    """A task that is dead."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        ((task),) = lives.tasks([sleeper.pid])
        sleeper.kill()
    return task


def test_a_name_of_the_tree_alone_is_none_of_this_host(place: Path) -> None:
    """A tree with mounts of its own calls its file what another one is called here."""
    (place / "file").write_text("this host's")
    script = "mount -t tmpfs tmpfs $0 && touch $0/file && stat -c '%d %i' $0/file && read end"
    command = ["unshare", "--mount", "sh", "-c", script, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as inside:
        assert inside.stdout
        device, inode = map(int, inside.stdout.readline().split())
        checkpoint = Checkpoint()
        entry = memfd_pb2.memfd_inode_entry(name=b"", uid=0, gid=0, size=0, shmid=0, seals=0, inode_id=1, mode=0o600)
        entry.phaul_path, entry.phaul_device, entry.phaul_inode = os.fsencode(place / "file"), device, inode
        checkpoint.put("memfd", None, entry)
        assert carried_file.undo_entries(checkpoint, [inside.pid]) == []
        status = (place / "file").stat()
        entry.phaul_device, entry.phaul_inode = status.st_dev, status.st_ino
        checkpoint = Checkpoint()
        checkpoint.put("memfd", None, entry)
        ((noted),) = carried_file.undo_entries(checkpoint, [inside.pid])
        assert noted["data"]["files"] == [[str(place / "file"), status.st_dev, status.st_ino]]
        inside.communicate("\n")
    carried_file.remove({"files": [[str(place / "file"), device, inode]], "tasks": [_gone()]})
    assert (place / "file").read_text() == "this host's"


@pytest.mark.parametrize("undo", [carried_file.remove, carried_file.mark])
def test_no_link_leads_an_undo_elsewhere(place: Path, undo: Callable[[dict[str, Any]], None]) -> None:
    """Neither one in place of a directory, nor of the file."""
    (place / "mine").mkdir()
    (place / "mine" / "file").write_text("the host's")
    status = (place / "mine" / "file").stat()
    (place / "theirs").symlink_to("mine")
    (place / "link").symlink_to("mine/file")
    files = [[str(place / name), status.st_dev, status.st_ino] for name in ("theirs/file", "link")]
    undo({"files": files, "tasks": [_gone()]})
    assert (place / "mine" / "file").read_text() == "the host's"
    assert os.listxattr(place / "mine" / "file") == []
    assert sorted(os.listdir(place)) == ["link", "mine", "theirs"]


@pytest.mark.parametrize("how", ["open", "mapped", "linked"])
def test_others_that_use_it(place: Path, how: str) -> None:
    (place / "file").write_bytes(bytes(4096))
    scripts = {
        "open": "import sys; f = open(sys.argv[1]); print(flush=True); input()",
        "mapped": "import sys, mmap; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1); f.close();"
        "print(flush=True); input()",
    }
    if how == "linked":
        os.link(place / "file", place / "link")
        wanted = "it has other names"
        other = None
    else:
        words = ["python3", "-c", scripts[how], str(place / "file")]
        other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout
        assert other.stdout.readline()
        wanted = f"pid {other.pid} (python3) uses it too"

    def setup() -> None:
        at(os.open(place / "file", os.O_RDWR), 10)

    option: dict[str, Any] = {carried_file.OPTION: True}
    with started(setup) as subject:
        (blocker,) = subject.collect(survey=True, **option).blockers
        assert wanted in blocker.why
        assert not subject.collect(survey=True).blockers
        subject.go_on()
    if other:
        other.communicate(b"\n")

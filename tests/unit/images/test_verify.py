"""Images that disagree with each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.framing import head_of
from phaul_engine.images.kinds import KINDS
from phaul_engine.images.pages import PAGE_SIZE
from phaul_engine.images.pb import (
    fdinfo_pb2,
    file_lock_pb2,
    memfd_pb2,
    pipe_data_pb2,
    pstree_pb2,
    remap_file_path_pb2,
    sk_packet_pb2,
)
from phaul_engine.images.verify import Problem, verify
from phaul_engine.images.vma import Status
from typer.testing import CliRunner

from phaul.cli.images import app
from tests.unit.images.checkpoints import AREA, PID, THREAD, complete, fill, save


def entry(kind: int, member: str, number: int, **values: Any) -> fdinfo_pb2.file_entry:
    """An entry of files.img."""
    made = fdinfo_pb2.file_entry(type=kind, id=number)  # type: ignore[arg-type]
    detail = getattr(made, member)
    detail.id = number
    for name, value in values.items():
        setattr(detail, name, value)
    fill(detail)
    return made


def leader(checkpoint: Checkpoint) -> Any:
    return checkpoint.one("core", PID)


def area(checkpoint: Checkpoint, status: Status, shmid: int) -> None:
    one = checkpoint.one("mm", PID).vmas[0]
    one.status, one.shmid = status, shmid


BREAKS: dict[str, tuple[str, Callable[[Checkpoint], Any]]] = {
    "old layout": ("inventory.img", lambda c: c.one("inventory").ClearField("fdinfo_per_id")),
    "newer version": ("inventory.img", lambda c: setattr(c.one("inventory"), "img_version", 3)),
    "no core": (f"core-{PID}.img", lambda c: c.remove("core", PID)),
    "no core of a thread": (f"core-{THREAD}.img", lambda c: c.remove("core", THREAD)),
    "no mm": (f"mm-{PID}.img", lambda c: c.remove("mm", PID)),
    "no fs": (f"fs-{PID}.img", lambda c: c.remove("fs", PID)),
    "no ids": (f"ids-{PID}.img", lambda c: leader(c).ClearField("ids")),
    "another machine": (f"core-{PID}.img", lambda c: setattr(leader(c), "mtype", 3)),
    "no registers": (f"core-{PID}.img", lambda c: leader(c).ClearField("thread_info")),
    "thread like a leader": (f"core-{THREAD}.img", lambda c: c.one("core", THREAD).CopyFrom(leader(c))),
    "unknown parent": ("pstree.img", lambda c: setattr(c.one("pstree"), "ppid", 3)),
    "not its own thread": ("pstree.img", lambda c: c.one("pstree").threads.reverse()),
    "thread twice": ("pstree.img", lambda c: c.one("pstree").threads.append(THREAD)),
    "pid zero": ("pstree.img", lambda c: setattr(c.one("pstree"), "pid", 0)),
    "second root": (
        "pstree.img",
        lambda c: c.put("pstree", None, pstree_pb2.pstree_entry(pid=20, ppid=0, pgid=1, sid=1, threads=[20])),
    ),
    "descriptor of nothing": (
        "fdinfo-2.img",
        lambda c: c.put("fdinfo", 2, fdinfo_pb2.fdinfo_entry(id=9, flags=0, type=fdinfo_pb2.REG, fd=1)),
    ),
    "descriptor of another type": (
        "fdinfo-2.img",
        lambda c: c.put("fdinfo", 2, fdinfo_pb2.fdinfo_entry(id=1, flags=0, type=fdinfo_pb2.PIPE, fd=1)),
    ),
    "strange descriptor flags": ("fdinfo-2.img", lambda c: setattr(c.one("fdinfo", 2), "flags", 4)),
    "member of another type": ("files.img", lambda c: setattr(c.records("files")[0].message, "type", fdinfo_pb2.PIPE)),
    "id inside differs": ("files.img", lambda c: setattr(c.records("files")[0].message.reg, "id", 8)),
    "working directory": (f"fs-{PID}.img", lambda c: setattr(c.one("fs", PID), "cwd_id", 9)),
    "executable": (f"mm-{PID}.img", lambda c: setattr(c.one("mm", PID), "exe_file_id", 9)),
    "mapped file": (f"mm-{PID}.img", lambda c: area(c, Status.REGULAR | Status.FILE_SHARED, 9)),
    "mapped memfd": (f"mm-{PID}.img", lambda c: area(c, Status.REGULAR | Status.FILE_SHARED | Status.MEMFD, 1)),
    "shared memory": ("pagemap-shmem-9.img", lambda c: area(c, Status.REGULAR | Status.ANON_SHARED, 9)),
    "area upside down": (f"mm-{PID}.img", lambda c: setattr(c.one("mm", PID).vmas[0], "end", 0)),
    "areas overlap": (f"mm-{PID}.img", lambda c: c.one("mm", PID).vmas.append(c.one("mm", PID).vmas[0])),
    "pages outside the areas": (
        f"pagemap-{PID}.img",
        lambda c: setattr(c.one("mm", PID).vmas[0], "end", AREA + PAGE_SIZE),
    ),
    "namespace": ("netns-77.img", lambda c: setattr(leader(c).ids, "net_ns_id", 77)),
    "seccomp filter": (f"core-{PID}.img", lambda c: setattr(leader(c).thread_core, "seccomp_filter", 0)),
    "fifo without its file": ("files.img", lambda c: c.put("files", None, entry(fdinfo_pb2.FIFO, "fifo", 3))),
    "memfd without an inode": ("files.img", lambda c: c.put("files", None, entry(fdinfo_pb2.MEMFD, "memfd", 3))),
    "terminal": ("files.img", lambda c: c.put("files", None, entry(fdinfo_pb2.TTY, "tty", 3))),
    "connection without its stream": (
        "tcp-stream-abc.img",
        lambda c: c.put("files", None, entry(fdinfo_pb2.INETSK, "isk", 3, ino=0xABC, proto=6, state=1)),
    ),
    "half a socket pair": (
        "files.img",
        lambda c: c.put("files", None, entry(fdinfo_pb2.UNIXSK, "usk", 3, ino=5, peer=6, type=1, state=1)),
    ),
    "contents of a memfd": (
        "pagemap-shmem-4.img",
        lambda c: c.put("memfd", None, fill(memfd_pb2.memfd_inode_entry(shmid=4))),
    ),
    "data of no pipe": (
        "pipes-data.img",
        lambda c: c.put("pipes-data", None, pipe_data_pb2.pipe_data_entry(pipe_id=3, bytes=0)),
    ),
    "data of no socket": (
        "sk-queues.img",
        lambda c: c.put("sk-queues", None, sk_packet_pb2.sk_packet_entry(id_for=9, length=0)),
    ),
    "ghost": (
        "ghost-file-1.img",
        lambda c: c.put(
            "remap-fpath", None, remap_file_path_pb2.remap_file_path_entry(orig_id=1, remap_id=1, remap_type=1)
        ),
    ),
    "remap of nothing": (
        "remap-fpath.img",
        lambda c: c.put(
            "remap-fpath", None, remap_file_path_pb2.remap_file_path_entry(orig_id=9, remap_id=1, remap_type=2)
        ),
    ),
    "lock of nothing": (
        "filelocks.img",
        lambda c: c.put("filelocks", None, fill(file_lock_pb2.file_lock_entry(pid=PID, fd=7))),
    ),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with a checkpoint that is complete."""
    save(complete(), tmp_path)
    return tmp_path


def test_complete_checkpoint(images: Path) -> None:
    assert verify(images) == []


@pytest.mark.parametrize("name", BREAKS)
def test_disagreement(name: str, tmp_path: Path) -> None:
    file, damage = BREAKS[name]
    checkpoint = complete()
    damage(checkpoint)
    save(checkpoint, tmp_path)
    assert file in {problem.file for problem in verify(tmp_path)}


def test_zombie_needs_only_its_core(tmp_path: Path) -> None:
    checkpoint = complete()
    checkpoint.put("pstree", None, pstree_pb2.pstree_entry(pid=20, ppid=PID, pgid=1, sid=1, threads=[20]))
    dead = checkpoint.put("core", 20, type(leader(checkpoint))(mtype=1)).message
    fill(dead.tc).task_state = 6
    save(checkpoint, tmp_path)
    assert verify(tmp_path) == []


def test_pages_file_of_another_length(images: Path) -> None:
    (images / "pages-1.img").write_bytes(bytes(3 * PAGE_SIZE))
    assert [problem.file for problem in verify(images)] == ["pages-1.img"]


def test_pages_file_of_two_pagemaps(images: Path) -> None:
    (images / "pagemap-shmem-8.img").write_bytes((images / f"pagemap-{PID}.img").read_bytes())
    assert [str(problem) for problem in verify(images)] == ["pages-1.img: belongs to 2 pagemaps"]


def test_every_malformed_file_is_told(images: Path) -> None:
    for name in ("pstree.img", "files.img", "strange.img"):
        (images / name).write_bytes(b"")
    assert {"pstree.img", "files.img", "strange.img"} <= {problem.file for problem in verify(images)}


def test_round_of_a_pre_dump_needs_no_tree(images: Path) -> None:
    for name in ("pstree", f"core-{PID}", f"core-{THREAD}", "files", f"fs-{PID}", f"mm-{PID}"):
        (images / f"{name}.img").unlink()
    assert verify(images) == []


def test_tree_without_a_process(images: Path) -> None:
    (images / "pstree.img").write_bytes(head_of(KINDS["pstree"]))
    assert Problem("pstree.img", "holds no process") in verify(images)


def test_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("no images here")
    assert [problem.file for problem in verify(tmp_path)] == ["inventory.img"]


class TestCommands:
    """`phaul images`."""

    def run(self, *args: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        return result.exit_code, result.output

    def test_verify(self, images: Path) -> None:
        assert self.run("verify", images) == (0, "complete\n")
        (images / f"fs-{PID}.img").unlink()
        code, output = self.run("verify", images)
        assert code == 1
        assert f"fs-{PID}.img" in output

    def test_list(self, images: Path) -> None:
        code, output = self.run("show", images, "--json")
        assert code == 0
        assert {one["name"]: one["records"] for one in json.loads(output)}["files.img"] == 2

    def test_show(self, images: Path) -> None:
        code, output = self.run("show", images, f"mm-{PID}.img")
        assert code == 0
        assert f"start: {AREA:#x}" in output
        code, output = self.run("show", images, "files.img", "--json")
        assert json.loads(output)["entries"][0]["reg"]["name"] == "/bin/true"

    def test_stats(self, images: Path) -> None:
        code, output = self.run("stats", images, "--json")
        assert code == 0
        assert json.loads(output)["pages"] == {f"pagemap-{PID}.img": {str(images): 2}}

    def test_malformed(self, images: Path) -> None:
        (images / "files.img").write_bytes(b"?")
        assert self.run("show", images, "files.img")[0] == 1
        assert self.run("show", images, "nothing.img")[0] == 1
        assert self.run("stats", images / "missing")[0] == 1

"""Images that CRIU wrote, read and written again; images of ours, read by crit."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.directory import ImageDirectory, file_name
from phaul_engine.images.kinds import parse_name
from phaul_engine.images.pages import PAGE_SIZE, PageImages, PageWriter
from phaul_engine.images.verify import verify

from tests.unit.images.checkpoints import AREA, PID, complete, save


@pytest.fixture
def dump(criu: Path, program: subprocess.Popen[str], tmp_path: Path) -> Path:
    """A dump of the program by CRIU."""
    images = tmp_path / "dump"
    images.mkdir()
    result = subprocess.run(
        [criu, "dump", "-t", str(program.pid), "-D", images, "-o", "dump.log", "--file-locks", "--leave-running"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if result.returncode:
        errors = [line for line in (images / "dump.log").read_text().splitlines() if "Error" in line]
        pytest.fail("\n".join(["CRIU could not dump the program", *errors[-5:]]))
    return images


def test_every_file_is_written_as_it_was_read(dump: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(dump)
    again = tmp_path / "again"
    again.mkdir()
    checkpoint.save(again)
    names = {name for name in os.listdir(dump) if parse_name(name) and not name.startswith("pages-")}
    assert set(os.listdir(again)) == names
    assert [name for name in sorted(names) if (dump / name).read_bytes() != (again / name).read_bytes()] == []
    assert {"ghost-file", "sk-queues", "pipes-data", "memfd", "filelocks"} <= {kind for kind, _ in checkpoint.files()}
    travelled = Checkpoint.from_bytes(checkpoint.to_bytes())
    assert travelled.to_bytes() == checkpoint.to_bytes()


def test_dump_is_complete_and_its_contents_are_found(dump: Path) -> None:
    assert verify(dump) == []
    checkpoint = Checkpoint.load(dump, pagemaps=False)
    assert [record.payload for record in checkpoint.records("sk-queues")] == [b"queued"]
    assert b"piped" in [record.payload for record in checkpoint.records("pipes-data")]
    (ghost,) = checkpoint.idents("ghost-file")
    assert b"".join(record.payload for record in checkpoint.records("ghost-file", ghost)) == b"unlinked" * 1000
    assert b"caf\xe9" in b" ".join(record.message.reg.name for record in checkpoint.records("files"))
    contents = {bytes(record.message.name): record.message.shmid for record in checkpoint.records("memfd")}
    with PageImages(dump) as images:
        (extent,) = images.extents("pagemap-shmem", contents[b"memory"])
        assert os.pread(extent.fd, 6, extent.offset) == b"memory"


def test_page_counts_are_those_of_the_files(dump: Path) -> None:
    with PageImages(dump) as images:
        for record in Checkpoint.load(dump).records("pstree"):
            extents = images.extents("pagemap", record.message.pid)
            assert sum(extent.pages for extent in extents) * 4096 == os.fstat(extents[0].fd).st_size


def decode(crit: str, path: Path) -> dict[str, list[dict[str, object]]]:
    """What crit makes of an image."""
    result = subprocess.run([crit, "decode", "-i", path], capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 0, result.stderr
    decoded: dict[str, list[dict[str, object]]] = json.loads(result.stdout)
    return decoded


def test_crit_decodes_what_we_write(crit: str, tmp_path: Path) -> None:
    checkpoint = complete()
    save(checkpoint, tmp_path)
    for name in os.listdir(tmp_path):
        parsed = parse_name(name)
        if parsed is not None and parsed[0].message is not None:
            decoded = decode(crit, tmp_path / name)
            kind, ident = parsed
            assert len(decoded["entries"]) == max(
                len(checkpoint.records(kind.stem, ident)), 1 + (kind.stem == "pagemap")
            )
    assert decode(crit, tmp_path / "pstree.img")["entries"][0]["threads"] == [PID, PID + 1]
    run = decode(crit, tmp_path / f"pagemap-{PID}.img")["entries"][1]
    assert (int(str(run["vaddr"]), 0), run["nr_pages"]) == (AREA, 2)


def test_crit_decodes_a_dump_that_we_have_written_again(crit: str, dump: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    checkpoint = Checkpoint.load(dump)
    for record in checkpoint.records("files"):  # crit takes every name for UTF-8
        if record.message.HasField("reg"):
            record.message.reg.name = record.message.reg.name.replace(b"\xe9", b"e")
    checkpoint.save(again)
    for kind, ident in checkpoint.files():
        name = file_name(kind, ident)
        assert len(decode(crit, again / name)["entries"]) == len(checkpoint.records(kind, ident)), name
    files = decode(crit, again / "files.img")["entries"]
    assert [entry["id"] for entry in files] == [record.message.id for record in checkpoint.records("files")]


def write_pages_again(dump: Path, target: Path) -> None:
    """Write every pagemap and pages file as ours."""
    number = 0
    with PageImages(dump) as images, ImageDirectory(target) as directory:
        checkpoint = Checkpoint.load(dump)
        for kind, ident in checkpoint.files():
            if not kind.startswith("pagemap"):
                continue
            number += 1
            with PageWriter(directory, kind, ident, number) as writer:
                for vaddr, pages, fd, offset in images.extents(kind, ident):
                    os.pwrite(writer.fd, os.pread(fd, pages * PAGE_SIZE, offset), writer.add([vaddr], [pages]))


def until_gone(pids: set[int]) -> None:
    """Wait until nobody has these pids: an orphan is reaped by init, which takes its time."""
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def test_criu_restores_what_we_have_written(criu: Path, program: subprocess.Popen[str], tmp_path: Path) -> None:
    dump, again = tmp_path / "dump", tmp_path / "again"
    dump.mkdir()
    again.mkdir()
    command: list[str | Path] = [criu, "dump", "-t", str(program.pid), "-D", dump, "-o", "dump.log", "--file-locks"]
    subprocess.run(command, capture_output=True, check=True, timeout=60)
    program.wait(timeout=10)
    checkpoint = Checkpoint.load(dump, pagemaps=False)
    checkpoint.save(again)
    write_pages_again(dump, again)
    assert verify(again) == []
    until_gone({tid for record in checkpoint.records("pstree") for tid in record.message.threads})
    command = [criu, "restore", "-d", "-D", again, "-o", "restore.log", "--file-locks"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, (again / "restore.log").read_text()[-2000:]
    restored = Path(f"/proc/{program.pid}")
    try:
        assert b"mmap" in (restored / "cmdline").read_bytes()
        assert os.readlink(restored / "cwd") == os.getcwd()
    finally:
        os.killpg(program.pid, 9)

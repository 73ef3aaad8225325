"""Pages that processes have in common since a fork are shared again when the tree comes back from images."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from phaul_engine.dump import dump, open_store
from phaul_engine.images.directory import ImageDirectory
from phaul_engine.restore import restore
from phaul_engine.target import Tracer

from tests.kernel.skeletons import adopting, reap
from tests.subjects.programs import wait_until

_MIB = 1 << 20
# A parent, a child and a grandchild. Each says what its memory adds up to, and how much of it (KiB) is its own part.
_PROGRAM = """
import mmap, os, sys, time
ANONYMOUS, FILE = 12 << 20, 2 << 20
memory = mmap.mmap(-1, ANONYMOUS, flags=mmap.MAP_PRIVATE)
fd = os.open(sys.argv[1] + "/file", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, FILE)
file = mmap.mmap(fd, FILE, flags=mmap.MAP_PRIVATE)
for page in range(0, ANONYMOUS, 4096):
    memory[page:page + 8] = (page + 1).to_bytes(8, "little")
for page in range(0, FILE, 4096):
    file[page:page + 8] = (page + 7).to_bytes(8, "little")
who = "parent"
if os.fork() == 0:
    who = "child"
    memory[4096:4104] = bytes(8)
    memory.madvise(mmap.MADV_DONTNEED, 1 << 20, 1 << 20)
    own = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE)
    own[:] = b"c" * len(own)
    if os.fork() == 0:
        who = "grandchild"
        memory[8192:8200] = b"grandson"
        own.close()
        file.madvise(mmap.MADV_DONTNEED, 0, 4096)
while True:
    total = sum(int.from_bytes(memory[page:page + 8], "little") for page in range(0, ANONYMOUS, 4096))
    total += sum(int.from_bytes(file[page:page + 8], "little") for page in range(0, FILE, 4096))
    lines = [line.split() for line in open("/proc/self/smaps_rollup") if line.endswith("kB\\n")]
    sizes = {line[0]: int(line[1]) for line in lines}
    path = f"{sys.argv[1]}/{who}"
    with open(path + ".new", "w") as out:
        out.write(f"{total} {sizes['Anonymous:']} {sizes['Pss_Anon:']}")
    os.rename(path + ".new", path)
    time.sleep(0.02)
"""
_NAMES = ("parent", "child", "grandchild")


def _told(directory: Path) -> dict[str, tuple[int, int, int]]:
    """What each says next."""
    for name in _NAMES:
        (directory / name).unlink(missing_ok=True)
    wait_until(lambda: all((directory / name).exists() for name in _NAMES), "all three go on")
    told = {}
    for name in _NAMES:
        total, anonymous, part = map(int, (directory / name).read_text().split())
        told[name] = total, anonymous, part
    return told


def test_what_a_fork_left_in_common_is_in_common_again(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    quiet = subprocess.DEVNULL
    with adopting(), ImageDirectory(str(tmp_path / "images")) as images:
        command = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
        program = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
        program.returncode = 0  # it is waited for by number: it ends, and comes again
        before = _told(tmp_path)
        pids = _tree(program.pid)
        with Tracer() as tracer:
            _dump(tracer, program.pid, images)
        reap(pids)
        with Tracer() as tracer:
            assert restore(tracer, images) == program.pid
        try:
            after = _told(tmp_path)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            reap(pids)
    assert {name: told[0] for name, told in after.items()} == {name: told[0] for name, told in before.items()}
    for name in _NAMES:
        assert before[name][2] < before[name][1] * 0.7, "the program's processes share nothing: this tests nothing"
        assert after[name][2] < before[name][2] + 2048, f"the {name} has copies of its own"


def _tree(root: int) -> list[int]:
    pids = [root]
    for pid in pids:
        pids += [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return pids


def _dump(tracer: Tracer, pid: int, images: ImageDirectory) -> None:
    with contextlib.ExitStack() as stack:
        dump(tracer, pid, images, open_store(images, stack))

"""Files that wait beside their places in a tree's own mount namespace, finished by whoever has the journal alone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from phaul_engine.objects import staged
from phaul_engine.objects.base import SkeletonTask
from phaul_engine.objects.staged import Staged

DIRECTORY = os.O_PATH | os.O_DIRECTORY


@dataclass
class Tree:
    """One process in a mount namespace, which has `outer` of this host mounted somewhere, or a tmpfs. `place` is a
    directory there: on this host it is another one, or none."""

    process: subprocess.Popen[str]
    outer: Path
    place: Path
    task: SkeletonTask

    def stage(self) -> tuple[str, dict[str, Any]]:
        """A file for `place`, as an agent leaves it that dies: the directory it waits in, and the journal's entry."""
        parent = os.open(f"/proc/{self.process.pid}/root{self.place}", DIRECTORY)
        one = Staged(parent, staged.fresh_name(), "file", f"{self.place}/file", (self.task,))
        os.mkdir(one.directory, dir_fd=parent)
        os.close(os.open(f"{one.directory}/file", os.O_WRONLY | os.O_CREAT, dir_fd=parent))
        entry = one.entry()
        os.close(parent)
        return one.directory, entry["data"]

    def inside(self) -> list[str]:
        return os.listdir(f"/proc/{self.process.pid}/root{self.place}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(params=["of the host", "its own"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tree]:
    outer = tmp_path / "outer"
    (outer / "place").mkdir(parents=True)
    (spot := tmp_path / "spot").mkdir()
    mount = f"mount --bind {outer} {spot}" if request.param == "of the host" else f"mount -t tmpfs none {spot}"
    words = ["unshare", "--mount", "sh", "-c", f"{mount} && mkdir -p {spot}/place && echo up && exec sleep 600"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    proc = os.open(f"/proc/{process.pid}", DIRECTORY)
    root = os.open("root", DIRECTORY, dir_fd=proc)
    made = Tree(process, outer, spot / "place", SkeletonTask(process.pid, process.pid, proc, root, -1))
    yield made
    os.close(root)
    os.close(proc)
    if process.poll() is None:
        made.kill()


def test_one_that_is_to_go_goes_also_when_the_tree_is_dead(tree: Tree) -> None:
    """Of a tmpfs that only the tree had, nothing is left then."""
    for dead in (False, True):
        _, data = tree.stage()
        if dead:
            tree.kill()
        staged.undo(data)
        staged.undo(data)
        assert os.listdir(tree.outer / "place") == []
        assert dead or tree.inside() == []


def test_one_that_is_to_stay_gets_its_name(tree: Tree) -> None:
    waits_in, data = tree.stage()
    assert tree.inside() == [waits_in]
    staged.redo(data)
    staged.redo(data)
    assert tree.inside() == ["file"]
    assert not tree.place.exists(), "that is the host's, and not meant"


def test_a_directory_that_the_host_does_not_see_is_not_one_of_its_own(tree: Tree) -> None:
    """Of the same name: the tree is dead, and there is nothing to be done."""
    waits_in, data = tree.stage()
    tree.kill()
    if "tasks" not in data:
        assert data["directory"] == str(tree.outer / "place" / waits_in)
        return
    tree.place.mkdir()
    try:
        host = tree.place / waits_in
        host.mkdir()
        (host / "file").touch()
        staged.undo(data)
        staged.redo(data)
        assert (host / "file").exists()
    finally:
        subprocess.run(["rm", "-r", tree.place], check=True)

"""No two migrations work on one process, whoever asks first."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from phaul_engine.cgroup import Hierarchy, Hold, path_of

from phaul import claims, facts
from phaul.errors import RefusedError
from phaul.journal import Journal, Row, Store, Task, boot_id
from phaul.migration import Role
from phaul.migration import Row as State
from phaul.preflight import Questions

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.fixture
def family() -> Iterator[list[int]]:
    """A process, its child and its grandchild."""
    words = ["sh", "-c", "sh -c 'sleep 60 & echo $$ $!; wait' & wait"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout is not None
    pids = [child.pid, *map(int, child.stdout.readline().split())]
    yield pids
    os.killpg(child.pid, 9)
    child.wait()
    child.stdout.close()


def claim(store: Store, *pids: int, role: Role = Role.SOURCE, cgroup: str = "", name: str = "first") -> Journal:
    owner, tasks = Task.of(os.getpid()), tuple(Task.of(pid) for pid in pids)
    row = Row(migration=name, role=role, boot=boot_id(), owner=owner, peer="b", tasks=tasks, cgroup=cgroup)
    return store.create(row)


@pytest.mark.parametrize("root", [0, 1, 2])
def test_neither_the_tree_nor_a_part_of_it_nor_what_it_is_part_of(store: Store, family: list[int], root: int) -> None:
    assert claims.find(store, family[root]) == []
    with claim(store, family[1]) as journal:
        (found,) = claims.find(store, family[root])
        assert "migration first (prepared)" in str(found)
        with pytest.raises(RefusedError, match="is being moved to b by migration first"):
            claims.refuse(store, family[root])
        finding = facts.program_facts(family[root], store=store).findings[0]
        assert (finding.severity, finding.check) == ("blocker", "claimed")
        journal.transition(State.PREPARED, State.ABORTED)
        journal.end()
    assert claims.find(store, family[root]) == []


def test_another_process_of_the_same_number_is_nobody_s(store: Store, family: list[int]) -> None:
    with store.create(
        Row(
            migration="old",
            role=Role.SOURCE,
            boot=boot_id(),
            owner=Task(pid=1, start=1),
            tasks=(Task(pid=family[0], start=1),),
        )
    ):
        assert claims.find(store, family[0]) == []


def test_what_is_arriving_is_known_by_its_cgroup(store: Store, family: list[int]) -> None:
    with Hierarchy.find() as hierarchy:
        hold = Hold.create(hierarchy, path_of(family[0]), f"phaul-arriving-{os.getpid()}")
        try:
            hold.gather(lambda: family)
            with claim(store, *family, role=Role.DESTINATION, cgroup=hold.path):
                (found,) = claims.find(store, family[0])
                assert "has just arrived" in str(found)
                questions = Questions(numbers={family[1]: "pid"})
                assert f"which migration arriving-{os.getpid()} is making" in facts.answer(questions).taken[family[1]]
                hold.disband()
                assert claims.find(store, family[0]) == [], "from then on it is nobody's"
        finally:
            if hold.directory >= 0:
                hold.disband()


def _race(directory: Path, pid: int, number: int, barrier: Barrier, results: str) -> None:
    store = Store(directory)
    barrier.wait()
    try:
        with claims.exclusively(store):
            claims.refuse(store, pid)
            claim(store, pid, name=f"m{number}").close()
        (Path(results) / f"made-{number}").touch()
    except RefusedError:
        (Path(results) / f"refused-{number}").touch()


def test_of_many_at_once_one_begins(store: Store, family: list[int], tmp_path: Path) -> None:
    context, count = multiprocessing.get_context("fork"), 6
    barrier = context.Barrier(count)
    racers = [
        context.Process(target=_race, args=(store.directory, family[0], number, barrier, str(tmp_path)))
        for number in range(count)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(list(tmp_path.glob("made-*"))) == 1
    assert len(list(tmp_path.glob("refused-*"))) == count - 1


def test_nor_is_it_dumped(store: Store, family: list[int], tmp_path: Path) -> None:
    with claim(store, family[0]):
        for command in ("dump", "pre-dump"):
            words = [
                sys.executable,
                "-m",
                "phaul",
                command,
                "--pid",
                str(family[0]),
                "--images",
                str(tmp_path / "images"),
            ]
            environment = {**os.environ, "PHAUL_AGENT_STATE_DIRECTORY": str(store.directory)}
            done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 20, done.stderr
            assert "by migration first" in done.stderr
    assert os.path.exists(f"/proc/{family[2]}")

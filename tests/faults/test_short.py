"""No room at the destination, on disks for what comes along or in memory for pages: the program stays, and serves."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phaul.migration import Role
from tests.faults.scene import Scene, at_length, every_run, wait_hung
from tests.hosts import Host, Hosts, cgroups
from tests.hosts.host import Process
from tests.hosts.migrate import Migration, migrate_command, parse
from tests.subjects.programs import start_heap, wait_until

PROGRAM = """
import os, sys, time
size = 1 << 20
held = open(sys.argv[1], "w+b" if sys.argv[2] != "read" else "rb")
if sys.argv[2] != "read":
    held.write(b"x" * size)
    held.flush()
if sys.argv[2] == "deleted":
    os.unlink(sys.argv[1])
while True:
    assert os.pread(held.fileno(), size, 0) == b"x" * size
    with open("/srv/shared/said", "w") as out: out.write(str(time.monotonic()))
    time.sleep(0.01)
"""
_LITTLE = 96 << 20  # bytes: for an agent and a recovery, not for the program
CASES = {  # what kind of file, where it is, what has no room at the destination, options
    "deleted": ("/srv/own/ghost", "/srv/own", ()),
    "memory": ("/dev/shm/memory", "/dev/shm", ()),
    "read": ("/srv/own/library", "/srv/own", ("--ship", "missing")),
}


@contextmanager
def small(host: Host, place: str) -> Iterator[None]:
    """Hardly any room on a host's disk."""
    host.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=1777", "none", place])
    yield
    wait_until(lambda: host.run(["umount", place], check=False).returncode == 0, f"nobody uses {place}")


def move(hosts: Hosts, pid: int, options: tuple[str, ...]) -> Migration:
    words = [*migrate_command(pid, hosts.b, options), "--json", "--yes"]
    return parse(hosts.a.run(words, timeout=90.0, check=False))


def goes_on(hosts: Hosts, program: Process, file: Path) -> None:
    assert hosts.a.alive(program.pid)
    assert not hosts.b.alive(program.pid)
    before = file.read_text()
    wait_until(lambda: file.read_text() not in ("", before), "it goes on", 30.0)


@pytest.mark.parametrize("kind", every_run("deleted")(CASES))
def test_no_room_for_a_file_that_comes_along(hosts: Hosts, kind: str) -> None:
    place, full, options = CASES[kind]
    if kind == "read":
        hosts.a.path(place).write_bytes(b"x" * (1 << 20))
    scene, said = Scene(hosts), hosts.shared / "said"
    program = hosts.a.popen([sys.executable, "-c", PROGRAM, place, kind])
    wait_until(lambda: said.exists() and said.read_text() != "", "it works", 30.0)
    with small(hosts.b, full):
        migration = move(hosts, program.pid, options)
        assert migration.outcome in ("stayed", "refused"), f"{migration}\n{scene.told()}"
        assert "pace left" in migration.reason, str(migration)
        wait_until(lambda: scene.ended(Role.DESTINATION), "all is over", 30.0)
        left = [path.name for path in hosts.b.path(full).iterdir() if not path.name.endswith("bundle")]
        assert left == [], "a part of it is left there"
    goes_on(hosts, program, said)
    program.kill()
    scene.clear()


@at_length
def test_no_room_for_images_that_are_to_be_kept(hosts: Hosts) -> None:
    """The program has moved then; only its images are not kept."""
    scene = Scene.begin(hosts)
    hosts.a.run(["mkdir", "/srv/own/kept"])
    with small(hosts.a, "/srv/own/kept"):
        migration = scene.move(["--keep-images", "/srv/own/kept/images"])
        assert migration.outcome == "migrated", f"{migration}\n{scene.told()}"
        assert "No space left" in str(migration.events), str(migration)
        scene.agrees(migration)


@contextmanager
def little_memory(pids: list[int], bytes_: int) -> Iterator[None]:
    """Let processes have so much more memory, in a cgroup of the memory controller."""
    place = Path("/sys/fs/cgroup/memory")
    if not (place / "memory.limit_in_bytes").exists():
        pytest.skip("the memory controller of cgroup v1 is not here: the hosts' cgroups have none of v2")
    group = place / f"tests-{pids[0]}"
    homes = {pid: _memory_cgroup(pid) for pid in pids}
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(bytes_))
    for pid in pids:
        (group / "cgroup.procs").write_text(str(pid))
    yield
    for member in (group / "cgroup.procs").read_text().split():
        (place / homes.get(int(member), "") / "cgroup.procs").write_text(member)
    wait_until(lambda: (group / "cgroup.procs").read_text() == "", "it is empty")
    group.rmdir()


def _memory_cgroup(pid: int) -> str:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line.split(":")[2].lstrip("/") for line in lines if line.split(":")[1] == "memory")


@at_length
def test_no_memory_for_its_pages(hosts: Hosts) -> None:
    """The kernel kills somebody there: a task of the skeleton, or an agent."""
    scene = Scene(hosts)
    heap = start_heap(hosts.a, heap_mib=192, rate_mb=1)
    before = set(cgroups.members(hosts.b.cgroup))
    scene.arm(Role.DESTINATION, "after work BUILD", "hang")
    process = scene.start_pid(heap.pid)
    pid = wait_hung(hosts.b)
    scene.disarm()
    with little_memory(sorted(set(cgroups.members(hosts.b.cgroup)) - before - {0}), _LITTLE):
        hosts.b.kill(pid, signal.SIGCONT)
        migration = scene.answer(process, 120.0)
        assert migration.outcome == "stayed", f"{migration}\n{scene.told()}"
        wait_until(lambda: scene.ended(Role.SOURCE) and scene.ended(Role.DESTINATION), "all is over", 60.0)
        wait_until(lambda: not list(hosts.b.path("/run/phaul").glob("*.sock")), "nobody is at work", 60.0)
    assert not hosts.b.alive(heap.pid)
    heap.goes_on()
    heap.finish()
    scene.clear()

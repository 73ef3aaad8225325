"""A container whose bundle is a btrfs subvolume, to a host that has a place for it on btrfs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, Hosts, disks
from tests.hosts.files import describe
from tests.hosts.migrate import fault
from tests.migration.test_haul import PLACE, Container, explained
from tests.subjects.programs import wait_until

TOP = "/srv/own"
pytestmark = [
    pytest.mark.skipif(not shutil.which("runc"), reason="runc is not installed"),
    pytest.mark.skipif(bool(disks.lacks_btrfs()), reason=disks.lacks_btrfs()),
    pytest.mark.timeout(300),
]


@pytest.fixture
def one(hosts: Hosts, tmp_path: Path) -> Iterator[Container]:
    """A container of runc on host a."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(disks.mounted_on(hosts.a, tmp_path / "a", TOP))
        stack.enter_context(disks.mounted_on(hosts.b, tmp_path / "b", TOP, subvolume="top"))
        hosts.a.path(PLACE).parent.mkdir()
        hosts.a.run(["btrfs", "subvolume", "create", PLACE])
        yield stack.enter_context(Container(hosts, "runc").running())


def subvolumes(host: Host) -> list[str]:
    """Those of a host's file system, from where it is mounted."""
    lines = host.run(["btrfs", "subvolume", "list", "-o", TOP]).stdout.splitlines()
    return sorted(line.split()[-1].removeprefix("top/") for line in lines)


def test_it_goes_by_btrfs_and_back(hosts: Hosts, one: Container) -> None:
    before = describe(hosts.a.path(f"{PLACE}/rootfs/some"))
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        status, result = one.move(source)
        assert (status, result["outcome"]) == (0, "migrated"), result
        one.goes_on(destination)
        assert (one.state(source), one.state(destination)) == ("", "running")
        assert describe(destination.path(f"{PLACE}/rootfs/some")) == before
    assert subvolumes(hosts.a) == ["there/web", "there/web.migrated"], (
        "it came as a subvolume, and nothing else is left"
    )
    assert subvolumes(hosts.b) == ["there/web.migrated"]


UNDONE = [
    "source before work COPY: kill",
    "destination before work BUILD: error",
    "destination after row PREPARED-PARKED: kill",
    "destination before send READY: error",
]


@pytest.mark.parametrize("role", ["source", "destination"])
def test_an_agent_that_dies_while_a_snapshot_is_sent(hosts: Hosts, one: Container, role: str) -> None:
    hosts.a.path(f"{PLACE}/rootfs/large").write_bytes(os.urandom(64 << 20))
    staged = hosts.b.path(PLACE).parent
    one.is_cut_off(role, lambda: any(staged.glob("web.phaul-*.received/*/rootfs/large")))
    wait_until(lambda: subvolumes(hosts.a) == ["there/web"], f"no snapshot is left: {subvolumes(hosts.a)}", 60.0)
    wait_until(lambda: not staged.exists(), f"nor anything there: {subvolumes(hosts.b)}", 60.0)
    hosts.a.path(f"{PLACE}/rootfs/large").unlink()
    one.goes_on(hosts.a)
    explained(hosts)


@pytest.mark.parametrize("words", UNDONE)
def test_what_fails_leaves_nothing_there(hosts: Hosts, one: Container, words: str) -> None:
    before = subvolumes(hosts.b)
    with fault(hosts.a if words.startswith("source") else hosts.b, words):
        status, result = one.move(hosts.a)
    assert (status, result["outcome"]) == (30, "stayed"), result
    wait_until(lambda: subvolumes(hosts.b) == before, f"nothing is left: {subvolumes(hosts.b)}", 30.0)
    wait_until(lambda: not hosts.b.path(PLACE).parent.exists(), "nor anything else", 30.0)
    wait_until(lambda: subvolumes(hosts.a) == ["there/web"], f"nor here: {subvolumes(hosts.a)}", 30.0)
    one.goes_on(hosts.a)
    explained(hosts)

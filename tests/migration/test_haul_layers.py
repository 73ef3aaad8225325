"""A container whose root file system is an overlay takes along what it has written, and finds its image there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.files import describe, make_something_of_everything
from tests.hosts.migrate import fault
from tests.migration.test_haul import PLACE, Container, explained
from tests.subjects.programs import build, wait_until

TOP = "/srv/own"
pytestmark = [pytest.mark.skipif(not shutil.which("runc"), reason="runc is not installed"), pytest.mark.timeout(300)]


@dataclass
class Layered(Container):
    """Its image has two layers; the rest is in `home`. `image` is where they are."""

    image: str = f"{TOP}/image"
    home: str = f"{TOP}/written"
    options: str = ""

    def make(self) -> None:
        """The bundle and the mount on host a alone, the image on both."""
        bundle = self.hosts.a.path(PLACE)
        (bundle / "rootfs").mkdir(parents=True)
        self._make_image()
        self.write_config(bundle)
        for name in ("upper", "work"):
            self.hosts.a.path(f"{self.home}/{name}").mkdir(parents=True)
        lower = f"{self.image}/above:{self.image}/below"
        places = f"lowerdir={lower},upperdir={self.home}/upper,workdir={self.home}/work{self.options}"
        self.hosts.a.run(["mount", "-t", "overlay", "overlay", "-o", places, f"{PLACE}/rootfs"])
        root = bundle / "rootfs"
        make_something_of_everything(root / "some")
        shutil.rmtree(root / "replaced")  # becomes opaque
        (root / "replaced").mkdir()
        (root / "replaced" / "new").write_text("new")
        (root / "gone").unlink()  # becomes a whiteout
        (root / "changed").chmod(0o640)
        os.link(root / "changed", root / "linked")

    def _make_image(self) -> None:
        for host in (self.hosts.a, self.hosts.b):
            if host is self.hosts.b and self.image.startswith(PLACE):
                return
            below, above = host.path(f"{self.image}/below"), host.path(f"{self.image}/above")
            for directory in ("bin", "dev", "proc", "sys", "tmp", "data", "replaced/old"):
                (below / directory).mkdir(parents=True)
            above.mkdir()
            (above / "bin").mkdir()
            shutil.copy2(build("filer", "-static"), below / "bin" / "filer")
            shutil.copy2("/bin/busybox", above / "bin" / "busybox")
            for name in ("gone", "changed", "kept"):
                (below / name).write_text(f"{name}\n" * 100)
                os.utime(below / name, ns=(1, 1_234_567_890_123_456_789))
            (below / "same time, same size").write_text("here" if host is self.hosts.a else "ther")
            os.utime(below / "same time, same size", ns=(1, 1_234_567_890_123_456_789))

    def check(self, host: Host, before: dict[str, object]) -> None:
        """What is seen of it is what was, and it is in layers."""
        root = host.path(f"{PLACE}/rootfs")
        assert seen(root) == before
        upper = host.path(f"{self.home}/upper")
        assert (upper / "gone").is_char_device()
        assert not (upper / "kept").exists(), "what the image has was not sent"
        assert not (upper / "bin" / "filer").exists()

    def remove(self) -> None:
        super().remove()
        for each in (self.hosts.a, self.hosts.b):
            each.run(["sh", "-c", f"umount {PLACE}/rootfs {self.image}; rm -rf {TOP}/*"], check=False)


def seen(root: Path) -> dict[str, object]:
    """What does not change by itself."""
    files = {name: root / name for name in ("kept", "changed", "linked", "gone", "same time, same size")}
    contents = {name: (path.lstat().st_mode, path.read_text()) for name, path in files.items() if path.exists()}
    return {**contents, **{name: describe(root / name) for name in ("some", "replaced", "bin")}}


def mounts(host: Host) -> list[str]:
    """What is mounted of the container."""
    return [line for line in host.run(["cat", "/proc/mounts"]).stdout.splitlines() if line.startswith("overlay ")]


def left(host: Host) -> list[str]:
    """All that is there, without what is in it."""
    top = host.path(TOP)
    return sorted(str(one.relative_to(top)) for pattern in ("*", "there/*", "written/*") for one in top.glob(pattern))


@pytest.fixture(params=["apart", "another file system", "in the bundle"])
def one(hosts: Hosts, request: pytest.FixtureRequest) -> Iterator[Layered]:
    """A container of runc on host a, whose layers are in one place or another."""
    made = Layered(hosts, "runc")
    if request.param == "another file system":
        for host in (hosts.a, hosts.b):
            host.path(made.image).mkdir()
            host.run(["mount", "-t", "tmpfs", "-o", "size=64m", "image", made.image])
        made.options = ",xino=off"
    if request.param == "in the bundle":
        made.image, made.home = PLACE, PLACE
    with made.running():
        yield made


def test_it_takes_along_what_it_has_written(hosts: Hosts, one: Layered) -> None:
    before = seen(hosts.a.path(f"{PLACE}/rootfs"))
    (shown,) = mounts(hosts.a)
    for source, destination in ((hosts.a, hosts.b), (hosts.b, hosts.a)):
        status, result = one.move(source)
        assert (status, result["outcome"]) == (0, "migrated"), result
        one.goes_on(destination)
        assert (one.state(source), one.state(destination)) == ("", "running")
        assert (mounts(source), mounts(destination)) == ([], [shown])
        one.check(destination, before)
        assert not [name for name in left(destination) if "phaul" in name]
        assert f"there/{Path(PLACE).name}" not in left(source)
        assert "written/upper" not in left(source)
        done = destination.run(["runc", "exec", one.name, "/bin/busybox", "cat", "/kept"])
        assert done.stdout == "kept\n" * 100


@pytest.mark.parametrize("role", ["source", "destination"])
@pytest.mark.parametrize("one", ["apart", "in the bundle"], indirect=True)
def test_an_agent_that_dies_while_it_is_filled(hosts: Hosts, one: Layered, role: str) -> None:
    before, there = seen(hosts.a.path(f"{PLACE}/rootfs")), left(hosts.b)
    hosts.a.path(f"{PLACE}/rootfs/large").write_bytes(os.urandom(64 << 20))
    one.is_cut_off(role, lambda: any(hosts.b.path(f"{PLACE}/..").glob("web.phaul-*/rootfs/.large*")))
    wait_until(lambda: (mounts(hosts.b), left(hosts.b)) == ([], there), f"nothing is left: {left(hosts.b)}", 60.0)
    hosts.a.path(f"{PLACE}/rootfs/large").unlink()
    assert seen(hosts.a.path(f"{PLACE}/rootfs")) == before
    one.goes_on(hosts.a)
    explained(hosts)


FINISHED = ["destination after row PARKED-RESUMED: kill", "source after row COMMITTED-RELEASED: kill"]
UNDONE = [
    "destination after work BUILD: error",
    "destination after row PREPARED-PARKED: kill",
    "source after work FREEZE: kill",
]


@pytest.mark.parametrize("words", UNDONE)
@pytest.mark.parametrize("one", ["apart", "in the bundle"], indirect=True)
def test_what_fails_leaves_nothing_there(hosts: Hosts, one: Layered, words: str) -> None:
    before, there = seen(hosts.a.path(f"{PLACE}/rootfs")), left(hosts.b)
    with fault(hosts.a if words.startswith("source") else hosts.b, words):
        status, result = one.move(hosts.a)
    assert (status, result["outcome"]) == (30, "stayed"), result
    one.goes_on(hosts.a)
    assert seen(hosts.a.path(f"{PLACE}/rootfs")) == before
    assert (mounts(hosts.b), left(hosts.b)) == ([], there)
    explained(hosts)


@pytest.mark.parametrize("words", FINISHED)
@pytest.mark.parametrize("one", ["apart", "in the bundle"], indirect=True)
def test_what_dies_after_the_commit_is_finished(hosts: Hosts, one: Layered, words: str) -> None:
    before = seen(hosts.a.path(f"{PLACE}/rootfs"))
    with fault(hosts.a if words.startswith("source") else hosts.b, words):
        one.move(hosts.a)
    aside = "there/web.migrated" if one.home == PLACE else "written/upper.migrated"
    wait_until(lambda: aside in left(hosts.a) and not mounts(hosts.a), f"it is put aside: {left(hosts.a)}", 60.0)
    wait_until(lambda: not [name for name in left(hosts.b) if "phaul" in name], f"names: {left(hosts.b)}", 30.0)
    wait_until(lambda: (one.state(hosts.a), one.state(hosts.b)) == ("", "running"), "it is there", 30.0)
    one.check(hosts.b, before)
    one.goes_on(hosts.b)
    explained(hosts)


@pytest.mark.parametrize("one", ["apart"], indirect=True)
def test_what_is_found_before_anything_is_touched(hosts: Hosts, one: Layered) -> None:
    def refused(reason: str, *options: str) -> None:
        status, result = one.move(hosts.a, *options)
        assert (status, reason in str(result["reason"])) == (20, True), result

    refused("or let phaul send it: --ship missing", "--ship", "none")
    hosts.b.path(f"{one.image}/above").rename(hosts.b.path(f"{one.image}/elsewhere"))
    refused(f"its lower directory {one.image}/above is not there")
    hosts.b.path(f"{one.image}/elsewhere").rename(hosts.b.path(f"{one.image}/above"))
    hosts.b.path(f"{one.home}/upper/somebody's").mkdir(parents=True)
    refused(f"{one.home}/upper is there already")
    assert left(hosts.b) == ["image", "written", "written/upper"]

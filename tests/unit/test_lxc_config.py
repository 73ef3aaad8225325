"""Configurations of LXC containers, and what is compared of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from phaul.errors import PhaulError
from phaul.workloads import lxc_config
from phaul.workloads.lxc import _coming, _other


def test_it_is_read_with_what_it_includes(tmp_path: Path) -> None:
    (tmp_path / "more.d").mkdir()
    (tmp_path / "more.d" / "b.conf").write_text("lxc.tty.max = 4\n")
    (tmp_path / "more.d" / "a.txt").write_text("lxc.tty.max = 5\n")
    text = (
        f'# a comment\nlxc.include = {tmp_path}/more.d\nlxc.include = {tmp_path}/none\nlxc.uts.name="web"\n\nnonsense\n'
    )
    (tmp_path / "config").write_text(text)
    assert lxc_config.read(tmp_path / "config") == [("lxc.tty.max", "4"), ("lxc.uts.name", "web")]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PhaulError, match="No such file"):
        lxc_config.read(tmp_path / "config")
    (tmp_path / "config").write_text(f"lxc.include = {tmp_path}/config\n")
    with pytest.raises(PhaulError, match="too deeply"):
        lxc_config.read(tmp_path / "config")


@pytest.mark.parametrize(
    ("text", "root"),
    [("/srv/web", "/srv/web"), ("dir:/srv/web", "/srv/web"), ("overlay:/a:/b", None), ("/dev/vg/web", None)],
)
def test_the_root_is_a_directory_or_is_mounted(text: str, root: str | None) -> None:
    assert lxc_config.root(text) == root


def test_what_may_differ_between_hosts() -> None:
    here = [("lxc.net.0.type", "veth"), ("lxc.net.0.link", "br0"), ("lxc.rootfs.path", "/a"), ("lxc.hook.start", "/x")]
    there = [("lxc.net.0.type", "veth"), ("lxc.net.0.link", "br1"), ("lxc.rootfs.path", "/b")]
    assert not list(_other({"config": here}, there))
    (finding,) = _other({"config": [*here, ("lxc.cap.drop", "sys_admin")]}, there)
    assert "lxc.cap.drop = sys_admin (only here)" in finding.text
    (finding,) = _other({"config": here}, [*there, ("lxc.cap.keep", "none")])
    assert "lxc.cap.keep = none (only there)" in finding.text


def test_one_that_comes_along_with_its_root() -> None:
    text = "lxc.rootfs.path = dir:/srv/web\nlxc.tty.max = 4\n"
    facts = {"name": "web", "config": [list(entry) for entry in lxc_config.own(text)], "text": text}
    path = Path("/var/lib/lxc/web/config")
    assert not list(_coming(facts, path, ["/srv/web"]))
    (finding,) = _coming(facts, path, [])
    assert "there is no container web there" in finding.text
    hooks = text + "lxc.hook.start = /bin/true\nlxc.net.0.script.up = /bin/true\n"
    assert [one.check for one in _coming(facts | {"text": hooks}, path, ["/srv/web"])] == ["lxc-hooks"] * 2
    for lost in ("", text.replace("4", "5"), " " * 100_000):
        assert len(list(_coming(facts | {"text": lost}, path, ["/srv/web"]))) == 1

"""What is said of directories that go along, before anything is touched."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from phaul_engine.errors import EngineError
from phaul_engine.namespaces.mnt import externals
from phaul_engine.namespaces.mnt.judge import Host
from phaul_engine.proc.mountinfo import parse_mounts

from phaul.haul import arriving, layers, rsync, trees, wire
from phaul.haul.layers import Layers
from phaul.haul.places import NOWHERE, Places
from phaul.haul.trees import Tree, TreeAnswer
from phaul.migration import Verdict
from phaul.policy import Gate, Incoming, Rule
from phaul.source.rounds import Passed, Wanted, decide, predict

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def _checks(tree: Tree, answer: TreeAnswer, *, ship: bool = True) -> list[tuple[str, str]]:
    found = trees.findings([tree], {tree.path: answer}, "there", ship=ship)
    return [(one.severity, one.check) for one in found]


def test_what_is_found() -> None:
    tree, free = Tree("/a/web", names=3, size=1000), TreeAnswer("free", free=2000)
    assert _checks(tree, TreeAnswer("shared")) == []
    assert _checks(tree, free) == [("warning", "tree-sent")]
    (found,) = trees.findings([replace(tree, mounted=True)], {tree.path: free}, "there", ship=True)
    assert "unmount it then" in found.advice
    assert _checks(tree, free, ship=False) == [("blocker", "tree-missing")]
    assert _checks(tree, TreeAnswer("free", free=1000)) == [("blocker", "tree-room")]
    assert _checks(tree, TreeAnswer("taken", "it is there")) == [("blocker", "tree-in-the-way")]
    assert _checks(tree, TreeAnswer("taken", "it is there"), ship=False) == []
    assert _checks(Tree("/a/web", problem="a mount"), free) == [("blocker", "tree-mounts")]
    assert trees.hauled([tree, Tree("/b")], {"/a/web": free, "/b": TreeAnswer("shared")}) == ("/a/web",)


def test_what_is_found_of_a_room_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    tree, free = Tree("/a/web", names=3, size=1000, room=True), TreeAnswer("free", free=2000, rsync=True)
    monkeypatch.setattr(rsync, "here", lambda: True)
    assert _checks(tree, free) == [("warning", "tree-sent")]
    assert _checks(tree, free, ship=False) == [("blocker", "tree-missing")]
    assert _checks(tree, TreeAnswer("free", free=2000)) == [("blocker", "tree-rsync")]
    assert _checks(tree, TreeAnswer("free", free=1000, rsync=True)) == [("blocker", "tree-room")]
    assert _checks(Tree("/a/web", problem="a mount", room=True), free) == [("blocker", "tree-mounts")]
    monkeypatch.setattr(rsync, "here", lambda: False)
    assert _checks(tree, free) == [("blocker", "tree-rsync")]
    assert trees.answer(Tree("/none/there", room=True)).state == "free"


def _layers(options: str) -> Layers | None:
    line = "30 1 0:40 / /a/web/rootfs rw,nosuid,relatime shared:5 - overlay over rw,{}\n"
    other = "29 1 0:39 / /a/web/rootfs rw - tmpfs tmpfs rw\n"
    return layers.of("/a/web/rootfs", parse_mounts((other + line.format(options)).encode()))


def test_layers_of_a_mount() -> None:
    places = "upperdir=/w/upper,workdir=/w/work"
    known = _layers(f"lowerdir=/image/b:/image/a\\040a,{places},redirect_dir=on,uuid=on,nouserxattr")
    assert known == Layers(
        ("/image/b", "/image/a a"), "/w/upper", "/w/work", ("redirect_dir=on",), ("nosuid", "relatime")
    )
    assert known is not None
    assert known.problem == ""
    assert known.text == f"lowerdir=/image/b:/image/a a,{places},redirect_dir=on"
    assert layers.checked({"/a": asdict(known)}) == {"/a": known}
    assert layers.inside("/w", {"/a": known}) == ("upper", "work")
    assert layers.inside("/w/upper", {"/a": known}) == ()
    same = _layers(f"lowerdir+=/image/b,lowerdir+=/image/a\\040a,{places}")
    assert same is not None
    assert same.lower == known.lower
    for options in (
        "lowerdir=/image",
        f"lowerdir=1:2,{places}",
        f"lowerdir=/a::/b,{places}",
        f"lowerdir=/a\\134:b,{places}",
        "lowerdir=/a,upperdir=/w/upper,workdir=/elsewhere/work",
        "lowerdir=/a,upperdir=/upper,workdir=/work",
        f"lowerdir=/a,{places},verity=on",
        f"lowerdir=/{'a' * 4000},{places}",
    ):
        found = _layers(options)
        assert found is not None
        assert found.problem, options
        with pytest.raises(EngineError):
            layers.checked({"/a": asdict(found)})
    assert layers.of("/a/web", ()) is None
    assert [one.check for one in trees.too_old({"/a": known}, "there", able=False)] == ["tree-version"]
    assert list(trees.too_old({"/a": known}, "there", able=True)) == []
    for nonsense in ({"/a": 5}, {"/a": {"colour": "red"}}, "text"):
        with pytest.raises(EngineError):
            layers.checked(nonsense)


@root_only
def test_storage_is_shared_if_a_token_is_read(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "file").write_text("content")
    before = os.stat(tmp_path / "web").st_mtime_ns
    with trees.with_tokens([trees.describe(str(tmp_path / "web"), counted=True)]) as (tree,):
        assert trees.answer(tree).state == "shared"
        assert tree.names == 1
        other = Tree(tree.path, token=tree.token, secret="another")
        assert trees.answer(other).state == "taken"
        assert trees.answer(Tree(tree.path, token="/etc/passwd", secret="")).state == "taken"
    assert os.listdir(tmp_path / "web") == ["file"]
    assert os.stat(tmp_path / "web").st_mtime_ns == before
    assert trees.answer(Tree(str(tmp_path / "none"))).state == "free"
    (tmp_path / "empty").mkdir()
    assert trees.answer(Tree(str(tmp_path / "empty"))).state == "free"
    (tmp_path / "link").symlink_to("empty")
    assert trees.answer(Tree(str(tmp_path / "link"))).state == "taken"
    assert trees.answer(Tree("/proc")).state == "taken"
    (tmp_path / "empty").chmod(0o777)
    assert trees.answer(Tree(str(tmp_path / "empty" / "web"))).state == "taken"


def test_places() -> None:
    assert NOWHERE.command("runc", "create") == ["runc", "create"]
    places = Places((("/a/web", "/a/web.new"),))
    assert [places.now(path) for path in ("/a/web", "/a/web/x", "/a/webs")] == ["/a/web.new", "/a/web.new/x", "/a/webs"]
    options = {externals.PLACES: places.staged}
    assert [externals.place(options, path) for path in ("/a/web/x", "/a/webs")] == ["/a/web.new/x", "/a/webs"]


@root_only
def test_a_command_sees_the_final_names(tmp_path: Path) -> None:
    import subprocess

    pairs = []
    for name in ("a b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.new").mkdir()
        (tmp_path / f"{name}.new" / "file").write_text(name)
        pairs.append((str(tmp_path / name), str(tmp_path / f"{name}.new")))
    words = ["cat", *(f"{final}/file" for final, _ in pairs)]
    done = subprocess.run(Places(tuple(pairs)).command(*words), capture_output=True, text=True, check=True)
    assert done.stdout == "a bc"
    assert os.listdir(tmp_path / "c") == []


@pytest.mark.parametrize("path", ["", "a", "/", "/a/../b", "/a/", "/a//b", "/a\0"])
def test_what_is_no_place(path: str) -> None:
    with pytest.raises(EngineError):
        arriving.check_place(path)


@pytest.mark.parametrize(
    "body", [b"x", b"\1\0\0\0", b"\x02\0\0\0\0\0\0\0{}x", b"\1\0\0\0\0\0\0\0x", b"\2\0\0\0\xff\0\0\0{}"]
)
def test_records_that_are_none(body: bytes) -> None:
    with pytest.raises(EngineError):
        list(wire.unpack(body))


def test_records_travel() -> None:
    records = [wire.Record({"op": "data", "path": "na\udcffme"}, b"\0\xff"), wire.Record({"op": "end"}, b"")]
    found = list(wire.unpack(b"".join(map(wire.pack, records))))
    assert [(one.fields, bytes(one.data)) for one in found] == [(one.fields, one.data) for one in records]


def test_a_policy_that_lets_nobody_be_root() -> None:
    gate = Gate("me", Rule(users=("me",), paths=("/srv",)), strict=True)
    assert any("decides what" in one for one in gate.refusals("destination", Incoming(hauled=("/srv/web",))))
    gate = Gate("me", Rule(users=("me",), paths=("/srv",), root=True), strict=True)
    assert gate.refusals("destination", Incoming(hauled=("/srv/web",))) == []
    assert any("/opt/web" in one for one in gate.refusals("destination", Incoming(hauled=("/opt/web",))))
    assert gate.refusals("source", Incoming(hauled=("/opt/web",))) == []


def test_files_are_part_of_the_predicted_downtime() -> None:
    wanted = Wanted(max_downtime=0.1, max_rounds=30)
    without, more = Passed(1000, 4_096_000, 1.0, 10), Passed(1000, 4_096_000, 1.0, 10, haul=0.2)
    assert predict([more], 0.01, wanted) == pytest.approx(predict([without], 0.01, wanted) + 0.2)
    assert decide([without], 0.02, wanted).verdict is Verdict.SWITCH
    assert decide([more], 0.02, wanted).verdict is Verdict.ANOTHER


def test_the_name_that_is_hauled_is_preferred(tmp_path: Path) -> None:
    web, alias = tmp_path / "web", tmp_path / "alias"
    web.mkdir()
    alias.symlink_to(tmp_path)
    status = web.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    text = f"1 0 {device} / / rw - ext4 x rw\n2 1 {device} {tmp_path} {alias} rw - ext4 x rw\n".encode()
    mounts = parse_mounts(text)
    wanted = mounts[0].dev, os.fsencode(str(web)), (status.st_dev, status.st_ino)
    assert Host(mounts).path(*wanted) == str(web)
    assert Host(mounts, [str(alias / "web")]).path(*wanted) == str(alias / "web")


def test_what_rsync_says_of_files_that_go_away() -> None:
    vanished = 'file has vanished: "/a/web/data/1"'
    directory = 'directory has vanished: "/a/web/data/made.2"'
    acl = "rsync: [sender] get_acl: sys_acl_get_file(data/2, ACL_TYPE_ACCESS): No such file or directory (2)"
    end = "rsync error: some files/attrs were not transferred (see previous errors) (code 23) at main.c(1338)"
    denied = 'rsync: [sender] send_files failed to open "/a/web/data/3": Permission denied (13)'
    skipped = "IO error encountered -- skipping file deletion"
    assert rsync.outcome(0, "") is rsync.Sent.WHOLE
    assert rsync.outcome(24, vanished) is rsync.Sent.LESS
    assert rsync.outcome(23, "\n".join((acl, skipped, vanished, directory, end))) is rsync.Sent.AGAIN
    assert rsync.outcome(23, "\n".join((acl, denied, end))) is None
    assert rsync.outcome(12, acl) is None


@root_only
def test_what_is_in_the_way_of_layers(tmp_path: Path) -> None:
    for name in ("image", "home", "point"):
        (tmp_path / name).mkdir()
    top = str(tmp_path)
    known = Layers((f"{top}/image",), f"{top}/home/upper", f"{top}/home/work")
    tree = Tree(f"{top}/point", layers=known)
    assert trees.answer(tree).state == "free"
    elsewhere = replace(known, lower=(f"{top}/web/image",))
    assert "web/image is not there" in trees.answer(replace(tree, layers=elsewhere)).text
    assert trees.answer(replace(tree, layers=elsewhere), [f"{top}/web"]).state == "free", "it comes along"
    for name in ("point/file", "home/work/work", "home/upper/file"):
        (tmp_path / name).mkdir(parents=True)
        found = trees.answer(tree)
        assert found.text == f"{(tmp_path / name).parent} is there already"
        assert _checks(tree, found) == [("blocker", "tree-in-the-way")]
        assert _checks(tree, found, ship=False) == [], "somebody has seen to it"
        (tmp_path / name).rmdir()

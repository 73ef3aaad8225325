"""What the rebuilding of a tree may not do to this host's files, whatever its images say."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from phaul_engine.errors import EngineError, ImageError, RebuildError
from phaul_engine.footprint import Account, accounts, footprint
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import (
    core_pb2,
    creds_pb2,
    fdinfo_pb2,
    ghost_file_pb2,
    memfd_pb2,
    pstree_pb2,
    regfile_pb2,
    remap_file_path_pb2,
    userns_pb2,
)
from phaul_engine.objects import carried_file, confinement, ghost_file, unix_names
from phaul_engine.objects.base import Restoration
from phaul_engine.objects.confinement import Confinement
from phaul_engine.objects.regular_file import open_at_root, open_named
from phaul_engine.user_ids import ALL, UserIds

UID, GID = 4242, 4343


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that everybody may enter, with `in` (anybody's to write) and `out` in it."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent == Path("/tmp"):
            break
        parent.chmod(0o755)
    for name, mode in (("in", 0o777), ("out", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    return tmp_path


def images(*, uid: int = UID, gid: int = GID, groups: tuple[int, ...] = (), capabilities: int = 0) -> Checkpoint:
    """Of a tree of one process that is nobody else."""
    checkpoint = Checkpoint()
    checkpoint.put("pstree", None, pstree_pb2.pstree_entry(pid=100, ppid=0, pgid=100, sid=100, threads=[100]))
    ids: dict[str, Any] = dict.fromkeys(("uid", "euid", "suid", "fsuid"), uid) | dict.fromkeys(
        ("gid", "egid", "sgid", "fsgid"), gid
    )
    creds = creds_pb2.creds_entry(**ids, groups=groups, secbits=0, cap_prm=[capabilities, 0])
    core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
    core.thread_core.creds.CopyFrom(creds)
    checkpoint.put("core", 100, core)
    return checkpoint


def confined(place: Path, checkpoint: Checkpoint, *, privileged: bool = False) -> Restoration:
    rule = Confinement((f"{place}/in",), privileged)
    return Restoration(checkpoint, options={confinement.OPTION: rule})


def regular(checkpoint: Checkpoint, file_id: int, path: str, flags: int = os.O_RDWR) -> fdinfo_pb2.file_entry:
    entry = regfile_pb2.reg_file_entry(id=file_id, flags=flags, pos=0, name=path.encode(), mode=stat.S_IFREG | 0o600)
    entry.fown.SetInParent()
    for field in ("uid", "euid", "signum", "pid_type", "pid"):
        setattr(entry.fown, field, 0)
    made = fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=file_id, reg=entry)
    checkpoint.put("files", None, made)
    return made


def test_a_file_is_opened_with_the_programs_own_rights(place: Path) -> None:
    secret, shared, mine = place / "in/secret", place / "in/shared", place / "in/mine"
    for path, owner, group, mode in ((secret, 0, 0, 0o600), (shared, 0, 77, 0o640), (mine, UID, 0, 0o600)):
        path.write_text("x")
        os.chown(path, owner, group)
        path.chmod(mode)
    restoration = confined(place, images(groups=(77,)))
    os.close(open_at_root(str(mine), os.O_RDWR, restoration))
    os.close(open_at_root(str(shared), os.O_RDONLY, restoration))
    for path, flags in ((secret, os.O_RDONLY), (shared, os.O_RDWR), (Path("/etc/shadow"), os.O_RDONLY)):
        with pytest.raises(RebuildError, match=r"its accounts \(uid 4242\) could not open it by themselves"):
            open_at_root(str(path), flags, restoration)
    assert os.geteuid() == 0  # the engine is who it was
    os.close(os.open(secret, os.O_RDONLY))


def test_root_opens_all_but_writes_only_where_it_may(place: Path) -> None:
    (place / "out/log").write_text("x")
    (place / "in/log").write_text("x")
    (place / "in/link").symlink_to(place / "out/log")
    restoration = confined(place, images(uid=0, gid=0), privileged=True)
    os.close(open_at_root("/etc/shadow", os.O_RDONLY, restoration))
    os.close(open_at_root(f"{place}/in/log", os.O_RDWR, restoration))
    os.close(open_at_root("/dev/null", os.O_RDWR, restoration))
    os.close(open_at_root(f"{place}/out", os.O_PATH, restoration))
    for path in (f"{place}/out/log", f"{place}/in/link", f"{place}/in/../out/log"):
        with pytest.raises(RebuildError, match=r"lets it write files beneath .*/in only"):
            open_at_root(path, os.O_WRONLY, restoration)


def ghost(checkpoint: Checkpoint, path: str, **changes: int) -> fdinfo_pb2.file_entry:
    entry = regular(checkpoint, 5, path)
    head: dict[str, Any] = {
        "uid": UID,
        "gid": GID,
        "mode": stat.S_IFREG | 0o600,
        "dev": 1,
        "ino": 1,
        "rdev": 0x100003,
    } | changes
    checkpoint.put("ghost-file", 1, ghost_file_pb2.ghost_file_entry(**head))
    kind = remap_file_path_pb2.GHOST
    checkpoint.put(
        "remap-fpath", None, remap_file_path_pb2.remap_file_path_entry(orig_id=5, remap_id=1, remap_type=kind)
    )
    return entry


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("in/x", {}, ""),
        ("in/new/x", {}, ""),
        ("out/x", {}, "make files beneath"),
        ("in/../out/x", {}, "no possible path"),
        ("in/link/x", {}, "make files beneath"),
        ("out/new/x", {}, "make files beneath"),
        ("in/x", {"uid": 0}, "it would belong to uid 0"),
        ("in/x", {"mode": stat.S_IFREG | 0o2755, "gid": 0}, "it would run as group 0"),
        ("in/x", {"mode": stat.S_IFCHR | 0o666}, "make the device"),
        ("in/x", {"mode": stat.S_IFBLK | 0o666}, "of an impossible type"),
    ],
)
def test_ghosts(place: Path, path: str, changes: dict[str, int], words: str) -> None:
    (place / "in/link").symlink_to(place / "out")
    checkpoint = images()
    entry = ghost(checkpoint, f"{place}/{path}", **changes)
    restoration = confined(place, checkpoint)
    try:
        if not words:
            os.close(open_named(entry, restoration))
            ghost_file.release(restoration)
        else:
            with pytest.raises(EngineError, match=words):
                open_named(entry, restoration)
    finally:
        assert sorted(os.listdir(place / "in")) == ["link"]
        assert os.listdir(place / "out") == []


def test_only_a_second_name_is_removed(place: Path) -> None:
    (place / "in/precious").write_text("x")
    checkpoint = images()
    entry = regular(checkpoint, 5, f"{place}/in/gone")
    regular(checkpoint, 6, f"{place}/in/precious")
    remap = remap_file_path_pb2.remap_file_path_entry(orig_id=5, remap_id=6, remap_type=remap_file_path_pb2.LINKED)
    checkpoint.put("remap-fpath", None, remap)
    with pytest.raises(ImageError, match="a name that was given for the time of the move"):
        open_named(entry, confined(place, checkpoint, privileged=True))
    assert (place / "in/precious").exists()


@pytest.mark.parametrize(
    ("path", "uid", "words"),
    [("in/x", UID, ""), ("out/x", UID, "beneath"), ("in/link/x", UID, "beneath"), ("in/x", 0, "belong")],
)
def test_files_that_are_carried(place: Path, path: str, uid: int, words: str) -> None:
    (place / "in/link").symlink_to(place / "out")
    restoration = confined(place, images())
    entry = memfd_pb2.memfd_inode_entry(
        name=b"x",
        uid=uid,
        gid=GID,
        size=4096,
        shmid=1,
        inode_id=1,
        mode=0o600,
        phaul_path=f"{place}/{path}".encode(),
        phaul_mtime=1,
    )
    if words:
        with pytest.raises(RebuildError, match=words):
            carried_file.create(entry, restoration)
    else:
        os.close(carried_file.create(entry, restoration))
        carried_file.publish(set(), restoration)
    assert os.listdir(place / "in") == ["link"]
    assert os.listdir(place / "out") == []


@pytest.mark.parametrize(
    ("path", "uid", "words"),
    [("in/s", UID, ""), ("out/s", UID, "beneath"), ("in/link/s", UID, "beneath"), ("in/s", 0, "belong")],
)
def test_names_of_unix_sockets(place: Path, path: str, uid: int, words: str) -> None:
    (place / "in/link").symlink_to(place / "out")
    restoration = confined(place, images())
    name = f"{place}/{path}".encode()
    permissions = unix_names.Permissions(stat.S_IFSOCK | 0o600, uid, GID)
    with socket.socket(socket.AF_UNIX) as sock:
        if words:
            with pytest.raises(RebuildError, match=words):
                unix_names.bind(sock, name, unix_names.Place(name), permissions, restoration)
        else:
            unix_names.bind(sock, name, unix_names.Place(name), permissions, restoration).discard()
    assert os.listdir(place / "in") == ["link"]
    assert os.listdir(place / "out") == []


def test_the_footprint() -> None:
    checkpoint = images(groups=(7, 8))
    regular(checkpoint, 1, "/srv/w", os.O_WRONLY)
    regular(checkpoint, 2, "/srv/r", os.O_RDONLY)
    ghost(checkpoint, "/srv/g")
    found = footprint(checkpoint)
    assert (found.tasks, found.uids, found.privileged) == (1, (UID,), "")
    assert found.writes == ("/srv/g", "/srv/w")
    assert accounts(checkpoint) == (Account(UID, GID, (7, 8)),)
    assert footprint(images(uid=0)).privileged == "process 100 runs as root"
    assert footprint(images(capabilities=1 << 21)).privileged == "process 100 has capabilities"
    for lower, words in ((100_000, ""), (0, "process 100 runs as root")):
        mapped = images(uid=0, gid=0, capabilities=1 << 21)
        space = userns_pb2.userns_entry()
        for extents in (space.uid_map, space.gid_map):
            extents.add(first=0, lower_first=lower, count=10)
        mapped.put("userns", 3, space)
        assert footprint(mapped).privileged == words
        assert footprint(mapped).uids == (lower, lower + 9)
        assert accounts(mapped) == (Account(lower, lower),)
    bare = images()
    bare.records("core", 100)[0].message.thread_core.ClearField("creds")
    assert footprint(bare).privileged == "process 100 runs as root"


def below(outer: int, *, lower: int, parent: int = 6) -> Checkpoint:
    """A process that is root in a user namespace below the one that the engine is in, and user `outer` out of it."""
    checkpoint = images(uid=0, gid=0, capabilities=1 << 21)
    creds = checkpoint.one("core", 100).thread_core.creds
    creds.phaul_outer_uids.extend([outer] * 4)
    creds.phaul_outer_gids.extend([outer] * 4)
    creds.phaul_outer_groups.append(7)
    space = userns_pb2.userns_entry(phaul_parent=parent, phaul_owner=outer)
    for extents in (space.uid_map, space.gid_map):
        extents.add(first=0, lower_first=lower, count=10)
    checkpoint.put("userns", 9, space)
    checkpoint.put("ids", 100, core_pb2.task_kobj_ids_entry(vm_id=1, files_id=1, fs_id=1, sighand_id=1, user_ns_id=9))
    return checkpoint


def test_the_footprint_of_a_process_in_a_user_namespace_below() -> None:
    found = footprint(below(UID, lower=UID))
    assert (found.uids, found.privileged) == ((UID, UID + 9), "")
    assert accounts(below(UID, lower=UID)) == (Account(UID, UID, (7,)),)
    assert footprint(below(UID, lower=0)).privileged == "process 100 runs as root"
    assert footprint(below(0, lower=UID)).privileged == "process 100 runs as root"
    elsewhere = below(UID, lower=UID)
    elsewhere.one("ids", 100).user_ns_id = 6
    assert footprint(elsewhere).privileged == "process 100 runs as root", "who is not in it is what it says"
    with pytest.raises(ImageError, match="below itself"):
        footprint(below(UID, lower=UID, parent=9))


def test_maps_of_several_levels() -> None:
    checkpoint = below(UID, lower=100_000)
    deeper = userns_pb2.userns_entry(phaul_parent=9)
    deeper.uid_map.add(first=0, lower_first=4, count=20)
    deeper.uid_map.add(first=50, lower_first=1, count=2)
    checkpoint.put("userns", 10, deeper)
    users, groups = UserIds(checkpoint, 10).maps
    assert (users, groups) == (((0, 100_004, 6), (50, 100_001, 2)), ())
    assert UserIds(checkpoint).maps == (ALL, ALL), "the tree's own is that of the engine"

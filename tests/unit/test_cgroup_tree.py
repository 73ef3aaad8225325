"""Images of cgroups below the root of a cgroup namespace."""

from __future__ import annotations

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import cgroup_pb2
from phaul_engine.namespaces import cgroup_tree
from phaul_engine.namespaces.control_groups import home_of_spread


def _image(places: dict[int, str], home: str = "/lxc.payload.web") -> Checkpoint:
    checkpoint, top = Checkpoint(), cgroup_pb2.cgroup_dir_entry(dir_name=home.encode())
    slice_ = top.children.add(dir_name=b"system.slice")
    slice_.children.add(dir_name=b"cron.service").properties.add(name=b"pids.max", value=b"9\n")
    cgroup_tree.write(checkpoint, home, top, places)
    return checkpoint


@pytest.mark.parametrize("home", ["/lxc.payload.web", "/"])
def test_what_is_written_is_read(home: str) -> None:
    checkpoint = _image({1: "init.scope", 7: "system.slice/cron.service", 8: "system.slice/cron.service"}, home)
    layout = cgroup_tree.read(Checkpoint.from_bytes(checkpoint.to_bytes()))
    assert layout is not None
    assert layout.home == home
    assert sorted(layout.sets.values()) == ["init.scope", "system.slice/cron.service"]
    assert list(layout.directories) == ["", "system.slice", "system.slice/cron.service"]
    assert home_of_spread(checkpoint) == home


def test_a_tree_at_the_root_is_not_spread() -> None:
    assert home_of_spread(Checkpoint()) is None
    assert home_of_spread(_image({1: "", 7: ""})) is None


@pytest.mark.parametrize("name", [b"..", b"a/b", b"", b"."])
def test_directories_that_lead_out_are_refused(name: bytes) -> None:
    checkpoint = _image({1: ""})
    checkpoint.one("cgroup").controllers[0].dirs[0].children.add(dir_name=name)
    with pytest.raises(RebuildError, match="cannot have the name"):
        cgroup_tree.read(checkpoint)


@pytest.mark.parametrize("name", [b"../cgroup.kill", b"cgroup.procs", b"cgroup.freeze", b"memory.reclaim"])
def test_what_acts_is_no_setting(name: bytes) -> None:
    checkpoint = _image({1: ""})
    checkpoint.one("cgroup").controllers[0].dirs[0].properties.add(name=name, value=b"1")
    with pytest.raises(RebuildError, match="nothing that is set"):
        cgroup_tree.read(checkpoint)

"""What a node believes of a container that another one tells of, and what it makes of that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from phaul import workloads
from phaul.errors import PhaulError, UsageError
from phaul.workloads.openvz import area, commands, identity, workload

CTID = "101"
NETIF = "ifname=eth0,host_ifname=veth101.0,bridge=br0"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node whose containers are below a directory; the files of one are there."""
    (tmp_path / "etc" / "conf").mkdir(parents=True)
    (tmp_path / "etc" / "names").mkdir()
    (tmp_path / "private" / CTID / "fs").mkdir(parents=True)
    text = f'VE_PRIVATE={tmp_path}/private/$VEID\nVE_ROOT="{tmp_path}/root/$VEID"\n'
    (tmp_path / "etc" / "vz.conf").write_text(text)
    monkeypatch.setattr(area, "ETC", tmp_path / "etc")
    monkeypatch.setattr(area, "RUN", tmp_path / "run")
    monkeypatch.setattr(identity, "in_kernel", lambda: True)
    monkeypatch.setattr(commands, "installed", lambda: True)
    return tmp_path


def facts(node: Path, **changes: Any) -> dict[str, Any]:
    return {
        "ctid": CTID,
        "pid": 7,
        "private": f"{node}/private/{CTID}",
        "root": f"{node}/root/{CTID}",
        "layout": 4,
        "config": {"NAME": "web", "ONBOOT": "yes", "NETIF": NETIF},
        "identity": {"ve.veid": CTID},
    } | changes


def checks(content: dict[str, Any]) -> list[str]:
    return [finding.check for finding in workloads.of("vz").examine(content)]


def test_a_node_where_its_places_are_free(node: Path) -> None:
    assert checks(facts(node)) == []
    (finding,) = workloads.of("vz").examine(facts(node), [f"{node}/private/{CTID}/fs"])
    assert finding.check == "vz-files"


def test_a_node_that_is_none(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "in_kernel", lambda: False)
    assert checks(facts(node)) == ["vz-kernel"]
    monkeypatch.setattr(commands, "installed", lambda: False)
    assert checks(facts(node)) == ["vz-commands"]
    with pytest.raises(UsageError, match="vzctl is not installed here"):
        workloads.of("vz").find(CTID)


def test_places_that_are_taken(node: Path) -> None:
    (node / "etc" / "conf" / f"{CTID}.conf").symlink_to("nowhere")
    assert checks(facts(node)) == ["vz-ctid"]
    (node / "etc" / "conf" / f"{CTID}.conf").unlink()
    (node / "etc" / "names" / "web").symlink_to("nowhere")
    assert checks(facts(node)) == ["vz-name"]
    (node / "etc" / "names" / "web").unlink()
    (node / "private" / CTID / "ve.conf").touch()
    assert checks(facts(node)) == ["vz-private"]
    (node / "private" / CTID / "ve.conf").unlink()
    (node / "etc" / "conf" / f"{CTID}.mount").touch()
    assert checks(facts(node)) == ["vz-scripts"]
    (node / "etc" / "conf" / f"{CTID}.mount").unlink()
    (node / "private" / CTID / "fs.phaul-0390cd005dfd").mkdir()  # where its files come in
    assert checks(facts(node)) == []
    assert checks(facts(node, private="/vz/private/101")) == ["vz-places"]


@pytest.mark.parametrize(
    "changes",
    [
        {"ctid": "../101"},
        {"ctid": "1"},
        {"ctid": None},
        {"config": None},
        {"identity": None},
        {"config": {"NAME": 'x"\nBINDMOUNT="/:/host'}},
        {"config": {"NETIF": "ifname=eth0,host_ifname=a b"}},
        {"config": {"BINDMOUNT": "/:/host"}},
    ],
)
def test_facts_that_no_phaul_sends(node: Path, changes: dict[str, Any]) -> None:
    assert checks(facts(node, **changes)) == ["vz-config"]


def test_a_container_has_no_network_before_it_runs(node: Path) -> None:
    first, later = workload._configs(facts(node))
    assert first == {"NAME": "web", "VEID": CTID, "ONBOOT": "no"}
    assert later == {"ONBOOT": "yes", "NETIF": NETIF}


def test_an_area_is_made_and_taken_away_around_the_files(node: Path) -> None:
    place = area.of(CTID, {})
    (node / "private" / CTID / "fs" / "etc").mkdir()
    area.make(place, 'VERSION="2"\n', 4)
    assert area.layout(place.private) == 4
    assert sorted(os.listdir(place.private)) == [".ve.layout", "dump", "fs", "scripts", "ve.conf"]
    for _ in range(2):
        area.unmake(place)
        assert os.listdir(place.private) == ["fs"]


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("VEID 101 exist mounted running\n", commands.Status("101", True, True, "running")),
        ("CTID 101 deleted unmounted down", commands.Status("101", False, False, "down")),
        ("VEID 101 exist unmounted down suspended\n", commands.Status("101", True, False, "suspended")),
        ("VEID 101 exist mounted paused\n", commands.Status("101", True, True, "paused")),
    ],
)
def test_what_vzctl_says_of_a_container(said: str, status: commands.Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "run", lambda *words: said)
    assert commands.status("101") == status


def test_what_vzctl_has_not_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "run", lambda *words: "Container is locked\n")
    with pytest.raises(PhaulError, match="says what is not known"):
        commands.status("101")


def test_a_command_that_fails_is_told_with_its_words() -> None:
    with pytest.raises(PhaulError, match=r"sh -c .* failed \(3\): so"):
        commands.run("sh", "-c", "echo so >&2; exit 3")
    with pytest.raises(PhaulError, match="no-such-command is not installed"):
        commands.run("no-such-command")


def test_a_container_that_is_held_is_not_started(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(commands, "run", lambda *words: ran.append(words))
    for _ in range(2):
        workloads.of("vz").hold(facts(node))
        workloads.of("vz").let_go(facts(node))
    assert ran == [("vzctl", "set", CTID, "--disabled", word, "--save") for word in ("yes", "no")] * 2
    workloads.of("vz").let_go(facts(node, disabled="yes"))
    assert len(ran) == 4


def test_a_container_keeps_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"ve.veid": "101", "ve.features": "7", "ve.aio_max_nr": "131072", "ve.pid_max": "32768"}
    assert list(identity.differences(there, there)) == []
    assert list(identity.differences(there, there | {"ve.features": "3"})) == ["ve.features is 3 here, and was 7 there"]
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(identity, "group", lambda ctid, pid: ctid)
    monkeypatch.setattr(commands, "run", lambda *words: ran.append(words))
    identity.put("101", 7, there, there | {"ve.aio_max_nr": "65536"})
    assert ran == [("cgset", "-r", "ve.aio_max_nr=131072", "101")]
    with pytest.raises(PhaulError, match=r"ve\.pid_max cannot be set"):
        identity.put("101", 7, there | {"ve.pid_max": "1; reboot"}, there)


def test_another_ones_container_is_left_alone(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has registered one of the id meanwhile."""
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(commands, "run", lambda *words: ran.append(words))
    (node / "other.conf").touch()
    (node / "etc" / "conf" / f"{CTID}.conf").symlink_to(node / "other.conf")
    place = area.of(CTID, {})
    area.make(place, "", 4)
    workloads.of("vz").withdraw({"ctid": CTID, "private": place.private, "root": place.root})
    workloads.of("vz").give_up(facts(node))
    assert ran == []
    assert os.path.isdir(place.private)

"""What podman says of a container: what is compared, and what keeps one from moving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phaul.workloads import podman_facts
from phaul.workloads.podman import Podman


def _container(**host: Any) -> dict[str, Any]:
    """What `podman inspect` of 4.3 says of one, so far as it is read."""
    return {
        "Id": "c9aee386177e0fbb",
        "Name": "web",
        "Image": "559594",
        "Rootfs": "",
        "Pod": "",
        "IsInfra": False,
        "Dependencies": [],
        "OCIRuntime": "/usr/bin/runc",
        "StaticDir": "/var/lib/containers/c9ae/userdata",
        "GraphDriver": {"Name": "overlay", "Data": None},
        "State": {"Status": "created", "Pid": 0, "StartedAt": "0001-01-01T00:00:00Z"},
        "Mounts": [],
        "Config": {
            "Hostname": "c9aee386177e",
            "Env": ["TERM=xterm", "HOSTNAME=c9aee386177e", "A=1"],
            "Cmd": ["sleep", "10"],
            "CreateCommand": ["podman", "--log-level", "debug", "run", "-d", "--name", "web", "small", "sleep", "10"],
        },
        "HostConfig": {
            "NetworkMode": "none",
            "PidMode": "private",
            "IpcMode": "shareable",
            "UTSMode": "private",
            "UsernsMode": "",
            "AutoRemove": False,
            "RestartPolicy": {"Name": "", "MaximumRetryCount": 0},
            "ReadonlyRootfs": False,
            "CapDrop": ["CAP_MKNOD", "CAP_AUDIT_WRITE"],
            **host,
        },
    }


def test_what_podman_makes_up_is_not_compared() -> None:
    one, other = _container(), _container()
    other["Id"] = "7e2c42b1fc3c1111"
    other["Config"] |= {"Hostname": "7e2c42b1fc3c", "Env": ["A=1", "HOSTNAME=7e2c42b1fc3c", "TERM=xterm"]}
    other["HostConfig"]["CapDrop"].reverse()
    assert podman_facts.options(one) == podman_facts.options(other)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("Config", {"Hostname": "other"}),
        ("Config", {"Env": ["A=2"]}),
        ("Config", {"Cmd": ["10", "sleep"]}),
        ("HostConfig", {"Privileged": True}),
        ("HostConfig", {"CapDrop": []}),
    ],
)
def test_what_it_was_created_with_is_compared(part: str, change: dict[str, Any]) -> None:
    other = _container()
    other[part] |= change
    assert podman_facts.options(_container()) != podman_facts.options(other)


def test_the_command_that_creates_one_like_it() -> None:
    assert podman_facts.creation(_container()) == "podman --log-level debug create --name web small sleep 10"


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"NetworkMode": "slirp4netns"}, "podman-network"),
        ({"PidMode": "host"}, "podman-namespaces"),
        ({"IpcMode": "container:abc"}, "podman-namespaces"),
        ({"UsernsMode": "private"}, "podman-namespaces"),
        ({"RestartPolicy": {"Name": "always"}}, "podman-restart"),
    ],
)
def test_what_cannot_move_is_named(change: dict[str, Any], check: str) -> None:
    assert [one.check for one in podman_facts.cannot(_container(**change))] == [check]


def test_more_that_cannot_move() -> None:
    assert not list(podman_facts.cannot(_container()))
    for change, check in (
        ({"Pod": "abc"}, "podman-pod"),
        ({"OCIRuntime": "crun"}, "podman-runtime"),
        ({"GraphDriver": {"Name": "vfs", "Data": None}}, "podman-storage"),
    ):
        assert [one.check for one in podman_facts.cannot(_container() | change)] == [check]


def test_health_checks_that_systemd_would_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def checked(**check: Any) -> list[str]:
        told = _container()
        told["Config"] |= {"Healthcheck": {"Test": ["CMD", "true"], "Interval": 30_000_000_000, **check}}
        return [one.check for one in podman_facts.cannot(told)]

    monkeypatch.setattr(podman_facts, "_SYSTEMD", str(tmp_path))
    assert checked() == ["podman-health"]
    assert checked(Interval=0) == checked(Test=["NONE"]) == []
    monkeypatch.setattr(podman_facts, "_SYSTEMD", str(tmp_path / "none"))
    assert checked() == []


def _facts(**changes: Any) -> dict[str, Any]:
    """What the source tells of a container like `_container`."""
    return {"name": "web", "pid": 7, "options": podman_facts.options(_container()), "create": "podman create"} | changes


def _checks(there: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    """What the destination, which has that container, says."""
    monkeypatch.setattr(podman_facts, "inspect", lambda _: there)
    return [one.check for one in Podman().examine(_facts(**changes))]


def test_what_keeps_a_host_from_taking_it_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _checks(_container(), monkeypatch) == []
    assert _checks(None, monkeypatch) == ["podman-name"]
    assert _checks(_container() | {"Name": "webs"}, monkeypatch) == ["podman-name"], "found by the beginning of its id"
    for status in ("running", "paused", "stopping"):
        there = _container() | {"State": {"Status": status, "Pid": 7, "StartedAt": "2026"}}
        assert _checks(there, monkeypatch) == ["podman-name"]
    assert _checks(_container() | {"Image": "other"}, monkeypatch) == ["podman-image"]
    assert _checks(_container(Privileged=True), monkeypatch) == ["podman-options"]


def test_what_one_has_written_is_replaced_only_where_a_migration_has_left_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = _container() | {"StaticDir": str(tmp_path)}
    assert _checks(there, monkeypatch, layer="/merged") == []
    there["State"] = {"Status": "exited", "Pid": 0, "StartedAt": "2026-11-30"}
    assert _checks(there, monkeypatch, layer="/merged") == ["podman-used"]
    assert _checks(there, monkeypatch) == []
    podman_facts.leave("web")
    assert _checks(there, monkeypatch, layer="/merged") == []
    there["State"] |= {"StartedAt": "2026-12-01"}
    assert _checks(there, monkeypatch, layer="/merged") == ["podman-used"]


def test_its_files_tell_the_name_that_it_has(tmp_path: Path) -> None:
    (tmp_path / "hostname").write_text("abc")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.0.0.7\tabcd\n127.0.0.1\tabc web\n")
    told: dict[str, Any] = {"HostnamePath": str(tmp_path / "hostname"), "HostsPath": str(tmp_path / "hosts")}
    told["Config"] = {"Hostname": "abc"}
    podman_facts.rename_host(told, "old")
    assert podman_facts.host_name(told) == "old"
    assert (tmp_path / "hosts").read_text() == "127.0.0.1 localhost\n10.0.0.7\tabcd\n127.0.0.1\told web\n"
    (tmp_path / "hosts").write_text("127.0.0.1\tabc web\n")  # it was started again
    podman_facts.rename_host(told, "old")
    assert (tmp_path / "hosts").read_text() == "127.0.0.1\told web\n"

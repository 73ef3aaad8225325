"""What a host believes of a container that another host tells of."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phaul import workloads
from phaul.errors import PhaulError, UsageError
from phaul.workloads import oci, systemd, unit

CONFIG = {"root": {"path": "rootfs"}}


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle, and a runtime that is there and keeps its state beside it."""
    place = tmp_path / "bundle"
    (place / "rootfs").mkdir(parents=True)
    place.chmod(0o755)
    (place / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "state").mkdir()
    runtime = replace(oci.RUNTIMES["runc"], program="true", directory=tmp_path / "state")
    monkeypatch.setitem(oci.RUNTIMES, "runc", runtime)
    return place


def facts(place: Path, **changes: Any) -> dict[str, Any]:
    digest = hashlib.sha256((place / "config.json").read_bytes()).hexdigest()
    return {"runtime": "runc", "name": "web", "bundle": str(place), "config": digest, "pid": 7} | changes


def checks(content: dict[str, Any]) -> list[str]:
    return [finding.check for finding in workloads.of("oci").examine(content)]


@pytest.mark.skipif(os.geteuid() != 0, reason="a bundle has to be root's")
def test_a_bundle_that_is_the_same_and_roots_is_taken(bundle: Path) -> None:
    assert checks(facts(bundle)) == []
    bundle.chmod(0o775)
    assert checks(facts(bundle)) == ["oci-bundle"]
    bundle.chmod(0o755)
    os.chown(bundle / "config.json", 1000, 0)
    assert checks(facts(bundle)) == ["oci-bundle"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a bundle has to be root's")
def test_other_bundles_are_not(bundle: Path, tmp_path: Path) -> None:
    assert checks(facts(bundle, config="00")) == ["oci-bundle"]
    assert checks(facts(bundle, bundle="relative")) == ["oci-bundle"]
    assert checks(facts(bundle, bundle=f"{bundle}/../bundle")) == ["oci-bundle"]
    (tmp_path / "link").symlink_to(bundle)
    assert checks(facts(bundle, bundle=f"{tmp_path}/link")) == ["oci-bundle"]
    assert checks(facts(bundle, bundle="/no/such/bundle")) == ["oci-bundle"]
    (bundle / "config.json").write_text(json.dumps(CONFIG | {"hooks": {"poststop": [{"path": "/bin/sh"}]}}))
    assert checks(facts(bundle)) == ["oci-hooks"]
    (bundle / "config.json").write_text("[]")
    assert checks(facts(bundle)) == ["oci-bundle"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a bundle has to be root's")
def test_a_name_that_is_taken_and_a_runtime_that_is_absent(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (oci.RUNTIMES["runc"].directory / "web").mkdir()
    assert checks(facts(bundle)) == ["oci-name"]
    monkeypatch.setitem(oci.RUNTIMES, "runc", replace(oci.RUNTIMES["runc"], program="no-such-runtime"))
    assert checks(facts(bundle)) == ["oci-runtime", "oci-name"]


@pytest.mark.parametrize("changes", [{"runtime": "/bin/sh"}, {"runtime": None}, {"name": "../web"}, {"name": ".."}])
def test_facts_that_no_phaul_sends(bundle: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PhaulError):
        checks(facts(bundle, **changes))


@pytest.mark.parametrize(
    ("state", "waits", "notes", "deleted"),
    [
        ({"init_process_pid": 9, "init_process_start": 5}, True, {"waiting": [9, 5]}, True),
        ({"init_process_pid": 9, "init_process_start": 6}, True, {"waiting": [9, 5]}, False),  # somebody made it anew
        ({"init_process_pid": 9}, True, {"since": 0.0}, True),
        ({"init_process_pid": 9}, False, {"since": 0.0}, False),  # it was started
        ({"init_process_pid": 9}, True, {"since": math.inf}, False),  # it was there before
    ],
)
def test_only_what_was_created_for_it_is_deleted(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: dict[str, int],
    waits: bool,
    notes: dict[str, Any],
    deleted: bool,
) -> None:
    place = oci.RUNTIMES["runc"].directory / "web"
    place.mkdir()
    (place / "state.json").write_text(json.dumps(state))
    if waits:
        (place / "exec.fifo").touch()
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(oci.Runtime, "run", lambda _, *words: ran.append(words))
    workloads.of("oci").withdraw({"runtime": "runc", "name": "web"} | notes)
    assert ran == ([("delete", "--force", "web")] if deleted else [])


def test_what_is_not_there_cannot_move(bundle: Path) -> None:
    for name, words in (("web", "no container web"), ("../web", "is no id"), ("", "is no id")):
        with pytest.raises(UsageError, match=words):
            workloads.of("oci").find(name)
    with pytest.raises(UsageError, match="not the PID"):
        workloads.of("pid").find("web")
    with pytest.raises(UsageError, match="moving a ship"):
        workloads.of("ship")


def test_names_of_services_are_checked() -> None:
    for name in ("../x", "x y", "a/b.service", ".service", "x.socket"):
        with pytest.raises(UsageError):
            workloads.of("unit").find(name)
        with pytest.raises(UsageError):
            workloads.of("unit").examine({"name": name})


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [("0", 0), ("3s", 3_000_000), ("1min 30s", 90_000_000), ("500ms", 500_000), ("infinity", systemd.FOREVER)],
)
def test_time_spans_of_systemd_are_read(text: str, microseconds: int) -> None:
    assert systemd.span(text) == microseconds


@pytest.mark.parametrize(
    ("policy", "after"),
    [
        ("no", ()),
        ("always", ("success", "exit-code", "signal", "watchdog")),
        ("on-success", ("success",)),
        ("on-failure", ("exit-code", "signal", "watchdog")),
        ("on-abnormal", ("signal", "watchdog")),
        ("on-abort", ("signal",)),
        ("on-watchdog", ("watchdog",)),
        ("something new", ()),
    ],
)
def test_what_is_started_again_is_what_systemd_would_have(policy: str, after: tuple[str, ...]) -> None:
    results = ("success", "exit-code", "signal", "watchdog")
    assert tuple(result for result in results if unit.restarts(policy, result)) == after

"""Probes against the running kernel, with and without the rights they need."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from phaul_engine import probes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def by_name() -> dict[str, probes.Probe]:
    return {probe.name: probe for probe in probes.probe_all()}


def as_nobody() -> dict[str, dict[str, object]]:
    """The same questions asked by a process without rights."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.write(writer, json.dumps({name: asdict(probe) for name, probe in by_name().items()}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = json.loads(file.read())
    os.waitpid(pid, 0)
    return answer  # type: ignore[no-any-return]


def test_this_host_has_what_is_required() -> None:
    assert [probe for probe in probes.probe_all() if probe.weight == "required" and not probe.ok] == []


def test_dirty_tracking_is_what_the_kernel_has() -> None:
    smaps = Path("/proc/self/smaps").read_text()
    found = by_name()["dirty tracking"].detail
    if " sd" in smaps:  # VmFlags shows soft-dirty only where the kernel has it
        assert "soft-dirty" in found
    major, minor = map(int, os.uname().release.split(".")[:2])
    assert ("WP_ASYNC" in found) == ((major, minor) >= (6, 7))


def test_lacking_rights_are_found_and_explained() -> None:
    found = as_nobody()
    for name in (
        "capabilities",
        "cgroup2",
        "clone3 set_tid",
        "time namespaces",
        "TCP_REPAIR",
        "TAP devices",
        "packet hold",
    ):
        assert found[name]["ok"] is False, name
        assert found[name]["advice"], name
    assert "CAP_SYS_PTRACE (stop and read processes)" in str(found["capabilities"]["detail"])
    assert found["kernel"]["ok"] is True


def test_probing_leaves_nothing_behind() -> None:
    def state() -> tuple[object, ...]:
        with open("/proc/self/mountinfo") as mounts:
            namespaces = tuple(os.readlink(f"/proc/self/ns/{name}") for name in sorted(os.listdir("/proc/self/ns")))
            children = Path("/proc/thread-self/children").read_text()
            return mounts.read(), len(os.listdir("/proc/self/fd")), namespaces, children

    before = state()
    probes.probe_all()
    assert state() == before

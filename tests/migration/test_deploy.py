"""`phaul deploy`: phaul comes to a host that has none, by SSH alone, and programs move there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.migrate import migrate_command, parse
from tests.subjects.programs import start_heap

COMMAND = "/opt/phaul/bin/phaul"


@pytest.fixture
def bare(hosts: Hosts) -> Iterator[Host]:
    """Host b with empty places where phaul is installed to, and no way to the outside but to the other hosts."""
    places = ("/opt", "/usr/local/bin")
    for place in places:
        hosts.b.run(["mount", "-t", "tmpfs", "none", place])
    yield hosts.b
    for place in places:
        hosts.b.run(["umount", "-l", place])


def deploy(source: Host, destination: str, *options: str) -> dict[str, Any]:
    done = source.run(["phaul", "deploy", destination, "--json", *options], timeout=120)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_host_without_phaul_gets_it_and_programs_move_there(hosts: Hosts, bare: Host) -> None:
    there = {"PHAUL_SSH_REMOTE_COMMAND": COMMAND}
    subject = start_heap(hosts.a, heap_mib=4)
    words = migrate_command(subject.pid, bare, ["--max-downtime", "5000"])
    refused = hosts.a.run(words, env=there, check=False)
    assert refused.returncode == 12
    assert f"phaul deploy root@{bare.address}" in refused.stderr

    first = deploy(hosts.a, f"root@{bare.address}")
    assert (first["did"], first["command"], first["warning"]) == (["installed", "switched", "linked"], COMMAND, "")
    assert first["sent"] > 1 << 20
    assert bare.run(["/usr/local/bin/phaul", "--version"]).stdout.split()[1] == first["version"]

    again = deploy(hosts.a, f"operator@{bare.address}")  # by sudo -n; nothing is left to do
    assert (again["did"], again["sent"]) == ([], 0)

    moved = parse(hosts.a.run([*words, "--json"], env=there, check=False))
    assert moved.outcome == "migrated", moved.reason
    subject.moved_to(bare)
    subject.goes_on()
    subject.finish()
    assert bare.run(["ls", "/opt/phaul/versions"]).stdout.split() == [
        bare.run(["readlink", "/opt/phaul/current"]).stdout.strip().removeprefix("versions/")
    ]


def test_what_does_not_work_there_changes_nothing(hosts: Hosts, bare: Host) -> None:
    """A Python that has no room to write: the reason is told, and no half of a version is left."""
    bare.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", "/opt"])
    done = hosts.a.run(["phaul", "deploy", f"root@{bare.address}"], check=False, timeout=120)
    left = bare.run(["sh", "-c", "ls -d /opt/phaul/current /usr/local/bin/phaul"], check=False).stdout
    bare.run(["umount", "-l", "/opt"])
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert left == ""

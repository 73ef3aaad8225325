"""Fixtures of migrations between the test hosts. Every test here is audited: see tests/hosts/audit.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from tests.hosts import Host, Hosts
from tests.hosts.bridges import bridged
from tests.hosts.migrate import Migration, migrate, moving_service
from tests.subjects.programs import Subject, start_echo_client, start_echo_server, start_heap, wait_until


@pytest.fixture(autouse=True)
def _audit(audited: None) -> None:
    """Fail the test that leaves something behind."""


@dataclass
class Mover:
    """Moves processes between the hosts and holds the outcome against what the hosts show."""

    hosts: Hosts
    options: list[str] = field(default_factory=list)
    """Added to every migration."""

    def try_to_move(self, pid: int, source: Host, options: Sequence[str] = ()) -> Migration:
        """Ask for a migration to the other host; its outcome, checked: the process is where the outcome says."""
        destination = self.hosts.other(source)
        migration = migrate(pid, source, destination, [*self.options, *options])
        if migration.outcome == "migrated":
            assert destination.alive(pid), f"it does not run at the destination\n{migration}"
            wait_until(lambda: not source.alive(pid), f"the source's copy is gone\n{migration}")
        elif migration.outcome in ("refused", "stayed", "cancelled"):
            assert source.alive(pid), f"it does not run at the source\n{migration}"
            assert not destination.alive(pid), f"there is a copy at the destination\n{migration}"
            assert migration.reason, f"no reason is given\n{migration}"
        return migration

    def move(self, subject: Subject, options: Sequence[str] = ()) -> Migration:
        """Move a subject to the other host; it must succeed, and the subject go on there without an error."""
        source = subject.host
        migration = self.try_to_move(subject.pid, source, options)
        assert migration.outcome == "migrated", str(migration)
        subject.moved_to(self.hosts.other(source))
        subject.goes_on("writes" if "writes" in subject.status() else "bytes")
        assert subject.status()["state"] == "running", f"{subject.status()}\n{migration}"
        return migration

    def move_with_service(self, subject: Subject, options: Sequence[str] = ()) -> Migration:
        """As `move`, the service addresses with it."""
        migration = self.move(subject, [*moving_service(self.hosts), *options])
        for address in (f"{self.hosts.service}/{self.hosts.service_prefix}", f"{self.hosts.service6}/64"):
            assert address in subject.host.addresses(), f"{address} did not move\n{migration}"
            assert address not in self.hosts.other(subject.host).addresses(), f"{address} is on both\n{migration}"
        return migration


@pytest.fixture
def mover(hosts: Hosts) -> Mover:
    """Moves processes between the hosts."""
    return Mover(hosts)


@pytest.fixture
def heap(hosts: Hosts) -> Iterator[Subject]:
    """A heap of 64 MiB written at 10 MB/s on host a; afterwards it must pass, wherever it is."""
    subject = start_heap(hosts.a, discard=50)
    yield subject
    subject.finish()


@pytest.fixture
def echo(hosts: Hosts) -> Iterator[tuple[Subject, Subject]]:
    """(server on host a at the service address, client with 10 connections); both must pass afterwards."""
    server = start_echo_server(hosts.a, hosts.service)
    client = start_echo_client(hosts.client, hosts.service)
    yield server, client
    client.finish()
    server.finish()


@pytest.fixture
def bridges(hosts: Hosts) -> Iterator[None]:
    """`tests.hosts.bridges`."""
    with bridged(hosts):
        yield

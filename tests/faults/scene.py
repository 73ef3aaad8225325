"""A server that moves while its client works, with something going wrong; and what must be true afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from phaul.migration import Role
from tests.hosts import Host, Hosts
from tests.hosts.host import PIPE, Process
from tests.hosts.migrate import Migration, migrate_command, moving_service, parse
from tests.subjects.programs import Subject, start_echo_client, start_echo_server, wait_until

STATE = "/var/lib/phaul"
RUN = "/run/phaul"
SETTLED = 30.0
"""Seconds in which everything must be over that needs no operator."""


@dataclass
class Scene:
    """The server starts on host a."""

    hosts: Hosts
    programs: tuple[Subject, Subject] | None = None
    words: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, hosts: Hosts) -> Scene:
        """The server at the service address, the client with connections to it."""
        server = start_echo_server(hosts.a, hosts.service)
        client = start_echo_client(hosts.client, hosts.service, connections=4)
        return cls(hosts, (server, client))

    @property
    def server(self) -> Subject:
        """The program that moves."""
        assert self.programs is not None
        return self.programs[0]

    @property
    def client(self) -> Subject:
        """Its client."""
        assert self.programs is not None
        return self.programs[1]

    def host(self, role: Role) -> Host:
        """Where that side's agent is."""
        return self.hosts.a if role is Role.SOURCE else self.hosts.b

    def arm(self, role: Role, point: str, action: str) -> None:
        """Have the agent of a role fail, hang or die there."""
        directory = self.host(role).path(STATE)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / "fault").write_text(f"{role} {point}: {action}\n")

    def disarm(self) -> None:
        """No more of that."""
        for host in (self.hosts.a, self.hosts.b):
            host.path(f"{STATE}/fault").unlink(missing_ok=True)

    def start_pid(self, pid: int) -> Process:
        """Begin to move another process."""
        words = migrate_command(pid, self.hosts.b, [])
        return self.hosts.a.popen([*words, "--json", "--yes"], stdout=PIPE, stderr=PIPE)

    def start(self, options: Sequence[str] = ()) -> Process:
        """Begin to move the server to host b."""
        words = migrate_command(self.server.pid, self.hosts.b, [*moving_service(self.hosts), *options])
        return self.hosts.a.popen([*words, "--json", "--yes"], stdout=PIPE, stderr=PIPE)

    @staticmethod
    def answer(process: Process, timeout: float = 60.0) -> Migration:
        """What it came to."""
        out, err = process.communicate(timeout=timeout)
        assert process.returncode is not None
        return parse(subprocess.CompletedProcess(process.argv, process.returncode, out.decode(), err.decode()))

    def move(self, options: Sequence[str] = ()) -> Migration:
        """Both."""
        return self.answer(self.start(options))

    # -- afterwards ------------------------------------------------------------------------------------------------

    def rows(self, role: Role) -> list[dict[str, object]]:
        """The rows of the migrations on one side, as `phaul status` tells them."""
        found = []
        for path in sorted(self.host(role).path(STATE).glob(f"*.{role}")):
            done = self.host(role).run(["phaul", "status", path.stem, "--json"], check=False)
            found += [json.loads(line) for line in done.stdout.splitlines()]
        return found

    def ended(self, role: Role) -> bool:
        """Whether no row of that side asks for anything any more, and nobody works on one."""
        rows = self.host(role).path(STATE).glob(f"*.{role}")
        return all(b'"ended":1' in path.read_bytes() for path in rows)

    def runs_once(self, *, within: float = SETTLED) -> Host:
        """The one host on which the server runs and serves; AssertionError if it is none, or two."""
        places = (self.hosts.a, self.hosts.b)
        try:
            wait_until(lambda: self._over() and self._places() == 1, "one copy, and all is over", within)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.told()}") from error
        where = next(place for place in places if place.alive(self.server.pid))
        self.server.moved_to(where)
        before = time.monotonic()
        try:
            self.client.goes_on("requests", 10.0)
        except TimeoutError as error:
            waited = time.monotonic() - before
            raise AssertionError(f"{error} (on host {where.name}, {waited:.1f} s)\n{self.told()}") from error
        return where

    def _places(self) -> int:
        return sum(place.alive(self.server.pid) for place in (self.hosts.a, self.hosts.b))

    def _over(self) -> bool:
        return self.ended(Role.SOURCE) and self.ended(Role.DESTINATION) and not any(self._sockets())

    def _sockets(self) -> list[Path]:
        """Agents that live, or whose keepers do."""
        return [path for host in (self.hosts.a, self.hosts.b) for path in host.path(RUN).glob("*.sock")]

    def told(self) -> str:
        """Everything that the hosts know about it."""
        lines = []
        for role in Role:
            host = self.host(role)
            lines.append(f"-- {role}, host {host.name}: pids {host.processes()}, audit {sorted(host.audit())}")
            for path in host.path(STATE).glob(f"*.{role}"):
                raw = path.read_bytes().replace(b"\0", b"")
                lines.append("   " + raw.decode(errors="replace")[-1500:])
            lines += [path.read_text()[-2000:] for path in host.path(RUN).glob("*.log")]
        if self.programs is not None:
            lines.append(f"client: {self.client.status()}")
        return "\n".join([*lines, *self.words])

    def agrees(self, migration: Migration) -> None:
        """One copy runs, where they say, and passes its check."""
        self.words.append(str(migration))
        where = self.runs_once()
        if migration.outcome == "migrated":
            assert where is self.hosts.b, self.told()
        else:
            assert migration.outcome in ("stayed", "cancelled", "in-doubt", "error"), self.told()
            assert where is self.hosts.a or migration.outcome in ("in-doubt", "error"), self.told()
        self.finish()

    def finish(self) -> None:
        """Both programs must pass their own checks."""
        self.client.finish()
        self.server.finish()
        self.clear()

    def clear(self) -> None:
        """The logs of agents that died have served."""
        self.disarm()
        for host in (self.hosts.a, self.hosts.b):
            for path in host.path(RUN).glob("*.log"):
                path.unlink()


def every_run(*selected: object) -> Callable[[Iterable[object]], list[Any]]:
    """Of all cases those that each run of the tests tries; with PHAUL_ALL_FAULTS=1 all of them."""
    return lambda cases: [one for one in cases if os.environ.get("PHAUL_ALL_FAULTS") or one in selected]


at_length = pytest.mark.skipif(not os.environ.get("PHAUL_ALL_FAULTS"), reason="takes long: make faults")


def hung(host: Host) -> int | None:
    """The PID, inside, of the agent on a host that has reached its point, and hangs; None as long as none does."""
    for pid in host.processes():
        try:
            words = host.path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            state = host.path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state == "T" and (b"phaul.dest" in words or b"phaul.source" in words):
            return pid
    return None


def wait_hung(host: Host, process: Process | None = None) -> int:
    """Wait for that; its PID. AssertionError with the answer of `process`, a `phaul migrate`, if that ends before."""
    wait_until(lambda: hung(host) is not None or _has_ended(process), f"an agent on host {host.name} hangs", 150.0)
    pid = hung(host)
    assert pid is not None, f"nothing hangs: {process and Scene.answer(process)}"
    return pid


def _has_ended(process: Process | None) -> bool:
    return process is not None and process.poll() is not None


def cut(host: Host, other: Host, *, ssh: bool) -> None:
    """Break the connections to another host: that of SSH, or those between the agents. Both ends see a reset."""
    port = ["dport", "=" if ssh else "!=", ":22"]
    done = host.run(["ss", "--kill", "--tcp", "state", "established", "dst", other.address, "and", *port])
    assert other.address in done.stdout, f"there was no such connection: {done.stdout}"

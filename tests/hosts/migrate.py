"""`phaul migrate` between the test hosts, and its result as the contract of the command line has it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.hosts.host import Host
from tests.hosts.lab import Hosts
from tests.hosts.spec import DEVICE

EXIT_STATUS = {
    "migrated": 0,
    "refused": 20,
    "stayed": 30,
    "in-doubt": 40,
    "lost": 50,
    "cancelled": 130,
}
"""The exit status that belongs to an outcome. An error before anything was touched has several: 2, 10, 11, 12."""
TIMEOUT = 90.0


@contextlib.contextmanager
def fault(host: Host, words: str) -> Iterator[None]:
    """Have an agent on a host fail, hang or die at a point of the next migration (phaul.faults)."""
    file = host.path("/var/lib/phaul/fault")
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file.write_text(f"{words}\n")
    try:
        yield
    finally:
        file.unlink()


class ContractError(AssertionError):
    """The command did not answer as its contract says."""


@dataclass(frozen=True)
class Migration:
    """What a `phaul migrate --json` answered."""

    exit_status: int
    events: list[dict[str, Any]]
    stderr: str
    words: list[str] = field(default_factory=list)

    @property
    def result(self) -> dict[str, Any]:
        """The last event."""
        return self.events[-1]

    @property
    def outcome(self) -> str:
        """migrated, refused, stayed, cancelled, in-doubt, lost or error."""
        return str(self.result["outcome"])

    @property
    def reason(self) -> str:
        """Why it was not migrated; empty otherwise."""
        return str(self.result.get("reason") or "")

    @property
    def downtime_ms(self) -> float:
        """As phaul measured it."""
        return float(self.result["downtime_ms"])

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """One {pages, bytes, ms} a round."""
        return list(self.result["rounds"])

    def of(self, name: str) -> list[dict[str, Any]]:
        """The events of that name."""
        return [event for event in self.events if event["event"] == name]

    def __str__(self) -> str:
        lines = [f"{' '.join(self.words)}: exit status {self.exit_status}"]
        lines += [json.dumps(event) for event in self.events[-5:]]
        return "\n  ".join([*lines, *self.stderr.strip().splitlines()[-20:]])


def parse(done: subprocess.CompletedProcess[str]) -> Migration:
    """Read the answer; ContractError unless each line is an event, the last one the only result, and the exit status
    the one that belongs to it."""
    told = f"{' '.join(done.args)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}"
    try:
        events = [json.loads(line) for line in done.stdout.splitlines()]
        names = [event["event"] for event in events]
    except (ValueError, TypeError, KeyError) as error:
        raise ContractError(f"not one event a line: {error!r}\n{told}") from error
    if names.count("result") != 1 or names[-1] != "result":
        raise ContractError(f"the last event is not the only result\n{told}")
    migration = Migration(done.returncode, events, done.stderr, list(done.args))
    wanted = EXIT_STATUS.get(migration.outcome)
    if wanted is None and done.returncode not in (1, 2, 10, 11, 12):
        raise ContractError(f"outcome {migration.outcome!r} with exit status {done.returncode}\n{told}")
    if wanted is not None and done.returncode != wanted:
        raise ContractError(f"outcome {migration.outcome!r} must end with {wanted}\n{told}")
    return migration


def migrate_command(pid: int, destination: Host, options: Sequence[str] = ()) -> list[str]:
    """The words that move a process there, as root."""
    return ["phaul", "migrate", str(pid), f"root@{destination.address}", *options]


def moving_service(hosts: Hosts) -> list[str]:
    """The options with which the service address moves too, IPv4 and IPv6."""
    return [
        "--move-address",
        f"{hosts.service}/{hosts.service_prefix}@{DEVICE}",
        "--move-address",
        f"{hosts.service6}/64@{DEVICE}",
    ]


def migrate(
    pid: int, source: Host, destination: Host, options: Sequence[str] = (), timeout: float = TIMEOUT
) -> Migration:
    """Move a process and read the answer, whatever it is."""
    words = [*migrate_command(pid, destination, options), "--json", "--yes"]
    return parse(source.run(words, timeout=timeout, check=False))

"""The copy that dies says nothing that the one that lives would hear: robust locks and tid words in a file that both
map (tests/subjects/last_words.py)."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from phaul.migration import Role
from tests.faults.scene import STATE
from tests.hosts import Host, Hosts
from tests.hosts.host import Process
from tests.hosts.migrate import Migration, migrate
from tests.subjects import last_words
from tests.subjects.programs import wait_until

PLACE = "/srv/shared/words"


@dataclass
class Holder:
    """A program that holds a lock in a file on storage that both hosts see."""

    hosts: Hosts
    process: Process
    file: Path

    @classmethod
    def begin(cls, hosts: Hosts) -> Holder:
        file = hosts.a.path(PLACE)
        file.write_bytes(bytes(4096))
        made = cls(hosts, hosts.a.popen([sys.executable, last_words.__file__, PLACE]), file)
        wait_until(lambda: last_words.read(file).count > 2, "it counts")
        return made

    def move(self) -> Migration:
        return migrate(self.process.pid, self.hosts.a, self.hosts.b, [])

    def check(self, where: Host) -> None:
        """It runs there, and nobody has spoken in its name."""
        other = self.hosts.other(where)
        wait_until(lambda: where.alive(self.process.pid) and not other.alive(self.process.pid), "one copy", 30.0)
        before = last_words.read(self.file).count
        wait_until(lambda: last_words.read(self.file).count > before + 5, "it goes on")
        words = last_words.read(self.file)
        assert (words.lock, words.tid) == (self.process.pid, self.process.pid)
        where.kill(self.process.pid, 9)
        wait_until(lambda: not where.alive(self.process.pid), "its end")
        words = last_words.read(self.file)
        assert words.lock == last_words.OWNER_DIED, "a death of its own is told as ever"
        assert words.tid == 0


def test_the_source_s_copy_dies_silently(hosts: Hosts) -> None:
    holder = Holder.begin(hosts)
    migration = holder.move()
    assert migration.outcome == "migrated", str(migration)
    holder.check(hosts.b)


POINTS = [  # role, where its agent is killed, where the program runs then, whether every run tries it
    (Role.DESTINATION, "after work LAND", "a", True),
    (Role.DESTINATION, "after work DETACH", "a", False),
    (Role.DESTINATION, "after row PARKED-RESUMED", "b", True),
    (Role.DESTINATION, "after work WAKE", "b", False),
    (Role.SOURCE, "after row COMMITTED-RELEASED", "b", False),
]


def _idle(host: Host) -> bool:
    """Whether no agent is at work there."""
    return not list(host.path("/run/phaul").glob("*.sock"))


@pytest.mark.parametrize(
    ("role", "point", "runs_at"),
    [one[:3] for one in POINTS if one[3] or os.environ.get("PHAUL_ALL_FAULTS")],
    ids=lambda one: str(one).replace(" ", "-"),
)
def test_and_so_does_whatever_a_dead_agent_leaves(hosts: Hosts, role: Role, point: str, runs_at: str) -> None:
    holder = Holder.begin(hosts)
    directory = (hosts.a if role is Role.SOURCE else hosts.b).path(STATE)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "fault").write_text(f"{role} {point}: kill\n")
    holder.move()
    (directory / "fault").unlink()
    holder.check(hosts.a if runs_at == "a" else hosts.b)
    for host in (hosts.a, hosts.b):
        wait_until(partial(_idle, host), "nobody is at work", 30.0)
        for path in host.path("/run/phaul").glob("*.log"):
            path.unlink()

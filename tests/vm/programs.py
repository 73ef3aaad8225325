"""Programs in machines that check themselves. They have no files but their own, for two machines share no storage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.hosts.migrate import Migration, parse
from tests.subjects.programs import build, parse_status
from tests.vm.machine import Machine

MIGRATION_TIMEOUT = 600.0  # seconds; emulated processors are slow, and on a busy host wait for real ones
_HEAP = "/usr/local/bin/heap"
_STATUS = 3  # the descriptor of its memory file


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    """Ask until it is so; TimeoutError names `what`. A question takes a second where processors are emulated."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:.0f} s")
        time.sleep(0.2)


@dataclass
class Heap:
    """`heap` of tests/subjects on some machine: it checks all its memory, its threads, a pipe and the clocks."""

    machine: Machine
    pid: int

    @classmethod
    def start(cls, machine: Machine, *others: Machine, heap_mib: int = 4, rate_mb: int = 1) -> Heap:
        """Start it; the `others` get the program's file, to which it can move."""
        for one in (machine, *others):
            one.put(build("heap"), _HEAP)
        words = [_HEAP, "--status", "-", "--heap", str(heap_mib), "--rate", str(rate_mb)]
        words += ["--discard", "50", "--slow", "50"]
        heap = cls(machine, machine.start_program(words))
        heap.goes_on()
        return heap

    def status(self) -> dict[str, str]:
        """What it says now; empty while it has said nothing."""
        done = self.machine.run(["cat", f"/proc/{self.pid}/fd/{_STATUS}"], check=False)
        return parse_status(done.stdout) if done.stdout.startswith("state=") else {}

    def goes_on(self) -> None:
        """Wait until it has written again, twice: the first may have been before a standstill."""
        for _ in range(2):
            before = int(self.status().get("writes", 0))
            wait_until(lambda so_far=before: int(self.status().get("writes", 0)) > so_far, "heap goes on")  # type: ignore[misc]
        assert self.status()["state"] == "running", self.status()

    def finish(self) -> dict[str, str]:
        """Have it check everything and end; its verdict, which must be that all is well."""
        wait = f"exec 9</proc/{self.pid}/fd/{_STATUS} && kill {self.pid} && "
        wait += f"while [ -e /proc/{self.pid}/exe ]; do sleep 0.2; done; cat <&9"
        status = parse_status(self.machine.run(["sh", "-c", wait]).stdout)
        assert status["state"] == "pass", status
        return status


@dataclass
class Redis:
    """redis-server on some machine, which keeps nothing on disk. `said` counts what was written to it."""

    machine: Machine
    pid: int
    written: int = field(default=0)

    @classmethod
    def start(cls, machine: Machine) -> Redis:
        """Start it, on the loopback address."""
        words = ["redis-server", "--save", "", "--port", "6379", "--bind", "127.0.0.1", "--daemonize", "no"]
        redis = cls(machine, machine.start_program(words))
        wait_until(lambda: redis.ask("PING") == "PONG", "redis answers")
        return redis

    def ask(self, *words: str) -> str:
        """The answer to one command, by a new connection."""
        return self.machine.run(["redis-cli", *words], check=False).stdout.strip()

    def write(self, keys: int) -> None:
        """Set that many more keys, each to a text of its own."""
        script = "for i=ARGV[1],ARGV[2] do redis.call('SET', 'key:'..i, string.rep(i..' ', 50)) end"
        last = self.written + keys
        assert self.ask("EVAL", script, "0", str(self.written + 1), str(last)) == ""
        self.written = last

    def check(self) -> None:
        """Every key has its text."""
        script = "local n = 0; for i=1,ARGV[1] do "
        script += "if redis.call('GET', 'key:'..i) == string.rep(i..' ', 50) then n = n + 1 end end; return n"
        assert self.ask("EVAL", script, "0", str(self.written)) == str(self.written)

    def finish(self) -> None:
        """Check and end it."""
        self.check()
        self.machine.run(["kill", str(self.pid)])
        wait_until(lambda: not self.machine.alive(self.pid), "redis ends")


def migrate(pid: int, source: Machine, destination: Machine, options: Sequence[str] = ()) -> Migration:
    """`phaul migrate` from machine to machine, which must succeed and leave one copy, there."""
    # an emulated processor needs seconds for what takes milliseconds, and many of them to start a program
    words = ["env", "PHAUL_SSH_CONNECT_TIMEOUT=400", "phaul", "migrate", str(pid), f"root@{destination.address}"]
    words += ["--json", "--yes", "--max-downtime", "5000", *options]
    done = source.run(words, timeout=MIGRATION_TIMEOUT, check=False)
    migration = parse(done)
    assert migration.outcome == "migrated", str(migration)
    assert destination.alive(pid), str(migration)
    wait_until(lambda: not source.alive(pid), "the source's copy is gone")
    return migration


def tell(name: str, migration: Migration, machine: Machine) -> str:
    """One line for the log."""
    figures = {key: migration.result[key] for key in ("downtime_ms", "total_ms", "bytes_sent")}
    return f"{name} to {machine.kernel}: {len(migration.rounds)} rounds, {json.dumps(figures)}"

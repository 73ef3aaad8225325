"""make demo: redis under load moves from one host to another and back, while a client writes.

    python -m tests.demo [--repeat N] [--heap MIB] [--connections N] [-- OPTION OF phaul migrate ...]

Two hosts are made on this machine (tests/hosts), and removed at the end. Ends with status 0 only when every migration
succeeded, no acknowledged write and no connection was lost, and nothing was left behind on either host.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field

from tests.hosts import Host, HostError, Hosts, two_hosts
from tests.hosts.audit import audit_hosts, settled
from tests.hosts.migrate import TIMEOUT, migrate_command, moving_service
from tests.subjects.servers import RedisWriter, Server, start_redis

FILL = "for i = 1, ARGV[1] do redis.call('SET', 'fill:' .. i, string.rep(i .. ' ', 200)) end return ARGV[1]"
BYTES_PER_FILL = 1_100
QUIET_S = 1.0
"""Writing before and after each migration, so that a client that hangs is seen."""


class DemoError(Exception):
    """What the demo shows did not happen."""


@dataclass
class Run:
    """One demo: what is moved, where it is, what its client has seen."""

    hosts: Hosts
    options: argparse.Namespace
    server: Server
    writer: RedisWriter
    where: Host
    gaps_ms: list[float] = field(default_factory=list)
    slow: int = 0

    def move(self, number: int, total: int) -> None:
        """One migration to the other host; DemoError when it fails."""
        destination = self.hosts.other(self.where)
        words = migrate_command(self.server.pid, destination, [*moving_service(self.hosts), *self.options.migrate])
        print(f"\n[{number}/{total}] host {self.where.name} -> host {destination.name}$ {' '.join(words)}", flush=True)
        time.sleep(QUIET_S)
        self.writer.mark()
        self._run_migrate(words, destination)
        self.where = destination
        time.sleep(QUIET_S)
        seen = self.writer.mark()
        self.gaps_ms.append(seen["gap_ms"])
        self.slow += int(seen["slow"])
        print(
            f"      client: {seen['writes']} writes meanwhile; longest time without an answer {seen['gap_ms']:.1f} ms, "
            f"slowest answer {seen['latency_ms']:.1f} ms"
        )

    def _run_migrate(self, words: list[str], destination: Host) -> None:
        """phaul with this terminal; an interrupt goes to it, and it says where the program runs."""
        with self.where.popen(words, stdin=0, stdout=1, stderr=2) as process:
            try:
                status = process.wait(TIMEOUT)
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                status = process.wait(TIMEOUT)
        if status != 0:
            raise DemoError(f"phaul migrate ended with status {status}")
        if not destination.alive(self.server.pid):
            raise DemoError(f"process {self.server.pid} does not run on host {destination.name}")

    def resources(self) -> tuple[int, int]:
        """Descriptors and resident KiB of the server, where it runs."""
        directory = self.where.path(f"/proc/{self.server.pid}")
        resident = next(line for line in (directory / "status").read_text().splitlines() if line.startswith("VmRSS"))
        return len(list((directory / "fd").iterdir())), int(resident.split()[1])


def fill(hosts: Hosts, mib: int) -> None:
    """Put about `mib` MiB into redis."""
    count = mib * 1024 * 1024 // BYTES_PER_FILL
    hosts.client.run(["redis-cli", "-h", hosts.service, "eval", FILL, "0", str(count)])


def summary(run: Run, verdict: dict[str, object], before: tuple[int, int], after: tuple[int, int]) -> None:
    """The last lines."""
    gaps = sorted(run.gaps_ms)
    print(f"\n{len(gaps)} migrations, {verdict['writes']} writes over {run.options.connections} connections")
    print(f"  lost writes          {verdict['lost']}")
    print(f"  connections lost     {verdict['connections_lost']}")
    if gaps:
        print(
            f"  downtime, by client  median {statistics.median(gaps):.1f} ms, "
            f"p90 {gaps[int(len(gaps) * 0.9)] if len(gaps) > 1 else gaps[0]:.1f} ms, longest {gaps[-1]:.1f} ms"
        )
        print(f"  answers over 150 ms  {run.slow}")
    print(f"  redis                descriptors {before[0]} -> {after[0]}, resident {before[1]} -> {after[1]} KiB")


def demonstrate(hosts: Hosts, options: argparse.Namespace) -> list[str]:
    """All of it; what went wrong."""
    server = start_redis(hosts.a, hosts.service)
    problems = []
    with RedisWriter(hosts.client, hosts.service, connections=options.connections) as writer:
        fill(hosts, options.heap)
        run = Run(hosts, options, server, writer, hosts.a)
        before = run.resources()
        print(
            f"redis is process {server.pid} on host a, {before[1] // 1024} MiB, at {hosts.service}; "
            f"{options.connections} connections of host client write to it"
        )
        total = 2 * options.repeat
        try:
            for number in range(1, total + 1):
                run.move(number, total)
        except (DemoError, TimeoutError) as error:
            problems.append(str(error))
        after = run.resources() if run.where.alive(server.pid) else (0, 0)
        verdict = writer.stop()
        summary(run, verdict, before, after)
        problems += [str(error) for error in verdict["errors"]]
    if after[0] > before[0]:
        problems.append(f"redis has {after[0] - before[0]} descriptors more than at first")
    if run.where.alive(server.pid):
        run.where.kill(server.pid, signal.SIGTERM)
    return problems + sorted(settled(lambda: audit_hosts(hosts)))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make demo", description="redis moves to and fro while a client writes")
    parser.add_argument("--repeat", type=int, default=1, help="how many times to and fro (default: %(default)s)")
    parser.add_argument("--heap", type=int, default=64, help="MiB of data in redis (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=4, help="of the client (default: %(default)s)")
    parser.add_argument("migrate", nargs="*", help="options for phaul migrate, after --")
    options = parser.parse_args()
    begun = time.monotonic()
    try:
        with two_hosts() as hosts:
            print(f"two hosts and a client on one machine, up in {time.monotonic() - begun:.1f} s")
            problems = demonstrate(hosts, options)
    except (HostError, RuntimeError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print("" if problems else "nothing was left behind on either host")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

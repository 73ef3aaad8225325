"""Redis under a writing client, moved to and fro many times: nothing is lost, nothing is left, nothing grows.

    python -m benchmarks.soak [--count 100] [--heap MIB] [--lxc]

After every migration both hosts are audited but for the moved program itself, and the descriptors and resident memory
of redis are noted. Agents end with their migration; that none is left is part of the audit. With --lxc it is a
container with redis and other servers that moves (`benchmarks.lxc_soak`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from benchmarks import lxc_soak
from benchmarks.figures import p90
from tests.demo import fill
from tests.hosts import Hosts, two_hosts
from tests.hosts.audit import audit_hosts, settled
from tests.hosts.migrate import migrate, moving_service
from tests.subjects.servers import RedisWriter, start_redis

_QUIET_S = 0.3
_SHOWN = 10  # every so many migrations a line
_GROWTH_KIB = 8192  # resident memory that redis may gain over all migrations: its own buffers


def soak(hosts: Hosts, count: int, heap_mib: int) -> list[str]:
    """What went wrong."""
    server = start_redis(hosts.a, hosts.service)
    where, problems, gaps, sizes = hosts.a, list[str](), list[float](), list[tuple[int, int]]()
    with RedisWriter(hosts.client, hosts.service) as writer:
        fill(hosts, heap_mib)
        for number in range(1, count + 1):
            writer.mark()
            destination = hosts.other(where)
            done = migrate(server.pid, where, destination, moving_service(hosts))
            if done.outcome != "migrated":
                problems.append(f"migration {number}: {done}")
                break
            where = destination
            time.sleep(_QUIET_S)
            gaps.append(writer.mark()["gap_ms"])
            left = settled(hosts.other(destination).audit)
            problems += [f"after migration {number}: {line}" for line in sorted(left)]
            directory = where.path(f"/proc/{server.pid}")
            status = (directory / "status").read_text().splitlines()
            resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
            sizes.append((len(list((directory / "fd").iterdir())), resident))
            if number % _SHOWN == 0:
                print(f"{number}: gap {gaps[-1]:.1f} ms, descriptors and KiB of redis {sizes[-1]}", flush=True)
        verdict = writer.stop()
    problems += [str(error) for error in verdict["errors"]]
    problems += [f"{name}: {verdict[name]}" for name in ("lost", "connections_lost") if verdict[name]]
    if len(sizes) > 1 and (sizes[-1][0] > sizes[0][0] or sizes[-1][1] > sizes[0][1] + _GROWTH_KIB):
        problems.append(f"descriptors and KiB of redis went from {sizes[0]} to {sizes[-1]}")
    if gaps:
        print(
            f"{len(gaps)} migrations, {verdict['writes']} writes; by the client: median {statistics.median(gaps):.1f} "
            f"ms, p90 {p90(gaps):.1f} ms, longest {max(gaps):.1f} ms"
        )
    if where.alive(server.pid):
        where.kill(server.pid, 15)
    return problems + sorted(settled(lambda: audit_hosts(hosts)))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description="redis moves to and fro many times")
    parser.add_argument("--count", type=int, default=100, help="migrations (default: %(default)s)")
    parser.add_argument("--heap", type=int, default=16, help="MiB of data in redis (default: %(default)s)")
    parser.add_argument("--lxc", action="store_true", help="a container of LXC, under clients of redis, HTTP and ssh")
    options = parser.parse_args()
    with two_hosts() as hosts:
        problems = lxc_soak.soak(hosts, options.count) if options.lxc else soak(hosts, options.count, options.heap)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

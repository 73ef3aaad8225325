"""A container of LXC that moves to and fro many times under clients of redis, HTTP and ssh: no connection is lost, no
byte is wrong, and the host that it has left is as it was before it came.

Every connection is opened before the first move and has to last until the end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from benchmarks.container import Session, http_client, redis_client, serving
from benchmarks.figures import p90
from tests.hosts import Host, Hosts
from tests.hosts.audit import audit_hosts, settled
from tests.subjects.lxc import Container

_QUIET_S = 0.3
_SHOWN = 10  # every so many moves a line


def soak(hosts: Hosts, count: int) -> list[str]:
    """What went wrong."""
    with serving(hosts) as container:
        problems = list(_moves(hosts, container, count))
    return problems + sorted(settled(lambda: audit_hosts(hosts)))


def _moves(hosts: Hosts, container: Container, count: int) -> Iterator[str]:
    idle = {line.partition(": ")[2] for line in hosts.b.audit()}  # it has the bridge
    where, gaps = hosts.a, list[float]()
    with redis_client(hosts) as writer, http_client(hosts) as http, Session(hosts) as session:
        failed = _failed(container, where)
        for number in range(1, count + 1):
            session.goes_on()
            http.goes_on()
            writer.mark()
            done = container.move(where)
            if done.outcome != "migrated":
                yield f"move {number}: {done}"
                break
            left, where = where, hosts.other(where)
            time.sleep(_QUIET_S)
            gaps.append(writer.mark()["gap_ms"])
            yield from (f"after move {number}: {line}" for line in _left(left, idle))
            if number % _SHOWN == 0:
                print(f"{number}: gap {gaps[-1]:.1f} ms, {session.lines} lines through ssh", flush=True)
        session.goes_on()
        verdict, pages = writer.stop(), http.stop()
        yield from (*verdict["errors"], *pages["errors"], *filter(None, [session.error]))
        if (now := _failed(container, where)) != failed:
            yield f"units have failed: {now}"
    if gaps:
        print(
            f"{len(gaps)} moves, {verdict['writes']} writes, {pages['answers']} pages, {session.lines} lines through "
            f"ssh; by the client: median {statistics.median(gaps):.1f} ms, p90 {p90(gaps):.1f} ms, longest "
            f"{max(gaps):.1f} ms"
        )


def _failed(container: Container, host: Host) -> str:
    """The units in it that have failed."""
    return container.inside(host, "systemctl", "--failed", "--plain", "--no-legend", "--no-pager")


def _left(host: Host, idle: set[str]) -> list[str]:
    """What a host has that an idle one has not."""
    return sorted(settled(lambda: {line for line in host.audit() if line.partition(": ")[2] not in idle}))

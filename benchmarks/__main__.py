"""make bench: how long a program stands and where each millisecond goes, how fast rounds are, what they cost.

    python -m benchmarks [--full] [--repeats N] [--heaps MIB,...] [--rates MB/S,...] [--only PART,...] [--document]

Parts: counter, client, crowd, criu, lxc, stream, redis, connections, agents, soak. Prints tables, and writes all values
to benchmarks/results/TIME.json; with --document, the tables into docs/benchmarks.md too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import agents, connections, crowd, document, downtime, lxc, page_stream, redis_rate
from benchmarks.figures import surroundings
from benchmarks.soak import soak
from tests.hosts import HostError, two_hosts

_PARTS = ("counter", "client", "crowd", "criu", "lxc", "stream", "redis", "connections", "agents", "soak")
_FULL = {"repeats": 11, "heaps": (64, 1024, 4096), "rates": (0, 10, 100)}
_SHORT = {"repeats": 3, "heaps": (64, 1024), "rates": (0, 100)}
_STREAM_MIB = 256
_SOAK_PER_REPEAT = 10  # moves of the soak: 110 with --full
_SOAK_MIB = 16
_CONNECTIONS = (100, 500)


def run(parts: Sequence[str], heaps: Sequence[int], rates: Sequence[int], repeats: int) -> dict[str, Any]:
    """All that was asked for, one part after the other."""
    results: dict[str, Any] = {"before": surroundings()}
    cells = [(heap, rate) for heap in heaps for rate in rates]
    criu = downtime.criu_program()
    if "counter" in parts:
        results["counter"] = []
        for heap, rate in cells:
            with two_hosts() as hosts:
                results["counter"].append(downtime.by_counter(hosts, heap, rate, repeats))
    if "client" in parts:
        with two_hosts() as hosts:
            results["client"] = [downtime.by_client(hosts, repeats)]
    if "crowd" in parts:
        results["crowd"] = []
        for numbers in crowd.CROWDS:
            with two_hosts() as hosts:
                results["crowd"].append(crowd.measure(hosts, numbers, criu, min(repeats, 5)))
    if "criu" in parts:
        absent = [{"skipped": "CRIU 4.2 is not here; PHAUL_CRIU can say where it is"}]
        results["criu"] = [downtime.by_criu(criu, *cell, min(repeats, 3)) for cell in cells] if criu else absent
    if "lxc" in parts:
        with two_hosts() as hosts:
            results["lxc"] = lxc.measure(hosts, repeats)
    if "stream" in parts:
        results["stream"] = page_stream.measure(_STREAM_MIB << 20, repeats)
    if "redis" in parts:
        with two_hosts() as hosts:
            results["redis"] = [redis_rate.measure(hosts, repeats)]
    if "connections" in parts:
        results["connections"] = [connections.measure(count, repeats) for count in _CONNECTIONS]
    if "agents" in parts:
        with two_hosts() as hosts:
            results["agents"] = [agents.measure(hosts, heap, rates[0], min(repeats, 3)) for heap in heaps]
    if "soak" in parts:
        with two_hosts() as hosts:
            count = repeats * _SOAK_PER_REPEAT
            results["soak"] = [{"moves": count, "problems": soak(hosts, count, _SOAK_MIB) or "none"}]
    results["after"] = surroundings()
    return results


def show(results: dict[str, Any], console: Console) -> None:
    """One table a part."""
    for part in _PARTS:
        if part not in results:
            continue
        if part == "stream":
            table = Table("page stream", "MB/s, ratios as they are")
            for name, value in results[part].items():
                table.add_row(name, f"{value:.2f}" if name.endswith("ratio") else f"{value / 1e6:.0f}")
            console.print(table)
            continue
        for cell in results[part]:
            fixed = ", ".join(f"{name} {value}" for name, value in cell.items() if not isinstance(value, dict))
            table = Table("figure", "median", "p90", "reference figure", title=f"{part}: {fixed}")
            for name, value in cell.items():
                if isinstance(value, dict):
                    table.add_row(
                        name, f"{value['median']:.2f}", f"{value['p90']:.2f}", str(value.get("reference", ""))
                    )
            console.print(table)
    console.print(f"before: {results['before']}\nafter:  {results['after']}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench", description="downtime, throughput and cost, against references")
    parser.add_argument("--full", action="store_true", help="every cell 11 times: takes hours")
    parser.add_argument("--repeats", type=int, help="of each cell")
    parser.add_argument("--heaps", type=_numbers, help="MiB, with commas")
    parser.add_argument("--rates", type=_numbers, help="10^6 bytes a second, with commas")
    parser.add_argument("--document", action="store_true", help="write the tables into docs/benchmarks.md")
    parser.add_argument("--only", default=",".join(_PARTS), help="parts, with commas (default: %(default)s)")
    options = parser.parse_args()
    usual: dict[str, Any] = _FULL if options.full else _SHORT
    parts = options.only.split(",")
    if unknown := set(parts) - set(_PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    heaps, rates = options.heaps or usual["heaps"], options.rates or usual["rates"]
    try:
        results = run(parts, heaps, rates, options.repeats or usual["repeats"])
    except (HostError, downtime.BenchmarkError, RuntimeError) as error:
        print(f"problem: {error}", file=sys.stderr)
        return 1
    show(results, Console())
    directory = Path(__file__).parent / "results"
    directory.mkdir(exist_ok=True)
    file = directory / time.strftime("%Y%m%dT%H%M%S.json")
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(file)
    if options.document:
        document.write(results)
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())

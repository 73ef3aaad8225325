"""The tables of a run as a part of docs/benchmarks.md: what stands between the two marks there is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
_BEGIN, _END = "<!-- results: begin -->\n", "<!-- results: end -->\n"


def write(results: dict[str, Any], file: Path = _FILE) -> None:
    """Replace the part. ValueError if the marks are not there."""
    text = file.read_text()
    head, found, rest = text.partition(_BEGIN)
    _, closed, tail = rest.partition(_END)
    if not found or not closed:
        raise ValueError(f"{file} has no place for results")
    file.write_text(head + _BEGIN + "\n".join(_lines(results)) + "\n" + _END + tail)


def _lines(results: dict[str, Any]) -> Iterator[str]:
    before, after = results["before"], results["after"]
    load = f"load average {before['load'][0]} before and {after['load'][0]} after"
    busy = " **With other work on the machine: these are upper bounds.**" if before["load"][0] > 1.0 else ""
    machine = f"{before['cpus']} x {before['processor']}, {before['memory_gib']} GiB"
    yield f"Linux {before['kernel']}, {machine}; {load}.{busy}"
    yield from _summary(results)
    for part, cells in results.items():
        if part == "stream":
            yield from ("", "**stream** (MB/s; ratios to Python's `ssl`)", "", "| | |", "|---|---|")
            for name, value in cells.items():
                yield f"| {name} | {value if name.endswith('ratio') else value / 1e6:.2f} |"
        elif part not in ("before", "after"):
            for cell in cells:
                yield from _cell(part, cell)


def _summary(results: dict[str, Any]) -> Iterator[str]:
    """The downtime of all cells in one table."""
    criu = {(cell["heap_mib"], cell["rate_mb"]): cell for cell in results.get("criu", ()) if "counter_ms" in cell}
    if "counter" not in results:
        return
    yield from ("", "| heap, MiB | written, MB/s | downtime, median ms | p90 | reference | CRIU 4.2, ms |")
    yield "|---|---|---|---|---|---|"
    for cell in results["counter"]:
        place, figure = (cell["heap_mib"], cell["rate_mb"]), cell["counter_ms"]
        other = f"{criu[place]['counter_ms']['median']:.0f}" if place in criu else ""
        values = f"{figure['median']:.1f} | {figure['p90']:.1f} | {figure.get('reference', '')} | {other}"
        yield f"| {place[0]} | {place[1]} | {values} |"


def _cell(part: str, cell: dict[str, Any]) -> Iterator[str]:
    fixed = ", ".join(f"{name} {value}" for name, value in cell.items() if not isinstance(value, dict))
    yield from ("", f"**{part}**: {fixed}")
    figures = {name: value for name, value in cell.items() if isinstance(value, dict)}
    if figures:
        yield from ("", "| | median | p90 | reference figure |", "|---|---|---|---|")
        for name, value in figures.items():
            yield f"| {name} | {value['median']:.2f} | {value['p90']:.2f} | {value.get('reference', '')} |"

"""Numbers of repeated measurements, and what is said of them."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def p90(values: Sequence[float]) -> float:
    """The nearest-rank 90th percentile."""
    return sorted(values)[max(0, -(-len(values) * 9 // 10) - 1)]


class Figures:
    """Values by name, in the order in which the names came."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """One more."""
        self._values.setdefault(name, []).append(value)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Median, p90 and all values of each name."""
        return {
            name: {
                "median": round(statistics.median(values), 3),
                "p90": round(p90(values), 3),
                "all": [round(value, 3) for value in values],
            }
            for name, values in self._values.items()
        }


def surroundings() -> dict[str, Any]:
    """What the numbers depend on: kernel, processors, memory, and who else is at work."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "processor": models[0] if models else platform.machine(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": [round(one, 2) for one in os.getloadavg()],
    }

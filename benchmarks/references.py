"""Reference figures, by which this machine's are judged.

`PROTOTYPE_MS` are the medians that a prototype of the same protocol reached on a machine with two processors, by the
program's own counter: agents in C, plain TCP, no journal and no TLS. phaul is to stay within `FACTOR` times that.
"""

from __future__ import annotations

FACTOR = 3
PROTOTYPE_MS = {  # by MiB of heap and 10^6 bytes written a second
    (64, 0): 1.699,
    (64, 10): 1.772,
    (64, 100): 3.479,
    (1024, 0): 5.704,
    (1024, 10): 2.383,
    (1024, 100): 8.817,
    (4096, 0): 3.173,
    (4096, 10): 3.931,
    (4096, 100): 6.397,
}


def aim(heap_mib: int, rate_mb: int) -> float | None:
    """What the median of a cell is to stay below, in ms; None for a cell that the prototype was not measured in."""
    known = PROTOTYPE_MS.get((heap_mib, rate_mb))
    return None if known is None else round(FACTOR * known, 1)

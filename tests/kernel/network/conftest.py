"""Fixtures: a lab of network namespaces, and a move of sockets through it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .lab import Lab, Move

if os.geteuid() != 0:
    pytest.skip("network namespaces need root", allow_module_level=True)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Source, destination and client."""
    made = Lab(f"ph{os.getpid()}")
    yield made
    made.remove()


@pytest.fixture
def move(lab: Lab) -> Iterator[Move]:
    """From the lab's source to its destination."""
    made = Move(lab.source.net, lab.destination.net)
    yield made
    made.close()

"""`phaul migrate` between the two test hosts, over SSH."""

from __future__ import annotations

from tests.migration.conftest import Mover
from tests.subjects.programs import Subject


def test_a_heap_that_is_written_moves_there_and_back(mover: Mover, heap: Subject) -> None:
    mover.move(heap)
    mover.move(heap)


def test_a_server_moves_with_its_address_and_its_connections(mover: Mover, echo: tuple[Subject, Subject]) -> None:
    server, client = echo
    mover.move_with_service(server)
    client.goes_on("requests")

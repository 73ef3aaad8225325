"""Programs that go from one kernel to another and back, and to disk and back on each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.vm.machine import Machine
from tests.vm.programs import Heap, Redis, migrate, tell

pytestmark = pytest.mark.timeout(2400)
Log = Callable[[str], None]


@pytest.fixture
def log(record_property: Callable[[str, object], None]) -> Log:
    """Prints a line, and keeps it in reports."""

    def write(line: str) -> None:
        print(line)
        record_property("move", line)

    return write


def test_memory_and_threads_move_there_and_back(pair: tuple[Machine, Machine], log: Log) -> None:
    one, other = pair
    heap = Heap.start(one, other)
    for source, destination in ((one, other), (other, one)):
        log(tell("heap", migrate(heap.pid, source, destination), destination))
        heap.machine = destination
        heap.goes_on()
    heap.finish()


def test_redis_moves_there_and_back(pair: tuple[Machine, Machine], log: Log) -> None:
    one, other = pair
    redis = Redis.start(one)
    for source, destination in ((one, other), (other, one)):
        redis.write(500)
        log(tell("redis", migrate(redis.pid, source, destination), destination))
        redis.machine = destination
        redis.check()
    redis.finish()


def test_to_disk_and_back(pair: tuple[Machine, Machine]) -> None:
    for machine in {machine.kernel: machine for machine in pair}.values():
        _to_disk_and_back(machine)


def _to_disk_and_back(machine: Machine) -> None:
    heap = Heap.start(machine)
    images = f"/var/tmp/images-{heap.pid}"
    machine.run(["phaul", "dump", "--pid", str(heap.pid), "--images", images], timeout=600)
    assert not machine.alive(heap.pid)
    machine.run(["phaul", "restore", "--images", images, "--detach"], timeout=600)
    heap.goes_on()
    heap.finish()
    machine.run(["rm", "-r", images])

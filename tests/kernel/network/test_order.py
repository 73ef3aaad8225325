"""The order of the freeze: nothing is done to a connection before the tree can no longer run by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.calls import pidfd_getfd
from phaul_engine.collect import Collector
from phaul_engine.images.pb import fdinfo_pb2
from phaul_engine.network.undo import repair_entry, undo
from phaul_engine.objects.base import Collection
from phaul_engine.target import Tracer, stop_tree

from tests.subjects.programs import wait_until

_TCP_REPAIR = 19
_PROGRAM = """
import signal, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
caller = socket.create_connection(listener.getsockname())
called = listener.accept()[0]
with open(sys.argv[1], "w") as out:
    print(caller.fileno(), file=out)
signal.pause()
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[int, socket.socket]]:
    """A process with a connection to itself, and our duplicate of one end."""
    said, nothing = tmp_path / "said", subprocess.DEVNULL
    words = [sys.executable, "-c", _PROGRAM, str(said)]
    child = subprocess.Popen(words, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    wait_until(lambda: said.exists() and said.read_text().endswith("\n"), "it is there", 30.0)
    pidfd = os.pidfd_open(child.pid)
    with socket.socket(fileno=pidfd_getfd(pidfd, int(said.read_text()))) as end:
        yield child.pid, end
    os.close(pidfd)
    child.kill()
    child.wait()


def test_connections_are_touched_when_the_tree_is_frozen_and_the_undo_written(
    program: tuple[int, socket.socket],
) -> None:
    pid, end = program
    seen = []

    def look(what: str) -> None:
        seen.append((what, end.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR)))

    entries = []

    def seal(collection: Collection) -> None:
        look("seal")
        entries.append(repair_entry(collection))

    with Tracer() as tracer, stop_tree(tracer, pid, timeout_ms=1000) as tree, Collector() as collector:
        collection = collector.collect(tree, survey=False, hold=lambda: look("hold"), seal=seal)
        look("end")
        assert collection.blockers == []
        kinds = {record.message.type for record in collection.checkpoint.records("files")}
        assert fdinfo_pb2.INETSK in kinds
    for entry in entries:
        undo(entry)
    assert seen == [("hold", 0), ("seal", 0), ("end", 1)]
    look("undone")
    assert seen[-1] == ("undone", 0)

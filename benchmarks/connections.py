"""What established TCP connections cost in the freeze: processor time a connection, read at the source, made and let go
at the destination, against what the system calls of it take alone.

Two network namespaces and a client on this machine; every tenth connection has bytes in both queues. The reference is
the options of one connection, read in one native call. `python -m benchmarks.connections [N]` prints JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.objects import socket_options, tcp
from phaul_engine.objects.base import Collection, Descriptor

from benchmarks.figures import Figures
from tests.kernel.network.lab import SERVICE, Lab, Move

_PORT = 7000
_KIND = tcp.Tcp()


def measure(count: int, repeats: int) -> dict[str, Any]:
    """One cell: so many connections. Microseconds of processor time for each."""
    figures = Figures()
    for number in range(repeats):
        lab = Lab(f"bench{os.getpid()}-{number}")
        try:
            _once(lab, count, figures)
        finally:
            lab.remove()
    return {"connections": count, **figures.summary()}


def _once(lab: Lab, count: int, figures: Figures) -> None:
    with ExitStack() as stack:
        move = Move(lab.source.net, lab.destination.net)
        stack.callback(move.close)
        servers = _connect(lab, count, stack)
        move.collect(servers, survey=True)
        restoration = move.rebuild()
        descriptors = [move.descriptor(sock.fileno()) for sock in servers]
        collection = Collection(Checkpoint(), options={}, memory=move.memory)

        def timed(name: str, act: Callable[[], object]) -> None:
            begun = time.thread_time_ns()
            act()
            figures.add(f"{name}, us", (time.thread_time_ns() - begun) / 1000 / count)

        timed("reference: all options", lambda: [socket_options.read(sock) for sock in servers])
        timed("look", lambda: _look(descriptors, collection))
        timed("read", lambda: _KIND.seal(collection))
        restoration.checkpoint = collection.checkpoint
        restoration.renew()
        entries = [record.message for record in collection.checkpoint.records("files")]
        made = restoration.made
        timed("make", lambda: [_KIND.settle(entry, made[entry.id], restoration) for entry in entries])
        timed("let go", lambda: _KIND.release(restoration))
        for fd in made.values():
            stack.callback(os.close, fd)


def _look(descriptors: list[Descriptor], collection: Collection) -> None:
    for file_id, descriptor in enumerate(descriptors, 1):
        collection.checkpoint.put("files", None, _KIND.collect(descriptor, file_id, collection))


def _connect(lab: Lab, count: int, stack: ExitStack) -> list[socket.socket]:
    listener = lab.source.socket(socket.AF_INET, socket.SOCK_STREAM)
    stack.callback(listener.close)
    listener.bind((SERVICE[socket.AF_INET], _PORT))
    listener.listen(128)
    servers = []
    for number in range(count):
        client = lab.client.socket(socket.AF_INET, socket.SOCK_STREAM)
        stack.callback(client.close)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        stack.callback(server.close)
        if number % 10 == 0:
            client.sendall(b"question" * 16)
            server.sendall(b"answer" * 16)
        servers.append(server)
    return servers


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 500, 3), indent=1))

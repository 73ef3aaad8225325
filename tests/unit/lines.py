"""Destinations that answer for their rows over real TLS connections on the loopback, and lines to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from phaul.asking import Line, answer_again, link_of
from phaul.journal import Journal, Row, Store, Task, boot_id
from phaul.migration import Message, Role, Send
from phaul.migration import Row as State
from phaul.transport.bootstrap import ident
from phaul.transport.pages import PageListener
from tests.page_streams import identities

ID = "0123456789ab"
NEVER = 120.0  # seconds: longer than a test


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def links() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the rows of both sides note of the connection between them, the source's first; nobody listens yet."""
    (ours, theirs), port = identities(), free_port()
    return (
        link_of(ours, theirs.fingerprint, "127.0.0.1", port),
        link_of(theirs, ours.fingerprint, "127.0.0.1", port),
    )


class There:
    """A destination's row, and who answers for it in place of a dead agent, in a thread. `decided` is how often the row
    was asked."""

    def __init__(self, directory: Path, *states: State, seconds: float = NEVER) -> None:
        self.store = Store(directory)
        self.here, self.link = links()
        self.line = Line(ID, self.here)
        owner = Task(pid=os.getpid(), start=1)
        self.journal = self.store.create(Row(migration=ID, role=Role.DESTINATION, boot=boot_id(), owner=owner))
        for state in states:
            self.journal.transition(self.journal.row.state, state)
        self.decided = 0
        self._seconds = seconds
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._answer)

    def _answer(self) -> None:
        with self.row() as journal:
            self._opened.set()
            answer_again(journal, self.link, lambda: self.decide(journal), seconds=self._seconds)

    def decide(self, journal: Journal) -> list[Send]:
        """What is not decided is, and what is dead has ended, as by a recovery."""
        self.decided += 1
        if journal.refresh().state is State.PARKED:
            journal.transition(State.PARKED, State.DISCARDED)
        if journal.row.state is State.DISCARDED and not journal.row.ended:
            journal.end()
        return [Send(Message(journal.row.state.name), "so it is")]

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._opened.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.line.close()
        self.journal.close()
        if self._thread.is_alive():
            with self.row() as journal:
                journal.note(heard=True)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def row(self) -> Journal:
        """As it is now; whoever ends it replaces the file."""
        journal = self.store.open(ID, Role.DESTINATION)
        assert journal is not None
        return journal

    def ends(self, seconds: float = 5.0) -> bool:
        """Whether nobody answers any more, in that time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


@contextlib.contextmanager
def served(act: Callable[[PageListener], Any]) -> Iterator[Line]:
    """A line to a listener that does this, in a thread."""
    (ours, theirs), (here, there) = identities(), links()

    async def main() -> None:
        tls = theirs.context(server=True, pin=ours.fingerprint)
        async with PageListener(tls, ident(ID), 1) as listener:
            listener.listen("127.0.0.1", int(there["port"]))
            await act(listener)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    with contextlib.closing(Line(ID, here)) as line:
        yield line
        thread.join(10)
    assert not thread.is_alive()

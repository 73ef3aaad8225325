"""Questions after a death, over real TLS connections on the loopback: who asks, who answers, and when that ends."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul import asking
from phaul.asking import Line, link_of
from phaul.desk import Desk
from phaul.desk import Kind as Frames
from phaul.journal import Store, Task
from phaul.migration import Message, Received
from phaul.migration import Row as State
from phaul.transport.control import Frame
from phaul.transport.direct import Direct, Kind
from phaul.transport.pages import PageListener, make_identity
from tests.page_streams import descriptors
from tests.unit.lines import ID, There, links, served


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() == before


def test_a_source_that_committed_hears_what_the_row_says_and_then_says_goodbye(tmp_path: Path) -> None:
    with There(tmp_path / "state", State.PARKED, State.RESUMED) as there:
        for _ in range(2):
            assert there.line.ask(Message.ASK, 10) == Received(Message.RESUMED, "so it is")
        there.line.close()  # it may come back
        assert there.line.ask(Message.RELEASED, 10) == Received(Message.GOODBYE)
        assert there.ends()
        assert there.journal.refresh().state is State.RELEASED


def test_a_source_that_knows_is_told_goodbye_once_more(tmp_path: Path) -> None:
    with There(tmp_path / "state", State.PARKED, State.DISCARDED) as there:
        assert there.line.ask(Message.RELEASED, 10) == Received(Message.GOODBYE)
        assert there.ends()
        assert there.journal.refresh().state is State.DISCARDED
        assert not there.decided


@pytest.mark.parametrize("state", [State.PARKED, State.DISCARDED])
def test_an_abort_ends_it(tmp_path: Path, state: State) -> None:
    with There(tmp_path / "state", state) as there:
        there.line.tell(Message.ABORT, "called off", 10)
        assert there.ends()
        assert there.journal.refresh().state is State.DISCARDED
        assert there.decided == (state is State.PARKED), "an arbiter that does not answer has kept it"


def test_what_is_no_question_is_not_answered(tmp_path: Path) -> None:
    with There(tmp_path / "state", State.PARKED, State.RESUMED) as there:
        there.line.tell(Message.FINAL, "", 10)
        direct = there.line._connected(5)
        direct.send(Kind.ALIVE)
        assert there.line.ask(Message.COMMIT, 10) == Received(Message.RESUMED, "so it is")
        assert there.decided == 1


def test_only_answers_are_taken_for_answers(tmp_path: Path) -> None:
    """What was on its way when the agent died may still come."""

    async def main(listener: PageListener) -> None:
        link = Direct(await listener.control(10))
        with contextlib.closing(link.channel):
            await link.next()
            link.send(Kind.PHASES, b"[]")
            link.send_protocol(Message.READY)
            link.send_protocol(Message.DISCARDED, "at last")

    with served(main) as line:
        assert line.ask(Message.ASK, 10) == Received(Message.DISCARDED, "at last")


def test_a_connection_that_breaks_is_made_again() -> None:
    async def main(listener: PageListener) -> None:
        link = Direct(await listener.control(10))
        await link.next()
        link.channel.close()
        link = Direct(await listener.control(10))
        with contextlib.closing(link.channel):
            await link.next()
            link.send_protocol(Message.DISCARDED)

    with served(main) as line:
        assert line.ask(Message.ASK, 10) == Received(Message.DISCARDED)


def test_silence_is_no_answer() -> None:
    line = Line(ID, links()[0])
    begun = time.monotonic()
    assert line.ask(Message.ASK, 0.5) is None
    line.tell(Message.ABORT, "nobody is there", 0.5)
    assert 0.9 < time.monotonic() - begun < 10


def test_a_stranger_is_not_answered(tmp_path: Path) -> None:
    """Whoever has not the key that was made for this one migration."""
    with There(tmp_path / "state", State.PARKED) as there:
        link = link_of(make_identity(), bytes.fromhex(there.link["fingerprint"]), "127.0.0.1", there.link["port"])
        with contextlib.closing(Line(ID, link)) as line:
            assert line.ask(Message.ASK, 1) is None
        assert not there.decided


def test_it_is_over_when_the_time_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_LOOK", 0.05)
    with There(tmp_path / "state", State.PARKED, State.RESUMED, seconds=0.2) as there:
        assert there.ends()


# -- told beside, through SSH ---------------------------------------------------------------------------------------


def told(store: Store, word: Message | str) -> dict[str, str]:
    """What `phaul resolve` at the source tells, or asks of, this host's desk."""
    body = {"migration": ID, "role": "destination", "answer": str(word), "keep": ""}
    reply = Desk(store.directory, store.directory.parent / "run")._reply(
        Frame(Frames.RESOLVE, json.dumps(body).encode())
    )
    assert reply.type == Frames.ANSWER, reply.body
    found: dict[str, str] = json.loads(reply.body)
    return found


@pytest.mark.parametrize("ended", [True, False])
def test_who_answers_ends_when_the_desk_is_told_of_the_abort(tmp_path: Path, ended: bool) -> None:
    with There(tmp_path / "state", State.PARKED, State.DISCARDED) as there:
        if ended:
            assert there.line.ask(Message.ASK, 10) == Received(Message.DISCARDED, "so it is")
        for _ in range(2):
            assert told(there.store, Message.ABORT)["outcome"] == "stayed"
        assert there.ends()
        assert there.journal.path.exists(), "it is history"


def test_a_program_that_runs_here_is_not_called_off(tmp_path: Path) -> None:
    with There(tmp_path / "state", State.PARKED, State.RESUMED) as there:
        assert told(there.store, Message.ABORT)["outcome"] == "error"
        assert there.line.ask(Message.ASK, 10) == Received(Message.RESUMED, "so it is")


def test_who_answers_ends_when_the_desk_has_been_told_that_it_is_released(tmp_path: Path) -> None:
    with There(tmp_path / "state", State.PARKED, State.RESUMED) as there:
        assert told(there.store, Message.RELEASED)["outcome"] == "migrated"
        assert there.ends()


@pytest.fixture
def lingering(tmp_path: Path) -> Iterator[There]:
    """An agent that has not decided, as without an answer of its arbiter, and waits for the source: this process."""
    there = There(tmp_path / "state", State.PARKED)
    there.journal.note(owner=Task.of(os.getpid()))
    with there:
        yield there


def test_a_living_agent_that_waits_ends_when_the_desk_is_told_of_the_abort(lingering: There) -> None:
    assert told(lingering.store, Message.ABORT)["outcome"] == "stayed"
    assert lingering.ends()
    assert lingering.journal.refresh().state is State.DISCARDED
    assert lingering.decided == 1, "the copy is killed by it, and by nobody else"


def test_a_living_agent_that_waits_kills_what_the_desk_has_discarded(lingering: There) -> None:
    assert told(lingering.store, "ask")["answer"] == "DISCARDED"
    assert not lingering.ends(1.5), "the answer may not have come, and it may be asked again"
    assert lingering.decided == 1
    with lingering.row() as journal:
        assert journal.row.ended

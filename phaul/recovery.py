"""Redo and undo by the row: what a process does that finds a migration whose agent is dead.

The decisions are the state machine's (`phaul.migration.recover`), the deeds are here, and all of them are harmless when
they were done before: a recovery that dies is simply started again. Nothing is done beside a living agent: it is killed
first, since what it holds with ptrace cannot be set going by anybody else.

A row's undo list names deeds by kind. `HANDLERS` knows the kinds; parts of the engine that touch the host add theirs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, assert_never

from phaul_engine import lock_move, silence
from phaul_engine.cgroup import Hierarchy, Hold, HoldGoneError, path_of, path_of_hold
from phaul_engine.errors import EngineError
from phaul_engine.namespaces.net import plug
from phaul_engine.network import undo as network
from phaul_engine.network.address import Address
from phaul_engine.network.interfaces import holder_of
from phaul_engine.objects import carried_file, last_words, sysv_shm

from phaul import asking, logs, migration, workloads
from phaul.errors import ArbiterError, JournalError, LostRaceError, OverruledError, PhaulError
from phaul.haul import beside as haul
from phaul.haul import btrfs, overlay
from phaul.journal import Journal, Row, Store, Task, Undo
from phaul.migration import (
    Broken,
    Done,
    Ended,
    Event,
    Expired,
    Failed,
    Keep,
    Limits,
    LinkLost,
    Message,
    Outcome,
    Received,
    Refused,
    Role,
    Send,
    Start,
    State,
    Step,
    Swap,
    Swapped,
    Work,
)

if TYPE_CHECKING:
    from phaul.arbiter import Arbiter

log = logging.getLogger(__name__)
_KILL_PATIENCE = 10.0  # seconds for a killed process to be gone
_FORWARD_TIME = 0.05  # seconds that packets for the moved program are still kept from this host's stack

RUNTIME_PATIENCE = 2.0  # seconds in which a runtime that has failed is told again
_PAUSE = 0.2  # seconds between two tries

LOCK_PATIENCE = 5.0  # seconds for the copy at the destination to be gone, which has the file locks
_TELLING = 10.0  # seconds to reach a destination that need not know
_TEMPORARY = "hold"  # the kind of entry that neither side keeps
_WORDS = 1000  # characters of a warning

Asker: TypeAlias = Callable[[Message, float], Received | None]


@dataclass(frozen=True)
class Handler:
    """What is known about one kind of entry. `undo` takes the deed back; `redo` makes sure that it is done, where the
    program goes on with it. Both get the entry's data, and both are harmless when called again."""

    undo: Callable[[dict[str, Any]], None]
    redo: Callable[[dict[str, Any]], None] | None = None


HANDLERS: dict[str, Handler] = {
    **{kind: Handler(act, network.REDO.get(kind)) for kind, act in network.UNDO.items()},
    sysv_shm.KIND: Handler(sysv_shm.remove),
    lock_move.KIND: Handler(lambda _: None),  # undone by the thaw: not all of it can be while tasks are frozen
    carried_file.KIND: Handler(carried_file.remove),
    carried_file.LEFT_KIND: Handler(carried_file.mark),
    haul.KIND: Handler(haul.discard, haul.publish),
    haul.LEFT_KIND: Handler(haul.put_aside),
    btrfs.KIND: Handler(btrfs.forget),
    overlay.KIND: Handler(overlay.discard, overlay.publish),
    plug.KIND: Handler(lambda data: None, plug.redo),  # an outer end goes with the inner one
    last_words.KIND: Handler(lambda data: None, last_words.redo),  # of a discarded copy nothing is left
}


def undo(entry: Undo) -> None:
    """Take one deed back."""
    _handler(entry).undo(dict(entry.data))


def redo(entry: Undo) -> None:
    """Make sure that one deed is done."""
    handler = _handler(entry)
    if handler.redo is not None:
        handler.redo(dict(entry.data))


def _handler(entry: Undo) -> Handler:
    if entry.kind not in HANDLERS:
        raise EngineError(
            f"the journal holds a deed of unknown kind {entry.kind!r}", advice="it was written by another phaul: use it"
        )
    return HANDLERS[entry.kind]


def fence(owner: Task) -> None:
    """Make sure that an agent is dead. PhaulError if it does not die."""
    if owner.pid == os.getpid():
        return
    try:
        fd = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        return
    try:
        if not owner.alive:  # asked after the descriptor was taken: the number cannot have passed on since
            return
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(_KILL_PATIENCE * 1000):
            raise PhaulError(
                f"the agent (pid {owner.pid}) was killed, but does not die",
                advice="it waits for a device or a file server: see /proc/PID/stack; try again when that is over",
            )
    except ProcessLookupError:
        return
    finally:
        os.close(fd)


class Deeds:
    """The works that a row alone tells how to do."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    @property
    def row(self) -> Row:
        """The row as last read."""
        return self._journal.row

    def do(self, work: Work) -> None:
        """Do a work; EngineError or PhaulError if it fails."""
        match work:
            case Work.UNDO:
                self._each(undo, tuple(reversed(self.row.undo)))
                self._thaw()
                self._disband()
                self._tell("facts", lambda workload, facts: workload.let_go(facts))
            case Work.RELEASE:
                self._kill()
                self._leave_addresses()
                time.sleep(_FORWARD_TIME if self.row.undo else 0)
                self._each(undo, tuple(reversed(self.row.undo)))
                self._tell("facts", lambda workload, facts: workload.give_up(facts))
            case Work.KILL:
                self._kill()
                self._each(undo, tuple(reversed(self.row.undo)))
                self._tell("notes", lambda workload, notes: workload.withdraw(notes))
            case Work.WAKE:
                self._each(redo, self.row.undo)
                self._thaw()
            case Work.SYNC:
                self._journal.sync()
            case Work.TIDY:
                if self.row.state is migration.Row.RELEASED:  # until then packets come that were held for it
                    self._each(lambda entry: undo(entry) if entry.kind == _TEMPORARY else None, self.row.undo)
                self._tell("notes", self._take_over)
                self._disband()
            case Work.FORGET:
                self._journal.remove()
            case Work.REVOKE:
                with _register(self.row) as register:
                    register.decide("discarded")
            case _:
                raise ValueError(f"{work.name} needs an agent")

    def _tell(self, what: str, act: Callable[[workloads.Workload, dict[str, Any]], None]) -> None:
        """Tell the runtime that the program belongs to: again if that fails, as it may where the dead are not yet gone.
        What fails in the end is noted, and keeps nobody."""
        kind, told = self.row.workload.get("kind", "pid"), self.row.workload.get(what)
        if kind == "pid" or not isinstance(told, dict):
            return
        deadline = time.monotonic() + RUNTIME_PATIENCE
        while True:
            try:
                return act(workloads.of(str(kind)), told)
            except (EngineError, PhaulError, OSError) as error:
                if time.monotonic() > deadline:
                    self._journal.note(warning=f"{kind}: {error}"[:_WORDS])
                    return
            time.sleep(_PAUSE)

    def _take_over(self, workload: workloads.Workload, notes: dict[str, Any]) -> None:
        if self.row.tasks:
            pids = [task.pid for task in self.row.tasks]
            self._with_hold(lambda hold: pids.extend(hold.members() - set(pids)))
            workload.take_over(notes, pids[0], pids)

    def _each(self, act: Callable[[Undo], None], entries: tuple[Undo, ...]) -> None:
        """Do all. What fails is noted, and keeps neither the rest nor the program: the network is less than it."""
        problems = []
        for entry in entries:
            try:
                act(entry)
            except (EngineError, OSError) as error:
                problems.append(f"{entry.kind}: {error}")
        if problems:
            self._journal.note(warning="; ".join(problems)[:_WORDS])

    def _leave_addresses(self) -> None:
        """The moved addresses are no longer this host's. They may be on another device than there."""
        for text in self.row.addresses if self.row.role is Role.SOURCE else ():
            place = text.partition("@")[0]
            device = holder_of(place.partition("/")[0])
            if device is not None:
                address = Address.prepare(f"{place}@{device}")
                address.remove()
                address.close()

    def _with_hold(self, act: Callable[[Hold], None]) -> None:
        """Act on the tree's cgroup; one that is gone has nothing left to act on."""
        if not self.row.cgroup or not self.row.same_boot:
            return
        with Hierarchy.find() as hierarchy:
            try:
                hold = Hold.open(hierarchy, self.row.cgroup)
            except HoldGoneError:
                return
            try:
                act(hold)
            except HoldGoneError:
                return
            finally:
                hold.close()

    def _thaw(self) -> None:
        """With the file locks that the tree has given up."""

        def thaw(hold: Hold) -> None:
            deeds = [dict(entry.data) for entry in self.row.undo if entry.kind == lock_move.KIND]
            lost = lock_move.thaw(hold, deeds, LOCK_PATIENCE)
            if deeds:
                taken = Undo(kind=lock_move.KIND, data={"locks": []})
                self._journal.note(undo=(taken,), **({"warning": lost[:_WORDS]} if lost else {}))

        self._with_hold(thaw)

    def _disband(self) -> None:
        self._with_hold(Hold.disband)

    def _kill(self) -> None:
        def kill(hold: Hold) -> None:
            problem = silence.kill(hold, _KILL_PATIENCE)
            if problem:
                self._journal.note(warning=problem[:_WORDS])
            hold.remove()

        self._with_hold(kill)


class Doer(Protocol):
    """Who does the works of a recovery."""

    def do(self, work: Work) -> None:
        """Do a work; EngineError, PhaulError or OSError if it fails."""
        ...


class Recovery:
    """One process's work on a row, to its end. `ask` sends a question to the other side and waits for an answer, at
    most so many seconds; None stands for silence. `deeds` are the row's, unless another world is at hand. `asked`: the
    other side waits for what will stand in `sent`."""

    def __init__(
        self,
        journal: Journal,
        *,
        ask: Asker | None = None,
        keep: Role | None = None,
        deeds: Doer | None = None,
        asked: bool = False,
    ) -> None:
        self._journal = journal
        self._asked = asked
        self._limits = Limits(arbiter=bool(journal.row.arbiter))
        self._deeds = deeds or Deeds(journal)
        self._ask = ask
        self._keep = keep
        self.sent: list[Send] = []

    def run(self) -> Ended:
        """Do what the row says. The answers that are to be sent stand in `sent` afterwards."""
        row = self._journal.refresh()
        if row.same_boot:
            fence(row.owner)
            row = self._journal.refresh()
        if row.ended:
            self.sent.append(Send(_ANSWERS.get(row.state, Message.UNKNOWN), row.why))
            return Ended(Outcome.MIGRATED if row.state in _THERE else Outcome.STAYED, row.why)
        made = migration.recover(
            row.role, row.state, same_boot=row.same_boot, arbiter=self._limits.arbiter, asked=self._asked
        )
        return self._carry_out(made)

    def _carry_out(self, made: Step) -> Ended:
        state = made.state
        queue = list(made.actions)
        while True:
            event = self._act(queue.pop(0), state) if queue else self._wait(state)
            if event is None:
                if isinstance(state, Ended) and not queue:
                    return self._end(state)
                continue
            after = migration.step(state, event, self._limits)
            state = after.state
            queue.extend(after.actions)

    def _end(self, state: Ended) -> Ended:
        if not state.unfinished and self._journal.path.exists():
            self._journal.end()
            forget_register(self._journal.row)
        return state

    def _act(self, action: migration.Action, state: State) -> Event | None:
        match action:
            case Send():
                return self._send(action, state)
            case Swap(expected, to, why):  # the one that is synced comes before a freeze, which nobody makes here
                return self._swap(expected, to, why)
            case Start(work):
                try:
                    self._deeds.do(work)
                except ArbiterError as error:
                    return Failed(work, str(error), again=not isinstance(error, OverruledError))
                except (EngineError, PhaulError, OSError) as error:
                    return Failed(work, str(error))
                return Done(work)
            case _ as never:
                assert_never(never)

    def _swap(self, expected: migration.Row, to: migration.Row, why: str) -> Event:
        try:
            self._journal.transition(expected, to, why=why)
        except LostRaceError as error:
            return Refused(migration.Row(error.state))
        except JournalError as error:
            return Broken(str(error))
        return Swapped(to)

    def _send(self, action: Send, state: State) -> Event | None:
        if action.message not in (Message.ASK, Message.RELEASED):
            self.sent.append(action)
            return None
        if action.message is Message.ASK and self._keep is not None:
            return Keep(self._keep)
        if self._ask is None:
            return LinkLost()
        return self._ask(action.message, migration.deadline(state, migration.Limits()) or 5.0)

    def _wait(self, state: State) -> Event | None:
        """Nothing is under way: only time can pass."""
        return None if isinstance(state, Ended) else Expired()


def forget_register(row: Row) -> None:
    """A source whose row has ended needs no arbiter any more. One that does not hear of it keeps a few bytes."""
    if row.role is Role.SOURCE and row.arbiter:
        with contextlib.suppress(ArbiterError), _register(row) as register:
            register.forget()


def overrule_register(row: Row) -> None:
    """The operator vouches for a copy that the arbiter may not know of: whoever asks it later hears of it."""
    if row.arbiter:
        with contextlib.suppress(ArbiterError), _register(row) as register:
            register.overrule("discarded")


@contextlib.contextmanager
def _register(row: Row) -> Iterator[Arbiter]:
    from phaul.arbiter import Arbiter

    register = Arbiter.of_row(dict(row.arbiter), row.migration)
    try:
        yield register
    finally:
        register.close()


_ASKING = frozenset({migration.Row.FROZEN, migration.Row.COMMITTED, migration.Row.RELEASED})
_ANSWERING = frozenset({migration.Row.PARKED, migration.Row.RESUMED, migration.Row.DISCARDED})
_THERE = (migration.Row.RELEASED, migration.Row.RESUMED)
_ANSWERS = {  # what a row that asks for nothing more tells the other side
    migration.Row.ABORTED: Message.ABORT,
    migration.Row.DISCARDED: Message.DISCARDED,
    migration.Row.RESUMED: Message.RESUMED,
    migration.Row.RELEASED: Message.RESUMED,
}


def recover_source(journal: Journal) -> Ended:
    """Do what a dead source agent's row says, asking the destination where only that knows. It is told of an abort
    that it may not have heard of: until then it waits for a question."""
    row = journal.row
    line = asking.Line(row.migration, row.link) if row.link and row.state in _ASKING else None
    try:
        recovery = Recovery(journal, ask=None if line is None else line.ask)
        ended = recovery.run()
        for send in recovery.sent:
            if line is not None and send.message is Message.ABORT:
                line.tell(send.message, send.why, _TELLING)
        return ended
    finally:
        if line is not None:
            line.close()


def recover_destination(journal: Journal) -> Ended:
    """Do what a dead destination agent's row says; then answer in its place a source that may have committed to it."""
    before = journal.row

    def decide() -> list[Send]:
        recovery = Recovery(journal, asked=True)
        recovery.run()
        return recovery.sent

    ended = Recovery(journal).run()
    if (
        before.link
        and before.same_boot
        and before.state in _ANSWERING
        and journal.row.state is not migration.Row.RELEASED
    ):
        try:
            asking.answer_again(journal, before.link, decide)
        except OSError as error:
            journal.note(warning=f"the source cannot be answered from here: {error}"[:_WORDS])
    return ended


def asks_for_more(journal: Journal, ended: Ended) -> bool:
    """Whether something of a migration that both sides know the end of is still left here."""
    return ended.unfinished and journal.row.state is migration.Row.RELEASED


def kill_unknown(name: str) -> None:
    """A destination without a row, which an agent removed that could not write it and died before it had killed the
    copy. A copy that is frozen never ran, and now nobody may let it; one that runs is left alone."""
    with Hierarchy.find() as hierarchy:
        try:
            hold = Hold.open(hierarchy, path_of_hold(path_of(os.getpid()), name))
        except HoldGoneError:
            return
        try:
            if hold.frozen or not hold.populated:
                silence.kill(hold, _KILL_PATIENCE)
                hold.remove()
        finally:
            hold.close()


def main(arguments: list[str]) -> int:
    """`python -m phaul.recovery ROLE ID STATE_DIRECTORY`: what a keeper starts. Exit status 0 when the row asks for
    nothing more, or only an operator can say what it does; otherwise another try may help."""
    role, name, directory = arguments
    logs.set_up_agent(name, role)
    journal = Store(Path(directory)).open(name, Role(role))
    if journal is None:
        if Role(role) is Role.DESTINATION:
            kill_unknown(name)
        return 0
    with journal:
        ended = recover_source(journal) if Role(role) is Role.SOURCE else recover_destination(journal)
        log.warning("recovered: %s%s", ended.outcome, f": {ended.why}" if ended.why else "")
        return int(asks_for_more(journal, ended))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

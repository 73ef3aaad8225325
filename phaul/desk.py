"""What is asked of a host before there is a migration: facts, and then an agent.

`phaul agent --stdio` answers these requests one at a time, as root, until it is asked to attach to an agent; from then
on it only passes bytes. Bodies are JSON.
"""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from phaul import jsontext, shipping
from phaul.errors import PhaulError, UsageError, of_status
from phaul.policy import Direction, Gate, Incoming, PolicyError
from phaul.preflight import Answers, HostFacts, ProgramFacts, Questions, from_json
from phaul.transport.control import ChannelClosed, ControlError, Frame, StreamLink

if TYPE_CHECKING:
    from phaul.journal import Journal

_SAID = 4096  # characters of an agent's last words

T = TypeVar("T")


class Kind(enum.IntEnum):
    """Frames of this conversation."""

    HOST = 1  # what is this host and what can it do?
    PROGRAM = 2  # what does the program need, and what of it cannot be moved?
    QUESTIONS = 3  # what of this does this host have?
    FORGET = 4  # the questions have been answered: remove what was put beside files to recognize them
    JOURNAL = 8  # where does a migration stand on this host?
    START = 14  # start the agent of a role and a migration: it will be asked for soon
    ATTACH = 5  # start, or find, the agent of a role and a migration; what follows is for it
    READ = 9  # a part of a file; answered with PART
    DESCRIBE = 10  # a file that is to be sent
    RECEIVE = 11  # a file is coming
    RESOLVE = 13  # finish a migration whose agent is dead, with the other side's answer or the operator's word
    PART = 12  # the bytes of the next part of it; an empty one is the end, and makes the file
    REMOVE = 15  # files that came, and are not needed after all
    POLICY = 16  # what does this host's policy have against such a program?
    ANSWER = 6
    FAILURE = 7


@dataclass(frozen=True)
class Standing:
    """Where a migration stands on a host: the state of its row, empty without one, and whether it is over. `log` is
    the file with what its agent said, and `said` the end of it; empty for an agent that had nothing to explain.
    `owned`: its agent, process `owner`, lives. `arbiter`: there is one for it. `same_boot`: the host has been up since.
    """

    state: str = ""
    ended: bool = False
    why: str = ""
    log: str = ""
    said: str = ""
    peer: str = ""
    owner: int = 0
    owned: bool = False
    arbiter: bool = False
    same_boot: bool = True


@dataclass(frozen=True)
class Resolved:
    """What recovery made of a row: the outcome, why, and the answer that the other side gets (a Message)."""

    outcome: str
    why: str = ""
    answer: str = ""


_DIRECTIONS: dict[int, Direction] = {  # what is asked only of one side
    Kind.PROGRAM: "source",
    Kind.DESCRIBE: "source",
    Kind.READ: "source",
    Kind.QUESTIONS: "destination",
    Kind.RECEIVE: "destination",
    Kind.PART: "destination",
    Kind.REMOVE: "destination",
}
_ANYTHING = Gate("root")


def _reported(work: Callable[[], Frame]) -> Frame:
    """What `work` answers, or a frame that says why it failed."""
    try:
        return work()
    except PhaulError as error:
        body = {"text": str(error), "where": error.where, "advice": error.advice, "status": int(error.exit_status)}
        return _frame(Kind.FAILURE, body)
    except OSError as error:
        return _frame(Kind.FAILURE, {"text": f"{error.filename or 'a file'}: {error.strerror}"})


class Desk:
    """The host's side. `gate` is what its policy lets the asker have."""

    def __init__(self, state_directory: Path, run_directory: Path, gate: Gate = _ANYTHING) -> None:
        self._gate = gate
        self._state_directory = state_directory
        self._run_directory = run_directory
        self._told: set[str] = set()  # files that a program uses which we have looked at
        self._kept = contextlib.ExitStack()
        self._arriving: shipping.Arrival | None = None
        self._answers: dict[int, Callable[[dict[str, Any]], Any]] = {
            Kind.HOST: _host,
            Kind.PROGRAM: self._program,
            Kind.QUESTIONS: _answer,
            Kind.FORGET: self._forget,
            Kind.JOURNAL: self._journal,
            Kind.RESOLVE: self._resolve,
            Kind.DESCRIBE: self._describe,
            Kind.RECEIVE: self._receive,
            Kind.REMOVE: self._remove,
            Kind.POLICY: self._policy,
        }

    async def serve(self, link: StreamLink, start: Callable[[str, str], None]) -> tuple[str, str] | None:
        """Answer until an agent is wanted: its role and migration. None at the end of the stream. `start` has one come
        up before it is wanted."""
        with self._kept:
            while True:
                try:
                    frame = await link.receive()
                except ChannelClosed:
                    return None
                if frame.type == Kind.ATTACH:
                    self._gate.check(_role(_named(frame)[0]))
                    return _named(frame)
                if frame.type == Kind.START:
                    await link.send(_reported(partial(self._started, _named(frame), start)))
                    continue
                await link.send(self._reply(frame))

    def _started(self, named: tuple[str, str], start: Callable[[str, str], None]) -> Frame:
        self._gate.check(_role(named[0]))
        start(*named)
        return _frame(Kind.ANSWER, {})

    def _reply(self, frame: Frame) -> Frame:
        """The answer, or why there is none; ControlError for a frame that makes no sense, which ends it."""
        if frame.type == Kind.PART:
            return self._allowed(frame.type, lambda: _frame(Kind.ANSWER, self._part(frame.body)))
        content = _content(frame)
        if frame.type == Kind.READ:
            return self._allowed(frame.type, lambda: Frame(Kind.PART, self._read(content)))
        answer = self._answers.get(frame.type)
        if answer is None:
            raise ControlError(f"phaul sent a frame of type {frame.type}")
        return self._allowed(frame.type, lambda: _frame(Kind.ANSWER, answer(content)))

    def _allowed(self, kind: int, work: Callable[[], Frame]) -> Frame:
        """What `work` answers, if the policy lets it be asked at all."""

        def checked() -> Frame:
            for direction in (_DIRECTIONS.get(kind), *self._gate.rule.directions):
                if direction is not None:  # what is asked of either side takes one that is allowed
                    self._gate.check(direction)
                    return work()
            raise PolicyError(f"{self._gate.who} may ask for nothing here")

        return _reported(checked)

    def _policy(self, content: dict[str, Any]) -> dict[str, Any]:
        """What the policy has against a program that is to leave, or to come."""
        program = _checked(Incoming, content.get("program"))
        return {"refusals": self._gate.refusals(_role(str(content.get("direction", ""))), program)}

    def _resolve(self, content: dict[str, Any]) -> dict[str, Any]:
        """Recovery by an operator. A row whose agent lives is left to it. If it is the other side that asks, the row
        answers, decided by being asked: the agent, which no one touches, then finds it so (`_answer_beside`)."""
        from phaul.journal import Store
        from phaul.migration import Message, Received, Role
        from phaul.recovery import Recovery, overrule_register

        migration, role = str(content.get("migration", "")), Role(content.get("role", ""))
        answer, keep = str(content.get("answer", "")), str(content.get("keep", ""))
        self._gate.check(_role(role))
        journal = Store(self._state_directory).open(migration, role)
        if journal is None:
            return asdict(Resolved("error", "there is no such migration here", str(Message.UNKNOWN)))
        with journal, self._tidied(journal):
            if self._gate.strict and not self._gate.owns(journal.row.caller):
                raise PolicyError(f"migration {migration} is {journal.row.caller}'s, not {self._gate.who}'s")
            if answer == Message.RELEASED:
                return asdict(_released(journal))
            if answer == Message.ABORT:
                return asdict(_aborted(journal))
            if answer == "ask" and journal.row.owned and not journal.row.ended:
                return asdict(_answer_beside(journal))
            if journal.row.owned and not journal.row.ended:
                raise PhaulError(f"the agent (pid {journal.row.owner.pid}) is alive and works on it")
            if keep == "source":
                overrule_register(journal.row)

            def ask(message: Message, _: float) -> Received | None:
                if message is Message.RELEASED:
                    return Received(Message.GOODBYE)
                return Received(Message(answer)) if answer and answer != "ask" else None

            recovery = Recovery(journal, ask=ask, keep=Role(keep) if keep else None, asked=answer == "ask")
            ended = recovery.run()
            sent = str(recovery.sent[-1].message) if recovery.sent else ""
            return asdict(Resolved(str(ended.outcome), ended.why, sent))

    @contextlib.contextmanager
    def _tidied(self, journal: Journal) -> Iterator[None]:
        """A keeper that was killed has left the name of its listener, which goes when its row has ended."""
        from phaul.transport.relay import socket_path

        yield
        row = journal.row
        if row.ended and not row.owned:
            socket_path(self._run_directory, row.migration, row.role).unlink(missing_ok=True)

    def _receive(self, content: dict[str, Any]) -> dict[str, Any]:
        """A file is coming; what was coming before it is given up."""
        self._kept.close()
        file = _checked(shipping.Shipped, content)
        self._gate.demand_shipped(file.path, file.mode)
        self._arriving = shipping.Arrival(file)
        self._kept.callback(self._arriving.close)
        return {}

    def _part(self, body: bytes) -> dict[str, Any]:
        if self._arriving is None:
            raise ControlError("phaul sent a part of no file")
        if body:
            self._arriving.write(body)
        else:
            made = shipping.sealed(self._arriving.finish(), self._run_directory)
            self._arriving = None
            self._kept.close()
            return asdict(made)
        return {}

    def _program(self, content: dict[str, Any]) -> dict[str, Any]:
        """Facts of a program, with a token beside each file that it writes, kept until they are not needed."""
        from phaul_engine.proc.mountinfo import own_mounts

        from phaul import facts, workloads
        from phaul.haul import layers, trees
        from phaul.journal import Store

        self._kept.close()
        kind, subject = str(content["workload"]), str(content["subject"])
        workload = workloads.of(kind).find(subject)
        self._gate.demand("source", Incoming(uids=facts.uids_of(workload.pid), workload=kind))
        options = {**workload.options, **content.get("options", {})}
        found = facts.program_facts(workload.pid, options, Store(self._state_directory))
        self._told = {file.path for file in found.questions.needed}
        haul = bool(content.get("haul"))
        overlays = layers.among(set(workload.trees) - set(workload.rooms), own_mounts())
        asked = [
            trees.describe(path, counted=haul, room=path in workload.rooms, overlays=overlays)
            for path in workload.trees
        ]
        questions = replace(found.questions, workload=kind, facts=workload.facts, haul=haul)
        questions = self._kept.enter_context(facts.tokens(questions))
        questions = replace(questions, trees=self._kept.enter_context(trees.with_tokens(asked)))
        known = ("parent", "unit") if workloads.of(kind).supervised else ()
        findings = (*workload.findings, *(one for one in found.findings if one.check not in known))
        return asdict(replace(found, questions=questions, findings=findings, pid=workload.pid))

    def _describe(self, content: dict[str, Any]) -> dict[str, Any]:
        return asdict(shipping.describe(self._of_program(content), str(content["sha256"])))

    def _read(self, content: dict[str, Any]) -> bytes:
        return shipping.read(self._of_program(content), int(content["offset"]))

    def _of_program(self, content: dict[str, Any]) -> str:
        """A file that may be read for the other host: one that a program uses which was looked at here."""
        path = str(content["path"])
        if path not in self._told:
            raise PhaulError(f"{path} is no file of the program that is to move")
        return path

    def _remove(self, content: dict[str, Any]) -> dict[str, Any]:
        for made in reversed(_checked(list[shipping.Made], content.get("made"))):
            shipping.remove(made, self._run_directory)
        return {}

    def _forget(self, _: dict[str, Any]) -> dict[str, Any]:
        self._kept.close()
        return {}

    def _journal(self, content: dict[str, Any]) -> dict[str, Any]:
        from phaul.journal import Store
        from phaul.migration import Role

        store = Store(self._state_directory)
        migration, role = str(content.get("migration", "")), Role(content.get("role", ""))
        log, said = _last_words(self._run_directory, migration, role)
        journal = store.open(migration, role)
        if journal is None:
            return asdict(Standing(log=log, said=said))
        with journal:
            row = journal.row
            state, ended = str(row.state), bool(row.ended)
            owner, arbiter = row.owner.pid, bool(row.arbiter)
            return asdict(
                Standing(state, ended, row.why, log, said, row.peer, owner, row.owned, arbiter, row.same_boot)
            )


def _last_words(run_directory: Path, migration: str, role: str) -> tuple[str, str]:
    """Where an agent's log is, and the end of it; empty where there is none."""
    from phaul import logs
    from phaul.transport.relay import socket_path

    socket_path(run_directory, migration, role)  # checks the name: it comes from elsewhere
    where, said = logs.last_words(run_directory, migration, role)
    return where, said[-_SAID:]


def _role(role: str) -> Direction:
    """The direction that a role stands for."""
    if role == "source":
        return "source"
    if role == "destination":
        return "destination"
    raise UsageError(f"not a role: {role!r:.80}")


def _named(frame: Frame) -> tuple[str, str]:
    """The role and the migration of an agent; whoever makes a path of them checks them."""
    content = _content(frame)
    return str(content.get("role", "")), str(content.get("migration", ""))


def _host(_: dict[str, Any]) -> dict[str, Any]:
    from phaul import facts

    return asdict(facts.host_facts())


def _answer(content: dict[str, Any]) -> dict[str, Any]:
    from phaul import facts

    return asdict(facts.answer(_checked(Questions, content)))


def _answer_beside(journal: Journal) -> Resolved:
    """A destination's answer while its agent lives. What is not decided yet never will be for the copy here: the agent
    loses the race for its row, and kills the copy."""
    from phaul.errors import LostRaceError
    from phaul.migration import Message, Row

    answers = {
        Row.RESUMED: Resolved("migrated", answer=str(Message.RESUMED)),
        Row.RELEASED: Resolved("migrated", answer=str(Message.RESUMED)),
        Row.DISCARDED: Resolved("stayed", answer=str(Message.DISCARDED)),
    }
    while (state := journal.refresh().state) not in answers:
        with contextlib.suppress(LostRaceError):
            journal.transition(state, Row.DISCARDED, why="the source asked, and its agent is gone")
    return answers[state]


def _released(journal: Journal) -> Resolved:
    """The source's copy is gone: a destination whose program runs need not remember. Its agent, if it lives, sees that,
    and removes what is left."""
    from phaul.migration import Row
    from phaul.recovery import Recovery

    if journal.row.state == Row.RESUMED:
        journal.transition(Row.RESUMED, Row.RELEASED)
        if not journal.row.owned:
            Recovery(journal).run()
    return Resolved("migrated")


def _aborted(journal: Journal) -> Resolved:
    """The program goes on at the source. A row of an earlier boot, of which nothing lives, has been kept for it to ask:
    it need not be any more. One that is decided, or whose agent lives, is told: whoever waits there for a question sees
    that none will come (`asking.linger`)."""
    from phaul.haul import beside
    from phaul.migration import Row
    from phaul.recovery import Recovery, undo

    if not journal.row.same_boot:
        for entry in journal.row.undo:
            if entry.kind == beside.KIND:  # all else went with the boot
                undo(entry)
        journal.end()
        return Resolved("stayed", "by the source's word")
    if journal.row.state in (Row.RESUMED, Row.RELEASED):
        return Resolved("error", f"the row says {journal.row.state}")
    if not journal.row.heard:
        journal.note(heard=True)
    if journal.row.owned or journal.row.ended:
        return Resolved("stayed", "by the source's word")
    ended = Recovery(journal).run()
    return Resolved(str(ended.outcome), ended.why)


class Visitor:
    """phaul's side of a desk, here or on the other host; `name` is the host's, for messages."""

    def __init__(self, link: StreamLink, name: str) -> None:
        self.link = link
        self.name = name

    async def host(self) -> HostFacts:
        """What the host is and can do."""
        return await self._ask(Kind.HOST, {}, HostFacts)

    async def program(self, workload: str, subject: str, options: dict[str, Any], *, haul: bool) -> ProgramFacts:
        """What a program there needs, and what cannot be moved of it. It is stopped for some milliseconds. `haul`: its
        trees are to be sent."""
        content = {"workload": workload, "subject": subject, "options": options, "haul": haul}
        return await self._ask(Kind.PROGRAM, content, ProgramFacts)

    async def answer(self, questions: Questions) -> Answers:
        """What the host has of that."""
        return await self._ask(Kind.QUESTIONS, asdict(questions), Answers)

    async def refusals(self, direction: Direction, program: Incoming) -> list[str]:
        """What that host's policy has against a program."""
        content = {"direction": direction, "program": asdict(program)}
        found = await self._ask(Kind.POLICY, content, dict[str, list[str]])
        return found.get("refusals", [])

    async def forget(self) -> None:
        """The questions of `program` have been answered."""
        await self._ask(Kind.FORGET, {}, dict)

    async def journal(self, migration: str, role: str) -> Standing:
        """Where a migration stands there."""
        return await self._ask(Kind.JOURNAL, {"migration": migration, "role": role}, Standing)

    async def resolve(self, migration: str, role: str, answer: str, keep: str) -> Resolved:
        """Finish a migration there."""
        content = {"migration": migration, "role": role, "answer": answer, "keep": keep}
        return await self._ask(Kind.RESOLVE, content, Resolved)

    async def remove(self, made: list[shipping.Made]) -> None:
        """Take back what was sent there."""
        await self._ask(Kind.REMOVE, {"made": [asdict(one) for one in made]}, dict)

    async def ship(self, path: str, sha256: str, there: Visitor) -> shipping.Made:
        """Send a file of this host to another. PhaulError if it cannot be read here, or made there."""
        file = await self._ask(Kind.DESCRIBE, {"path": path, "sha256": sha256}, shipping.Shipped)
        await there._ask(Kind.RECEIVE, asdict(file), dict)
        offset = 0
        while offset < file.size:
            await self.link.send(_frame(Kind.READ, {"path": path, "offset": offset}))
            part = self._checked_frame(await self.link.receive(), Kind.PART)
            if not part.body:
                break
            offset += len(part.body)
            await there.link.send(Frame(Kind.PART, part.body))
            there._checked_frame(await there.link.receive(), Kind.ANSWER)
        await there.link.send(Frame(Kind.PART, b""))
        return _checked(shipping.Made, _content(there._checked_frame(await there.link.receive(), Kind.ANSWER)))

    async def start(self, role: str, migration: str) -> None:
        """Have an agent come up there while other questions are asked. It ends with the link, unless it is attached."""
        await self._ask(Kind.START, {"role": role, "migration": migration}, dict)

    async def attach(self, role: str, migration: str) -> StreamLink:
        """The link to an agent there."""
        await self.link.send(_frame(Kind.ATTACH, {"role": role, "migration": migration}))
        return self.link

    async def _ask(self, kind: Kind, content: dict[str, Any], answer: type[T]) -> T:
        await self.link.send(_frame(kind, content))
        return _checked(answer, _content(self._checked_frame(await self.link.receive(), Kind.ANSWER)))

    def _checked_frame(self, frame: Frame, wanted: Kind) -> Frame:
        if frame.type == Kind.FAILURE:
            failure = _content(frame)
            kind = of_status(int(failure.get("status", 0)))
            words = {name: str(failure.get(name, "")) for name in ("where", "advice")}
            raise kind(f"{self.name}: {failure.get('text')}", **words)
        if frame.type != wanted:
            raise ControlError(f"{self.name} answered with a frame of type {frame.type}")
        return frame


def _frame(kind: Kind, content: dict[str, Any]) -> Frame:
    return Frame(kind, json.dumps(content, separators=(",", ":")).encode())


def _content(frame: Frame) -> dict[str, Any]:
    try:
        content = jsontext.parse(frame.body)
    except ValueError as error:
        raise ControlError(f"not JSON: {frame.body[:80]!r}") from error
    if not isinstance(content, dict):
        raise ControlError(f"not an object: {frame.body[:80]!r}")
    return content


def _checked(kind: type[T], content: object) -> T:
    try:
        return from_json(kind, content)
    except ValueError as error:
        raise ControlError(f"not {kind.__name__}: {error}") from error

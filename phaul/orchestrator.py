"""`phaul migrate` from end to end: connect, ask both hosts, decide, and see the migration through.

This is the operator's process. What needs root is asked of desks (desk.py) on both hosts; the migration itself is the
two agents' work, which this process starts, connects through SSH and listens to (session.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Self

from phaul import events, policy
from phaul import resolve as resolving
from phaul.config import MovedAddress, Settings
from phaul.desk import Standing, Visitor
from phaul.errors import CancelledError, InDoubtError, LostError, PhaulError, RefusedError
from phaul.events import Finding, Result, Sink
from phaul.haul import trees
from phaul.policy import Incoming
from phaul.preflight import HostFacts, NeededFile, ProgramFacts, Wishes, compare, unshared
from phaul.session import Client, Request
from phaul.shipping import Made
from phaul.transport import hello, local, relay, ssh
from phaul.transport.control import ChannelClosed
from phaul.transport.ssh_config import Destination, SshOptions

_WORDS = 5.0  # seconds to ask the destination what went wrong there
_PATIENCE, _PAUSE = 30.0, 0.25  # seconds that a keeper gets, and between two looks at the journal
_STAYED = ("refused", "stayed", "cancelled", "error")  # outcomes after which nothing of it is there
_AGAIN = 30.0  # seconds to ask the destination through SSH when its agent does not answer
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # not SIGHUP: a terminal that is lost calls nothing off


@dataclass(frozen=True)
class Order:
    """What one command line asks for beyond the settings."""

    workload: str  # its kind, as in phaul.workloads
    subject: str  # the PID, or the name
    destination: Destination
    moved: tuple[MovedAddress, ...] = ()
    dry_run: bool = False
    keep_images: str = ""
    # asked when there are warnings; False calls it off
    confirm: Callable[[tuple[Finding, ...]], bool] = lambda _: True

    @property
    def pid(self) -> int | None:
        """The process that was named, if it was one."""
        return int(self.subject) if self.workload == "pid" else None


@dataclass
class _Hosts:
    """Both ends, connected and greeted."""

    here: Visitor
    there: Visitor
    connection: ssh.Connection
    agreement: hello.Agreement


@dataclass
class _Examined:
    """What both hosts have answered. `missing` are files to be sent before, `carried` the directories whose written
    files go with the program, `hauled` those that go as a whole, `rsync` whether both hosts have that, `subvolumes`
    those that both have on btrfs."""

    pid: int
    findings: list[Finding]
    missing: list[NeededFile] = field(default_factory=list)
    carried: tuple[str, ...] = ()
    hauled: tuple[str, ...] = ()
    rsync: bool = False
    subvolumes: tuple[str, ...] = ()


async def migrate(order: Order, settings: Settings, sink: Sink) -> Result:
    """Carry out an order. PhaulError for what ends it before there is a migration."""
    started = time.monotonic()
    migration = secrets.token_hex(6)
    with _Interrupts() as interrupts:
        async with _connected(order, settings, sink) as hosts:
            wishes = _wishes(order, settings, hosts)
            examined = await _examine(migration, order, settings, hosts, wishes)
            findings = examined.findings
            sink(events.Preflight(tuple(findings)))
            blockers = [finding for finding in findings if finding.severity == "blocker"]
            if blockers:
                more = f" (and {len(blockers) - 1} more)" if len(blockers) > 1 else ""
                return Result("refused", examined.pid, reason=f"{blockers[0]}{more}; it runs here, untouched")
            if order.dry_run:
                return Result("stayed", examined.pid, reason="dry run: nothing stands in the way")
            if findings and not order.confirm(tuple(findings)):
                raise CancelledError("called off because of warnings", where="it runs here, untouched")
            request = _request(migration, order, settings, hosts, wishes)
            request = replace(request, carried=examined.carried, hauled=examined.hauled)
            request = replace(request, rsync=examined.rsync, subvolumes=examined.subvolumes)
            async with _shipped(examined.missing, hosts, sink) as kept:
                result = await _run(request, hosts, settings, sink, interrupts)
                kept.set_result(result.outcome not in _STAYED)
    total = (time.monotonic() - started) * 1000
    return result if result.total_ms is not None else replace(result, total_ms=total)


@contextlib.asynccontextmanager
async def _connected(order: Order, settings: Settings, sink: Sink) -> AsyncIterator[_Hosts]:
    """Reach both hosts at once; what is wrong with the other one is told first."""
    ours = hello.local(relay.FEATURES)
    async with contextlib.AsyncExitStack() as stack:
        coming = asyncio.create_task(stack.enter_async_context(local.start_agent(ours)))
        try:
            connection = await stack.enter_async_context(
                ssh.connect(order.destination, SshOptions.of(settings.ssh)),
            )
            remote = await connection.start_agent(ours)
            there = Visitor(remote.link(), connection.name)
            before = time.monotonic()
            await there.forget()
            rtt = (time.monotonic() - before) * 1000
            sink(events.Connected(connection.name, remote.hello.version, remote.hello.kernel, round(rtt, 3)))
            here = Visitor(await coming, "this host")
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        yield _Hosts(here, there, connection, remote.agreement)


@contextlib.asynccontextmanager
async def _shipped(missing: list[NeededFile], hosts: _Hosts, sink: Sink) -> AsyncIterator[asyncio.Future[bool]]:
    """Send what is missing there. It is removed again unless the future says that the program needs it now, or may."""
    kept: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    made: list[Made] = []
    try:
        for file in missing:
            sink(events.Notice("info", f"sending {file.path} ({file.size:,} bytes) to {hosts.there.name}"))
            try:
                made.append(await hosts.here.ship(file.path, file.sha256, hosts.there))
            except PhaulError as error:
                advice = "make room or way for it there, or see to the file yourself and say --ship none"
                raise RefusedError(f"{file.path} cannot be sent: {error}", advice=advice) from error
        yield kept
    except InDoubtError:
        made.clear()  # it may run there
        raise
    finally:
        if made and not (kept.done() and kept.result()):
            with contextlib.suppress(PhaulError, OSError, TimeoutError):
                async with asyncio.timeout(_WORDS):
                    agent = await hosts.connection.start_agent(hello.local(relay.FEATURES))
                    await Visitor(agent.link(), hosts.there.name).remove(made)


async def _examine(migration: str, order: Order, settings: Settings, hosts: _Hosts, wishes: Wishes) -> _Examined:
    """Ask both hosts everything; nothing is touched but tokens beside files that are written. Meanwhile the agents come
    up, unless it is a dry run."""

    async def ask(host: Visitor, role: str) -> tuple[HostFacts, float]:
        if not order.dry_run:
            await host.start(role, migration)
        return await host.host(), time.monotonic()

    asking = asyncio.create_task(ask(hosts.there, "destination"))
    try:
        source, at_source = await ask(hosts.here, "source")
        options = {"shell_job": settings.migrate.shell_job}
        program = await hosts.here.program(order.workload, order.subject, options, haul=wishes.ship == "missing")
        destination, at_destination = await asking
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    answers = await hosts.there.answer(program.questions)
    await hosts.here.forget()
    same_moment = replace(destination, realtime=destination.realtime - (at_destination - at_source))
    findings = compare(program, source, same_moment, answers, wishes)
    if source.boot_id == destination.boot_id and source.hostname == destination.hostname:
        findings.insert(0, Finding("warning", "same-host", f"{hosts.there.name} seems to be this very host"))
    missing = [file for file in program.questions.needed if file.path not in answers.files]
    missing = missing if wishes.ship == "missing" else []
    hauled = trees.hauled(program.questions.trees, answers.trees) if wishes.ship == "missing" else ()
    overlays = {tree.path: tree.layers for tree in program.questions.trees if tree.path in hauled and tree.layers}
    findings += trees.too_old(overlays, hosts.there.name, able=relay.LAYERS in hosts.agreement.features)
    directories = (*hauled, *(path for known in overlays.values() for path in known.directories))
    findings += await _policies(program, wishes, missing, directories, hosts)
    if wishes.ship != "missing":
        return _Examined(program.pid, findings)
    carried = {os.path.dirname(file.path) for file in unshared(program.questions, answers)}
    rsync = bool(hauled) and all(answers.trees[path].rsync for path in hauled)
    subvolumes = trees.subvolumes(program.questions.trees, answers.trees, hauled)
    return _Examined(program.pid, findings, missing, tuple(sorted(carried)), hauled, rsync, subvolumes)


async def _policies(
    program: ProgramFacts, wishes: Wishes, missing: list[NeededFile], hauled: tuple[str, ...], hosts: _Hosts
) -> list[Finding]:
    """What either host's policy has against it (phaul.policy)."""
    asked = Incoming(
        memory=program.memory,
        tasks=program.tasks,
        uids=program.uids,
        privileged=program.privileged,
        writes=program.writes,
        moved=tuple(address for address, _ in wishes.moved),
        shipped=tuple(file.path for file in missing),
        hauled=hauled,
    )
    refusals = await asyncio.gather(hosts.here.refusals("source", asked), hosts.there.refusals("destination", asked))
    places = (f"{policy.FILE} on this host", f"{policy.FILE} on {hosts.there.name}")
    return [
        Finding("blocker", "policy", text, f"{place} says so; its administrator decides")
        for place, found in zip(places, refusals, strict=True)
        for text in found
    ]


def _wishes(order: Order, settings: Settings, hosts: _Hosts) -> Wishes:
    migrate = settings.migrate
    return Wishes(
        destination=hosts.there.name,
        pidns=migrate.pidns,
        stop_copy=migrate.stop_copy,
        tcp=migrate.tcp,
        ship=migrate.ship,
        moved=tuple((str(moved.interface.ip), moved.device) for moved in order.moved),
        channels=tuple(address for address in hosts.connection.addresses if address),
    )


def _request(migration: str, order: Order, settings: Settings, hosts: _Hosts, wishes: Wishes) -> Request:
    migrate = settings.migrate
    return Request(
        migration=migration,
        workload=order.workload,
        subject=order.subject,
        destination=str(order.destination),
        page_host=hosts.connection.addresses[1] or hosts.connection.host,
        wishes=wishes,
        max_downtime=migrate.max_downtime,
        max_rounds=migrate.max_rounds,
        bandwidth=migrate.bandwidth,
        compress=str(migrate.compress),
        streams=migrate.streams,
        tunnel=migrate.tunnel,
        auto_converge=migrate.auto_converge,
        verify=migrate.verify,
        shell_job=migrate.shell_job,
        moved=tuple(map(str, order.moved)),
        keep_images=order.keep_images,
        features=tuple(sorted(hosts.agreement.features)),
    )


async def _run(request: Request, hosts: _Hosts, settings: Settings, sink: Sink, interrupts: _Interrupts) -> Result:
    """Start both agents and listen until the result."""
    destination = await hosts.there.attach("destination", request.migration)
    source = await hosts.here.attach("source", request.migration)
    client = Client(source, destination, hosts.connection.forward)
    progress = _Progress(sink)
    running = asyncio.create_task(_result(client, request, settings, progress))
    cancelling = asyncio.create_task(_cancel(client, interrupts, progress, request.migration))
    try:
        await asyncio.wait({running, cancelling}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise _left(request.migration)
        return await _with_words_from_there(running.result(), request, hosts)
    finally:
        for task in (running, cancelling):
            task.cancel()
        await asyncio.gather(running, cancelling, return_exceptions=True)


async def _result(client: Client, request: Request, settings: Settings, progress: _Progress) -> Result:
    """What the agent here says of the end; its journal, when it is gone. In doubt, the destination is asked again."""
    try:
        result = await client.run(request, progress)
    except ChannelClosed:
        result = await _settled(request)
    return result if result.outcome != "in-doubt" else await _asked_again(result, request, settings, progress)


async def _asked_again(result: Result, request: Request, settings: Settings, sink: Sink) -> Result:
    """What `phaul resolve` finds out now, if it can: agents may be gone, but their rows, and SSH, still be there."""
    sink(events.Notice("warning", f"in doubt: {result.reason}", f"asking {request.destination} again, through SSH"))
    with contextlib.suppress(PhaulError, OSError, TimeoutError):
        try:
            async with asyncio.timeout(_AGAIN):
                await _standing(request, lambda now: not now.owned)
                verdict = await resolving.resolve(request.migration, None, settings)
        except LostError as error:
            return replace(result, outcome=error.outcome, reason=_told(error))
        why = f"{result.reason}; asked again: {verdict.text}"
        if verdict.outcome == "migrated":
            return replace(result, outcome="migrated", reason=why)
        if verdict.outcome == "stayed":
            return replace(result, outcome="stayed", reason=why)
    return result


async def _standing(request: Request, settled: Callable[[Standing], bool]) -> Standing:
    """What the journal here says, as soon as it is settled, or when patience is at its end."""
    standing = Standing()
    async with local.start_agent(hello.local(relay.FEATURES)) as link:
        desk = Visitor(link, "this host")
        for _ in range(round(_PATIENCE / _PAUSE)):
            standing = await desk.journal(request.migration, "source")
            if settled(standing):
                break
            await asyncio.sleep(_PAUSE)
    return standing


async def _settled(request: Request) -> Result:
    """The agent here is gone. Its keeper finishes what it began; the journal says how."""
    standing = await _standing(request, lambda now: now.ended or not now.state)
    ended = "the agent on this host ended unexpectedly" + _explained(standing, "this host")
    if standing.ended and standing.state == "released":
        return Result("migrated", request.pid, reason=ended)
    if not standing.state or (standing.ended and standing.state == "aborted"):
        return Result("stayed", request.pid, reason=f"{ended}; it runs on here; try again")
    doubt = InDoubtError(f"{ended}, and its row says {standing.state}", migration=request.migration)
    return Result(doubt.outcome, request.pid, reason=_told(doubt))


def _explained(standing: Standing, host: str) -> str:
    """Why an agent died, in what is left of it: the row's reason, its last line, and where the rest is."""
    parts = [f" ({standing.why})" if standing.why else ""]
    if standing.said:
        parts.append(f"; its last words: {standing.said.splitlines()[-1][-300:]!r}; all of them: {host}:{standing.log}")
    return "".join(parts)


async def _with_words_from_there(result: Result, request: Request, hosts: _Hosts) -> Result:
    """A migration that failed, with what the agent at the destination had to say of it."""
    if result.outcome not in ("stayed", "error", "in-doubt", "lost"):
        return result
    with contextlib.suppress(PhaulError, OSError, TimeoutError):
        async with asyncio.timeout(_WORDS):
            agent = await hosts.connection.start_agent(hello.local(relay.FEATURES))
            standing = await Visitor(agent.link(), hosts.there.name).journal(request.migration, "destination")
        if standing.said:
            words = _explained(replace(standing, why=""), hosts.there.name).removeprefix("; its")
            return replace(result, reason=f"{result.reason}; the agent on {hosts.there.name} left word:{words}")
    return result


class _Progress:
    """Passes events on, and knows whether the migration can still be called off."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.committed = False
        self.asked = False

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Committed):
            self.committed = True
            if self.asked:
                self._sink(events.Notice("warning", "too late: it was committed before it could be called off"))
        self._sink(event)


async def _cancel(client: Client, interrupts: _Interrupts, progress: _Progress, migration: str) -> None:
    """What interrupts do. Before the commit the first one asks the agent, and further ones say what it would cost not
    to wait for that. After it nothing can be called off: the first says so, the second leaves it to the agents, which
    ends this."""
    while True:
        await interrupts.wait()
        if progress.committed:
            break
        if not progress.asked:
            progress.asked = True
            progress(events.Notice("info", "calling it off; the program stays here"))
            await client.cancel()
        else:
            progress(
                events.Notice("warning", "still undoing: packets, sockets and tasks get back what they had", _COST)
            )
    follow = f"again to leave: the agents finish without us; phaul status {migration} tells, here and there"
    progress(events.Notice("warning", "committed: the other host takes over, nobody can call that off now", follow))
    await interrupts.wait()


_COST = (
    "it takes a moment. To kill phaul gains nothing: the agents go on undoing by themselves, and nobody tells you how "
    "it ended, nor removes what --ship has sent"
)


def _left(migration: str) -> InDoubtError:
    """The operator did not wait for the end."""
    return InDoubtError(
        "you left after the commit, before the end was known",
        migration=migration,
        where="it is on exactly one of the two hosts; the agents finish by themselves",
        advice=f"phaul status {migration} tells where, on either host; phaul resolve {migration} if nobody works on it",
    )


class _Interrupts:
    """Signals that mean "stop": before the agents run they end the command, from then on they are waited for."""

    def __init__(self) -> None:
        self._came = asyncio.Event()
        self._awaited = False
        self._task = asyncio.current_task()

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _signal(self) -> None:
        self._came.set()
        if not self._awaited and self._task:
            self._task.cancel()

    async def wait(self) -> None:
        """The next signal."""
        self._awaited = True
        await self._came.wait()
        self._came.clear()


def run(order: Order, settings: Settings, sink: Sink) -> Result:
    """`migrate` in a loop of its own."""
    try:
        return asyncio.run(migrate(order, settings, sink))
    except asyncio.CancelledError:
        return Result("cancelled", order.pid, reason="called off; it runs here, untouched")


def failed(error: PhaulError, order: Order) -> Result:
    """The result that an error is: `--json` ends with one, whatever happened."""
    return Result(error.outcome, order.pid, reason=_told(error))


def _told(error: PhaulError) -> str:
    return "; ".join(filter(None, (str(error), error.where, error.advice)))

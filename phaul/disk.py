"""Programs to images on disk and back: what `phaul dump`, `pre-dump` and `restore` do with the engine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from phaul_engine import dump as dumping
from phaul_engine import restore as restoring
from phaul_engine import sleep_log
from phaul_engine.errors import BlockedError, EngineError, GoneError
from phaul_engine.images.directory import ImageDirectory
from phaul_engine.page_store import PageStore
from phaul_engine.target import Tracer

from phaul import claims, page_link
from phaul.config import SLEEPS
from phaul.errors import PhaulError, RefusedError, UsageError
from phaul.journal import Store


@dataclass(frozen=True)
class Remote:
    """A page server that takes the pages of a dump."""

    address: page_link.Address
    credentials: page_link.Credentials | None

    @classmethod
    def of(cls, address: str | None, certificate: Path | None, key: Path | None, authority: Path | None) -> Self | None:
        """As on the command line."""
        credentials = page_link.Credentials.of(certificate, key, authority)
        if address is None:
            if credentials is not None:
                raise UsageError("--tls-cert, --tls-key and --tls-ca go with --page-server")
            return None
        return cls(page_link.Address.parse(address), credentials)


@dataclass(frozen=True)
class ServeOrder:
    """Where pages may come in, and where they go."""

    images: Path
    address: page_link.Address
    parent: Path | None
    credentials: page_link.Credentials | None
    plain: bool = False


@dataclass(frozen=True)
class DumpOrder:
    """What to store, and where. `options` are the engine's; `journals` is where this host's migrations stand: what one
    of them works on is left alone."""

    pid: int
    images: Path
    parent: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    remote: Remote | None = None
    leave_running: bool = False
    journals: Path | None = None


@dataclass(frozen=True)
class RestoreOrder:
    """What to make again. With `detach` it is left to init. `options` are the engine's."""

    images: Path
    pidfile: Path | None = None
    detach: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def engine_options(settings: Any) -> dict[str, Any]:
    """What the engine has to know of the settings."""
    return {"tcp": settings.migrate.tcp, "shell_job": bool(settings.migrate.shell_job)}


def container_options(external: list[str] | None, root: Path | None) -> dict[str, Any]:
    """What the engine has to know of a container that is seen from outside."""
    return {"external": external or [], "root": str(root) if root else ""}


def dump(order: DumpOrder) -> dumping.Dumped:
    """Store a program, and end it unless it is to run on."""

    def run(tracer: Tracer, directory: ImageDirectory, stack: contextlib.ExitStack) -> dumping.Dumped:
        store, running = _store(order, directory, stack), order.leave_running
        return dumping.dump(tracer, order.pid, directory, store, options=order.options, leave_running=running)

    return _into_directory(order, run)


def pre_dump(order: DumpOrder) -> dumping.Dumped:
    """Store the memory of a program that runs on."""

    def run(tracer: Tracer, directory: ImageDirectory, stack: contextlib.ExitStack) -> dumping.Dumped:
        store = _store(order, directory, stack)
        return dumping.pre_dump(tracer, order.pid, directory, store, options=order.options)

    return _into_directory(order, run)


def restore(order: RestoreOrder) -> int:
    """Make a program again; the exit status of the command."""

    def ready(pid: int) -> None:
        if order.pidfile is not None:
            _write_pidfile(order.pidfile, pid)

    _share_sleeps()
    try:
        with ImageDirectory(order.images) as directory, Tracer() as tracer:
            pid = restoring.restore(tracer, directory, options=order.options, ready=ready)
    except (EngineError, OSError) as error:
        raise _problem(error, "nothing of the program was started; its images are as they were") from error
    if order.detach:
        return 0
    return _wait(pid)


def serve_pages(order: ServeOrder) -> None:
    """Take the pages of one dump; the address is printed when clients may connect."""
    if (order.credentials is None) != order.plain:
        raise UsageError("give either --plain or all of --tls-cert, --tls-key and --tls-ca")

    def listening(address: page_link.Address) -> None:
        print(address, flush=True)

    try:
        with _images(order.images, order.parent) as directory:
            stored = page_link.serve(order.address, directory, order.credentials, listening=listening)
    except (EngineError, OSError) as error:
        raise _problem(error, "") from error
    print(f"{stored.pages} pages came, {stored.in_parent} are in the round before", file=sys.stderr)


def show(dumped: dumping.Dumped, what: str, as_json: bool) -> None:
    """Say what was done."""
    stored = dumped.stored
    if as_json:
        body = {"event": "result", "outcome": what, "processes": dumped.processes, "pages": stored.pages}
        print(json.dumps({**body, "pages_in_parent": stored.in_parent, "stopped_ms": round(dumped.seconds * 1000, 3)}))
        return
    same = f", {stored.in_parent} as in the round before" if stored.in_parent else ""
    print(
        f"{what} {dumped.processes} processes: {stored.pages} pages{same}; stopped for {dumped.seconds * 1000:.1f} ms",
        file=sys.stderr,
    )


def _into_directory(
    order: DumpOrder, run: Callable[[Tracer, ImageDirectory, contextlib.ExitStack], dumping.Dumped]
) -> dumping.Dumped:
    where = f"process {order.pid} runs on here, as before"
    if order.journals is not None:
        claims.refuse(Store(order.journals), order.pid)
    _share_sleeps()
    try:
        with _directory(order) as directory, Tracer() as tracer, contextlib.ExitStack() as stack:
            return run(tracer, directory, stack)
    except BlockedError as error:
        raise RefusedError(str(error), where=where) from error
    except GoneError as error:
        raise PhaulError(str(error), advice=error.advice) from error
    except (EngineError, OSError) as error:
        raise _problem(error, where) from error


def _share_sleeps() -> None:
    """Each round is a process of its own, and stops the program: the next one has to know how long it slept before."""
    with contextlib.suppress(OSError):
        SLEEPS.parent.mkdir(mode=0o700, exist_ok=True)
    sleep_log.log.remember(SLEEPS)


@contextlib.contextmanager
def _directory(order: DumpOrder) -> Iterator[ImageDirectory]:
    """The directory for the images of a dump."""
    if order.parent is not None and order.remote is not None:
        raise UsageError(
            "--parent compares with pages on this host, and --page-server keeps them elsewhere",
            advice="give --parent to the page server, or leave one of them out",
        )
    with _images(order.images, order.parent) as directory:
        yield directory


@contextlib.contextmanager
def _images(path: Path, round_before: Path | None) -> Iterator[ImageDirectory]:
    """A directory for new images, linked to the round before."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ImageDirectory(path) as directory:
        if directory.has("inventory.img"):
            raise UsageError(f"{path} holds images already", advice="give an empty or a new directory")
        if round_before is not None:
            with ImageDirectory(round_before):
                directory.set_parent(os.path.relpath(round_before.resolve(), path.resolve()))
        yield directory


def _store(order: DumpOrder, directory: ImageDirectory, stack: contextlib.ExitStack) -> PageStore:
    """Where the pages go."""
    if order.remote is None:
        return dumping.open_store(directory, stack)
    return stack.enter_context(page_link.connect(order.remote.address, order.remote.credentials))


def _write_pidfile(path: Path, pid: int) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(f"{pid}\n")
    draft.replace(path)


def _wait(pid: int) -> int:
    """The exit status of the restored program, as a shell tells it."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _problem(error: EngineError | OSError, where: str) -> PhaulError:
    return PhaulError(str(error), where=where, advice=getattr(error, "advice", ""))

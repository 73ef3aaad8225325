"""Named points at which tests have an agent fail, hang or die.

The driver passes a point before and after every work ("before work FREEZE"), every change of the row ("after row
FROZEN-COMMITTED") and every message ("before send COMMIT"). The destination passes one before whatever a kind of kernel
object does ("before kind pipe settle", "before kind credentials rebuild FINAL"). Nothing happens there unless the state
directory, which is root's alone, holds a file `fault` when the agent starts:

    ROLE POINT: ACTION        for example    source before send COMMIT: kill

It happens once, but for what kinds do before the commit, which is rehearsed, and fails every time. `error` is a failure
of what the point belongs to, `hang` stops the whole process until somebody sends SIGCONT, `kill` is kill -9. Recovery
passes no points: what a test has killed once is put right.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from phaul_engine.errors import RebuildError
from phaul_engine.objects import base

from phaul.errors import PhaulError

FILE = "fault"

Points: TypeAlias = Callable[[str], None]


class InjectedError(PhaulError):
    """A test wanted this to fail."""


def none(point: str) -> None:
    """The points of an agent that no test has to do with."""


def load(directory: Path, role: str) -> Points:
    """What the agent of a role does at its points."""
    try:
        wanted, _, action = (directory / FILE).read_text().strip().partition(": ")
    except OSError:
        return none
    acts = {"error": _fail, "hang": _hang, "kill": _kill}
    if action not in acts:
        raise PhaulError(f"{directory / FILE} asks for {action!r}", advice="only tests have such a file: remove it")

    def pass_point(point: str) -> None:
        nonlocal wanted
        if f"{role} {point}" == wanted:
            if not point.startswith("before kind ") or point.endswith(" release"):  # all before is rehearsed
                wanted = ""
            acts[action](point)

    return pass_point


def watch_kinds(points: Points) -> None:
    """Have the kinds of kernel objects of this process pass points too. Only where a test wants something of one."""
    if points is none:
        return
    for kind in base.descriptor_kinds():
        for method in base.REBUILDING:
            setattr(kind, method, _watched(getattr(kind, method), f"before kind {kind.name} {method}", points))
    for part in base.task_kinds():
        object.__setattr__(part, "rebuild", _watched_phases(part.rebuild, f"before kind {part.name} rebuild", points))


def _watched(act: Callable[..., Any], point: str, points: Points) -> Callable[..., Any]:
    def watched(*arguments: Any) -> Any:
        try:
            points(point)
        except InjectedError as error:
            raise RebuildError(str(error)) from error
        return act(*arguments)

    return watched


def _watched_phases(act: Callable[..., Any], point: str, points: Points) -> Callable[..., Any]:
    def watched(core: Any, task: Any, program: Any, phase: base.Phase, restoration: Any) -> Any:
        return _watched(act, f"{point} {phase.name}", points)(core, task, program, phase, restoration)

    return watched


def _fail(point: str) -> None:
    raise InjectedError(f"a test has this fail: {point}")


def _hang(_: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)

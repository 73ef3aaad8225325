"""What threads are asked by a program that runs inside them, and by whom."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .objects.base import Owner, Scope, TaskKind, ThreadView, task_kinds
from .program import Buf, Program
from .syscalls import NR

_PR_GET_SECCOMP = 21


class Inquiry(NamedTuple):
    """A program that asks a thread for the state of kinds, with the token of each, and for its own number, whether
    seccomp confines it, and where its heap ends."""

    program: Program
    kinds: tuple[tuple[TaskKind, Any], ...]
    tid: Buf
    seccomp: Buf
    brk: Buf


def inquire(view: ThreadView, *, varying: bool) -> Inquiry:
    """What the kinds ask of one thread: those that ask every thread alike, or those that do not."""
    program = Program()
    none = Buf(0, 0)
    kinds = [kind for kind in task_kinds() if kind.varies is varying and (view.leader or kind.scope is Scope.THREAD)]
    tokens = tuple((kind, kind.inquire(program, view)) for kind in kinds)
    if varying:
        return Inquiry(program, tokens, none, none, none)
    seccomp = program.ask(NR.prctl, _PR_GET_SECCOMP, 0, 0, 0, 0)
    return Inquiry(program, tokens, program.ask(NR.gettid), seccomp, program.ask(NR.brk, 0))


@functools.cache
def standing(leader: bool) -> Inquiry:
    """What is asked of every thread alike: assembled once, since instructions cost microseconds each."""
    nobody = Owner(0, 0, "", -1, -1, -1)
    return inquire(ThreadView(nobody, 0, 0, leader), varying=False)

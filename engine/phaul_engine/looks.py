"""Looking again at a tree that changes under our eyes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from .errors import TargetError

_LOOKS = 8  # all but the last may be spoilt
_PAUSE = 0.02  # seconds between them

T = TypeVar("T")


def look_again(look: Callable[[int, int], T], timeout_ms: int) -> T:
    """What `look` finds, given how many went before it and how long tasks get to stop, in milliseconds. The last look
    has all of `timeout_ms`, and what it raises is raised.

    A look is spoilt by a task that ended, or something else that went away; or by a task that waits for a child that we
    have stopped between vfork(2) and execve(2): that one stops, and so leaves our tracer, when the child runs.
    """
    for number in range(_LOOKS - 1):
        try:
            return look(number, max(1, timeout_ms // _LOOKS))
        except (TargetError, OSError):
            time.sleep(_PAUSE)
    return look(_LOOKS - 1, timeout_ms)

"""The native library as typed Python: errors become exceptions, nothing else is added."""

from __future__ import annotations

import errno
import os
from typing import Any

import phaul_engine._native as _native

from .errors import GoneError, TargetError

ffi: Any = _native.ffi
lib: Any = _native.lib


def new_error() -> Any:
    """A `struct ph_error` to pass as last argument."""
    return ffi.new("struct ph_error *")


def failure(err: Any) -> TargetError:
    """The exception that a filled `struct ph_error` means."""
    message = ffi.string(err.message).decode("utf-8", "replace")
    kind = GoneError if err.code in (errno.ESRCH, errno.ECHILD) else TargetError
    problem = kind(message)
    problem.errno = err.code
    return problem


def check(result: int, err: Any) -> int:
    """`result`, unless it is negative."""
    if result < 0:
        raise failure(err)
    return result


def error_text(code: int) -> str:
    """An errno value in words."""
    return f"{os.strerror(code)} ({errno.errorcode.get(code, code)})"

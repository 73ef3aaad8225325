"""Every kind of task state, in the order in which it is rebuilt: importing this module registers them."""

from __future__ import annotations

from phaul_engine.images.pb import core_pb2

from . import (
    base,
    cgroup_set,
    credentials,
    file_locks,
    landlock,
    last_words,
    limits,
    process_attributes,
    scheduling,
    seccomp,
    signals,
    thread_attributes,
    timers,
    tty,
)
from .base import Restoration

__all__ = ["fingerprint"]

_ORDER = (
    tty,
    file_locks,
    signals,
    timers,
    scheduling,
    limits,
    seccomp,  # needs privileges that
    credentials,  # may take away
    process_attributes,
    thread_attributes,
    landlock,
    cgroup_set,
)
base.arrange_task_kinds([module.__name__ for module in _ORDER])

_PASSING = ("blk_sigset", "signals_p", "interrupted", "remaining_ns", "sas")
_PASSING_OF_PROCESS = ("blk_sigset", "signals_s", "timers", "sigactions", "task_state", "stop_signo", "flags")


def fingerprint(core: core_pb2.core_entry, inner_pid: int, restoration: Restoration) -> bytes:
    """All that the instructions of Phase.CREDENTIALS for a thread of a process depend on.

    They cost microseconds each to assemble, and what they depend on hardly ever changes, so they are assembled early
    and used in the freeze if this is still the same.
    """
    stable = core_pb2.core_entry()
    stable.thread_core.CopyFrom(core.thread_core)
    stable.thread_info.clear_tid_addr = core.thread_info.clear_tid_addr
    for name in _PASSING:
        stable.thread_core.ClearField(name)
    if core.HasField("tc"):
        stable.tc.CopyFrom(core.tc)
        for name in _PASSING_OF_PROCESS:
            stable.tc.ClearField(name)
    parts = [stable.SerializePartialToString()]
    task, addresses = restoration.tasks.get(inner_pid), (core.thread_info.clear_tid_addr, core.thread_core.futex_rla)
    parts.append(bytes(task is not None and last_words.within(address, task.written) for address in addresses))
    checkpoint = restoration.checkpoint
    parts += [record.message.dumpable.to_bytes(4, "little") for record in checkpoint.records("mm", inner_pid)]
    if core.thread_core.HasField("seccomp_filter"):
        parts += [record.message.SerializeToString() for record in checkpoint.records("seccomp")]
    return b"\0".join(parts)

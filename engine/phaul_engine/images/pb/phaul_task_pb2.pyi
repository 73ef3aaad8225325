from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class phaul_thread_entry(_message.Message):
    __slots__ = ("affinity", "ioprio", "timer_slack", "sched_runtime", "sched_deadline", "sched_period", "personality", "tsc", "cpuid_faults", "io_flusher", "machine_check", "speculation", "numa_policy", "numa_nodes")
    AFFINITY_FIELD_NUMBER: _ClassVar[int]
    IOPRIO_FIELD_NUMBER: _ClassVar[int]
    TIMER_SLACK_FIELD_NUMBER: _ClassVar[int]
    SCHED_RUNTIME_FIELD_NUMBER: _ClassVar[int]
    SCHED_DEADLINE_FIELD_NUMBER: _ClassVar[int]
    SCHED_PERIOD_FIELD_NUMBER: _ClassVar[int]
    PERSONALITY_FIELD_NUMBER: _ClassVar[int]
    TSC_FIELD_NUMBER: _ClassVar[int]
    CPUID_FAULTS_FIELD_NUMBER: _ClassVar[int]
    IO_FLUSHER_FIELD_NUMBER: _ClassVar[int]
    MACHINE_CHECK_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    NUMA_POLICY_FIELD_NUMBER: _ClassVar[int]
    NUMA_NODES_FIELD_NUMBER: _ClassVar[int]
    affinity: bytes
    ioprio: int
    timer_slack: int
    sched_runtime: int
    sched_deadline: int
    sched_period: int
    personality: int
    tsc: int
    cpuid_faults: bool
    io_flusher: bool
    machine_check: int
    speculation: _containers.RepeatedScalarFieldContainer[int]
    numa_policy: int
    numa_nodes: bytes
    def __init__(self, affinity: _Optional[bytes] = ..., ioprio: _Optional[int] = ..., timer_slack: _Optional[int] = ..., sched_runtime: _Optional[int] = ..., sched_deadline: _Optional[int] = ..., sched_period: _Optional[int] = ..., personality: _Optional[int] = ..., tsc: _Optional[int] = ..., cpuid_faults: _Optional[bool] = ..., io_flusher: _Optional[bool] = ..., machine_check: _Optional[int] = ..., speculation: _Optional[_Iterable[int]] = ..., numa_policy: _Optional[int] = ..., numa_nodes: _Optional[bytes] = ...) -> None: ...

class phaul_task_entry(_message.Message):
    __slots__ = ("mdwe", "thp_disable_flags", "memory_merge", "coredump_filter", "xstate_permissions", "lock_future")
    MDWE_FIELD_NUMBER: _ClassVar[int]
    THP_DISABLE_FLAGS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MERGE_FIELD_NUMBER: _ClassVar[int]
    COREDUMP_FILTER_FIELD_NUMBER: _ClassVar[int]
    XSTATE_PERMISSIONS_FIELD_NUMBER: _ClassVar[int]
    LOCK_FUTURE_FIELD_NUMBER: _ClassVar[int]
    mdwe: int
    thp_disable_flags: int
    memory_merge: bool
    coredump_filter: int
    xstate_permissions: int
    lock_future: bool
    def __init__(self, mdwe: _Optional[int] = ..., thp_disable_flags: _Optional[int] = ..., memory_merge: _Optional[bool] = ..., coredump_filter: _Optional[int] = ..., xstate_permissions: _Optional[int] = ..., lock_future: _Optional[bool] = ...) -> None: ...

from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class phaul_number_entry(_message.Message):
    __slots__ = ("number", "below", "pid_ns")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    PID_NS_FIELD_NUMBER: _ClassVar[int]
    number: int
    below: _containers.RepeatedScalarFieldContainer[int]
    pid_ns: int
    def __init__(self, number: _Optional[int] = ..., below: _Optional[_Iterable[int]] = ..., pid_ns: _Optional[int] = ...) -> None: ...

class pstree_entry(_message.Message):
    __slots__ = ("pid", "ppid", "pgid", "sid", "threads", "phaul_numbers", "phaul_children_pid_ns")
    PID_FIELD_NUMBER: _ClassVar[int]
    PPID_FIELD_NUMBER: _ClassVar[int]
    PGID_FIELD_NUMBER: _ClassVar[int]
    SID_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    PHAUL_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    PHAUL_CHILDREN_PID_NS_FIELD_NUMBER: _ClassVar[int]
    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: _containers.RepeatedScalarFieldContainer[int]
    phaul_numbers: _containers.RepeatedCompositeFieldContainer[phaul_number_entry]
    phaul_children_pid_ns: int
    def __init__(self, pid: _Optional[int] = ..., ppid: _Optional[int] = ..., pgid: _Optional[int] = ..., sid: _Optional[int] = ..., threads: _Optional[_Iterable[int]] = ..., phaul_numbers: _Optional[_Iterable[_Union[phaul_number_entry, _Mapping]]] = ..., phaul_children_pid_ns: _Optional[int] = ...) -> None: ...

from phaul_engine.images.pb import time_pb2 as _time_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class timens_entry(_message.Message):
    __slots__ = ("monotonic", "boottime")
    MONOTONIC_FIELD_NUMBER: _ClassVar[int]
    BOOTTIME_FIELD_NUMBER: _ClassVar[int]
    monotonic: _time_pb2.timespec
    boottime: _time_pb2.timespec
    def __init__(self, monotonic: _Optional[_Union[_time_pb2.timespec, _Mapping]] = ..., boottime: _Optional[_Union[_time_pb2.timespec, _Mapping]] = ...) -> None: ...

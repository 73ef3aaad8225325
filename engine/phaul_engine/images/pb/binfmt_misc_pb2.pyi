from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class binfmt_misc_entry(_message.Message):
    __slots__ = ("name", "enabled", "interpreter", "flags", "extension", "magic", "mask", "offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    INTERPRETER_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    EXTENSION_FIELD_NUMBER: _ClassVar[int]
    MAGIC_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: bytes
    enabled: bool
    interpreter: bytes
    flags: str
    extension: bytes
    magic: bytes
    mask: bytes
    offset: int
    def __init__(self, name: _Optional[bytes] = ..., enabled: _Optional[bool] = ..., interpreter: _Optional[bytes] = ..., flags: _Optional[str] = ..., extension: _Optional[bytes] = ..., magic: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Open(_message.Message):
    __slots__ = ("migration", "fingerprint", "streams", "host")
    MIGRATION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    migration: str
    fingerprint: bytes
    streams: int
    host: str
    def __init__(self, migration: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., streams: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("fingerprint", "port")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: bytes
    port: int
    def __init__(self, fingerprint: _Optional[bytes] = ..., port: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("message", "where", "advice")
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    message: str
    where: str
    advice: str
    def __init__(self, message: _Optional[str] = ..., where: _Optional[str] = ..., advice: _Optional[str] = ...) -> None: ...

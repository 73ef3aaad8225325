"""Routes of all tables, the rules that choose a table, and next-hop objects (rtnetlink(7), ip-route(8), ip-rule(8)).

Raw images are what `ip route save` and `ip rule save` write. The local routes that the kernel makes of addresses are
left to it.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

from phaul_engine.errors import ImageError, RebuildError

from .netlink import (
    APPEND,
    CREATE,
    EXCL,
    REPLACE,
    Attribute,
    Message,
    Namespace,
    attribute,
    attribute_list,
    attributes,
    image_messages,
    pack,
    pack_messages,
)

_NEW_ROUTE, _DELETE_ROUTE, _GET_ROUTE = 24, 25, 26
_NEW_RULE, _DELETE_RULE, _GET_RULE = 32, 33, 34
_NEW_HOP, _DELETE_HOP, _GET_HOP = 104, 105, 106
_ROUTE = struct.Struct("=8BI")  # struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope,
# type, flags
_DESTINATION, _OUT, _GATEWAY, _MULTIPATH, _CACHE, _TABLE, _EXPIRES = 1, 4, 5, 9, 12, 15, 23  # RTA_*
_UNKEPT_ROUTE = {_CACHE, 24, 25}  # RTA_PAD, RTA_UID: they tell of a look-up
_HOP_OBJECT = 30  # RTA_NH_ID; the route then tells what the object is, too
_OF_OBJECT = {_OUT, _GATEWAY, _MULTIPATH, 18, 21, 22}  # RTA_VIA, RTA_ENCAP_TYPE, RTA_ENCAP
_KERNEL, _LOCAL_TABLE = 2, 255
_ONLINK, _PERVASIVE, _CLONED = 4, 2, 0x200
_MADE_TYPES = {2, 3, 4, 5}  # local, broadcast, anycast, multicast
_TICKS = 100  # USER_HZ, of rta_expires
_MAGIC_ROUTE, _MAGIC_RULE = struct.pack("<I", 0x45311224), struct.pack("<I", 0x71706986)
_HOP_HEAD = 8  # struct nhmsg
_HOP_ID, _HOP_GROUP = 1, 2
_UNKEPT_HOP = {10, 13, 14, 15, 17}  # NHA_*: master, buckets, counters
_HOP_TABLE, _HOP_TABLE_SET = 12, (1, 2, 3)  # NHA_RES_GROUP, what can be set of one
_INVERT = 0x2  # FIB_RULE_INVERT


def read_routes(namespace: Namespace, family: int) -> list[Message]:
    """All routes of a family that are not the kernel's own business, as they can be added again."""
    found = namespace.route.dump(_GET_ROUTE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
    return [Message(_NEW_ROUTE, _settable(one.body)) for one in found if one.kind == _NEW_ROUTE and not _made(one.body)]


def _made(body: bytes) -> bool:
    """Whether the kernel makes a route by itself: local ones of addresses, multicast, caches."""
    _, _, _, _, table, protocol, _, kind, flags = _ROUTE.unpack_from(body)
    number = int.from_bytes(attributes(body[_ROUTE.size :]).get(_TABLE, bytes([table])), "little")
    return bool(flags & _CLONED) or (protocol == _KERNEL and kind in _MADE_TYPES and number == _LOCAL_TABLE)


def _settable(body: bytes) -> bytes:
    *head, flags = _ROUTE.unpack_from(body)
    found: list[Attribute] = []
    told = attribute_list(body[_ROUTE.size :])
    if any(one.kind == _HOP_OBJECT for one in told):
        told = [one for one in told if one.kind not in _OF_OBJECT]
    for one in told:
        if one.kind == _CACHE:
            expires = struct.unpack_from("=8xi", one.value)[0]
            if expires > 0:
                found.append(Attribute(_EXPIRES, struct.pack("=I", max(1, expires // _TICKS))))
        elif one.kind == _MULTIPATH:
            found.append(one._replace(value=_hops(one.value)))
        elif one.kind not in _UNKEPT_ROUTE:
            found.append(one)
    return _ROUTE.pack(*head, flags & (_ONLINK | _PERVASIVE)) + pack(found)


def _hops(value: bytes) -> bytes:
    """struct rtnexthop, one behind the other, without what the kernel says of their state."""
    parts = []
    while len(value) >= 8:
        length, flags, hops, index = struct.unpack_from("=HBBi", value)
        if not 8 <= length <= len(value):
            raise ImageError("a next hop of a route does not end where it should")
        parts.append(struct.pack("=HBBi", length, flags & (_ONLINK | _PERVASIVE), hops, index) + value[8:length])
        parts[-1] += bytes(-length % 4)
        value = value[length + 3 & ~3 :]
    return b"".join(parts)


def _identity(body: bytes) -> bytes:
    """A route without how long it lives."""
    kept = pack(one for one in attribute_list(body[_ROUTE.size :]) if one.kind != _EXPIRES)
    return body[: _ROUTE.size] + kept


def fleeting(message: Message) -> bool:
    """Whether a route has a time to live."""
    return _EXPIRES in attributes(message.body[_ROUTE.size :])


def routes_image(messages: list[Message]) -> bytes:
    """The raw image."""
    return _MAGIC_ROUTE + pack_messages(messages)


def routes_from_image(data: bytes) -> list[Message]:
    """The opposite."""
    found = image_messages(data, _MAGIC_ROUTE, _NEW_ROUTE, _ROUTE.size, ("routes", "a route"))
    return [Message(_NEW_ROUTE, _settable(one.body)) for one in found if not _made(one.body)]


def apply_routes(namespace: Namespace, wanted: list[Message], family: int) -> None:
    """Have these and no others. A route whose gateway another one leads to comes after that."""
    there = {_identity(one.body): one for one in read_routes(namespace, family)}
    goal = {_identity(one.body): one for one in wanted}
    for identity, one in there.items():
        if identity not in goal:
            _gone_is_fine(namespace, _DELETE_ROUTE, one.body)
    missing = [one for identity, one in goal.items() if identity not in there]
    while missing:
        refused: list[tuple[Message, OSError]] = []
        for one in missing:
            try:
                namespace.route.request(_NEW_ROUTE, CREATE | APPEND, one.body)
            except OSError as error:
                if error.errno != errno.EEXIST:
                    refused.append((one, error))
        if len(refused) == len(missing):
            one, why = refused[0]
            raise RebuildError(f"the route to {spell(one.body)} cannot be made here: {why.strerror}") from why
        missing = [one for one, _ in refused]


def spell(body: bytes) -> str:
    """A route's destination, for people."""
    family, length, _, _, table, *_ = _ROUTE.unpack_from(body)
    told = attributes(body[_ROUTE.size :])
    table = int.from_bytes(told.get(_TABLE, bytes([table])), "little")
    where = "default"
    if _DESTINATION in told:
        try:
            where = f"{socket.inet_ntop(family, told[_DESTINATION])}/{length}"
        except (ValueError, OSError):
            where = told[_DESTINATION].hex()
    return where if table == 254 else f"{where} (table {table})"


def _gone_is_fine(namespace: Namespace, kind: int, body: bytes) -> None:
    try:
        namespace.route.request(kind, 0, body)
    except OSError as error:
        if error.errno not in (errno.ESRCH, errno.ENOENT):
            raise


# -- rules -----------------------------------------------------------------------------------------------------------


def read_rules(namespace: Namespace, family: int) -> list[Message]:
    """The rules of a family, in their order."""
    return [
        Message(_NEW_RULE, _settable_rule(one.body))
        for one in namespace.route.dump(_GET_RULE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
        if one.body[0] == family
    ]


def _settable_rule(body: bytes) -> bytes:
    *head, flags = _ROUTE.unpack_from(body)
    return _ROUTE.pack(*head, flags & _INVERT) + body[_ROUTE.size :]  # the other flags tell of devices


def rules_image(messages: list[Message]) -> bytes:
    """The raw image."""
    return _MAGIC_RULE + pack_messages(messages)


def rules_from_image(data: bytes) -> list[Message]:
    """The opposite."""
    return _rules(data, _MAGIC_RULE)


def rules_from_bytes(data: bytes) -> list[Message]:
    """Messages without the head of an image."""
    return _rules(data, b"")


def _rules(data: bytes, magic: bytes) -> list[Message]:
    found = image_messages(data, magic, _NEW_RULE, _ROUTE.size, ("rules", "a rule"))
    return [Message(_NEW_RULE, _settable_rule(one.body)) for one in found]


def apply_rules(namespace: Namespace, wanted: list[Message], family: int) -> None:
    """Have these, in this order."""
    there = read_rules(namespace, family)
    if there == wanted:
        return
    for one in there:
        _gone_is_fine(namespace, _DELETE_RULE, one.body)
    for one in wanted:
        try:
            namespace.route.request(_NEW_RULE, CREATE | EXCL, one.body)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise RebuildError(f"a routing rule cannot be made here: {error.strerror}") from error


# -- next-hop objects ------------------------------------------------------------------------------------------------


def read_hops(namespace: Namespace) -> list[Message]:
    """Next-hop objects, single ones before groups; none where the kernel has no such."""
    try:
        found = namespace.route.dump(_GET_HOP, bytes(_HOP_HEAD))
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
    messages = []
    for one in found:
        family, _, protocol, _, flags = struct.unpack_from("=BBBBI", one.body)
        head = struct.pack("=BBBBI", family, 0, protocol, 0, flags & (_ONLINK | _PERVASIVE))
        messages.append(Message(_NEW_HOP, head + pack(_hop_attributes(one.body[_HOP_HEAD:]))))
    return sorted(messages, key=lambda one: _HOP_GROUP in attributes(one.body[_HOP_HEAD:]))


def _hop_attributes(body: bytes) -> Iterator[Attribute]:
    for one in attribute_list(body):
        if one.kind == _HOP_TABLE:
            kept = pack(inner for inner in attribute_list(one.value) if inner.kind in _HOP_TABLE_SET)
            yield one._replace(value=kept)
        elif one.kind not in _UNKEPT_HOP:
            yield one


def apply_hops(namespace: Namespace, wanted: list[Message]) -> None:
    """Have these and no others."""
    there = read_hops(namespace)
    for one in reversed(there):
        if one not in wanted:
            number = attribute(_HOP_ID, attributes(one.body[_HOP_HEAD:])[_HOP_ID])
            _gone_is_fine(namespace, _DELETE_HOP, bytes(_HOP_HEAD) + number)
    for one in wanted:
        if one not in there:
            try:
                namespace.route.request(_NEW_HOP, CREATE | REPLACE, one.body)
            except OSError as error:
                raise RebuildError(f"a next hop cannot be made here: {error.strerror}") from error

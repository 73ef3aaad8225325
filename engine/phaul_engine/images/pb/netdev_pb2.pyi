from phaul_engine.images.pb import macvlan_pb2 as _macvlan_pb2
from phaul_engine.images.pb import sit_pb2 as _sit_pb2
from phaul_engine.images.pb import sysctl_pb2 as _sysctl_pb2
from phaul_engine.images.pb import tun_pb2 as _tun_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class nd_type(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOOPBACK: _ClassVar[nd_type]
    VETH: _ClassVar[nd_type]
    TUN: _ClassVar[nd_type]
    EXTLINK: _ClassVar[nd_type]
    VENET: _ClassVar[nd_type]
    BRIDGE: _ClassVar[nd_type]
    MACVLAN: _ClassVar[nd_type]
    SIT: _ClassVar[nd_type]
    NAMED: _ClassVar[nd_type]
LOOPBACK: nd_type
VETH: nd_type
TUN: nd_type
EXTLINK: nd_type
VENET: nd_type
BRIDGE: nd_type
MACVLAN: nd_type
SIT: nd_type
NAMED: nd_type

class net_device_entry(_message.Message):
    __slots__ = ("type", "ifindex", "mtu", "flags", "name", "tun", "address", "conf", "conf4", "conf6", "macvlan", "peer_ifindex", "peer_nsid", "master", "sit", "kind", "data", "port", "attributes", "other_names", "sysctls", "lower_outside", "outer_name", "outer_bridge", "outer_mtu")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    IFINDEX_FIELD_NUMBER: _ClassVar[int]
    MTU_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TUN_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CONF_FIELD_NUMBER: _ClassVar[int]
    CONF4_FIELD_NUMBER: _ClassVar[int]
    CONF6_FIELD_NUMBER: _ClassVar[int]
    MACVLAN_FIELD_NUMBER: _ClassVar[int]
    PEER_IFINDEX_FIELD_NUMBER: _ClassVar[int]
    PEER_NSID_FIELD_NUMBER: _ClassVar[int]
    MASTER_FIELD_NUMBER: _ClassVar[int]
    SIT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    OTHER_NAMES_FIELD_NUMBER: _ClassVar[int]
    SYSCTLS_FIELD_NUMBER: _ClassVar[int]
    LOWER_OUTSIDE_FIELD_NUMBER: _ClassVar[int]
    OUTER_NAME_FIELD_NUMBER: _ClassVar[int]
    OUTER_BRIDGE_FIELD_NUMBER: _ClassVar[int]
    OUTER_MTU_FIELD_NUMBER: _ClassVar[int]
    type: nd_type
    ifindex: int
    mtu: int
    flags: int
    name: bytes
    tun: _tun_pb2.tun_link_entry
    address: bytes
    conf: _containers.RepeatedScalarFieldContainer[int]
    conf4: _containers.RepeatedCompositeFieldContainer[_sysctl_pb2.sysctl_entry]
    conf6: _containers.RepeatedCompositeFieldContainer[_sysctl_pb2.sysctl_entry]
    macvlan: _macvlan_pb2.macvlan_link_entry
    peer_ifindex: int
    peer_nsid: int
    master: int
    sit: _sit_pb2.sit_entry
    kind: bytes
    data: bytes
    port: bytes
    attributes: bytes
    other_names: _containers.RepeatedScalarFieldContainer[bytes]
    sysctls: _containers.RepeatedCompositeFieldContainer[named_sysctl]
    lower_outside: bool
    outer_name: bytes
    outer_bridge: bytes
    outer_mtu: int
    def __init__(self, type: _Optional[_Union[nd_type, str]] = ..., ifindex: _Optional[int] = ..., mtu: _Optional[int] = ..., flags: _Optional[int] = ..., name: _Optional[bytes] = ..., tun: _Optional[_Union[_tun_pb2.tun_link_entry, _Mapping]] = ..., address: _Optional[bytes] = ..., conf: _Optional[_Iterable[int]] = ..., conf4: _Optional[_Iterable[_Union[_sysctl_pb2.sysctl_entry, _Mapping]]] = ..., conf6: _Optional[_Iterable[_Union[_sysctl_pb2.sysctl_entry, _Mapping]]] = ..., macvlan: _Optional[_Union[_macvlan_pb2.macvlan_link_entry, _Mapping]] = ..., peer_ifindex: _Optional[int] = ..., peer_nsid: _Optional[int] = ..., master: _Optional[int] = ..., sit: _Optional[_Union[_sit_pb2.sit_entry, _Mapping]] = ..., kind: _Optional[bytes] = ..., data: _Optional[bytes] = ..., port: _Optional[bytes] = ..., attributes: _Optional[bytes] = ..., other_names: _Optional[_Iterable[bytes]] = ..., sysctls: _Optional[_Iterable[_Union[named_sysctl, _Mapping]]] = ..., lower_outside: _Optional[bool] = ..., outer_name: _Optional[bytes] = ..., outer_bridge: _Optional[bytes] = ..., outer_mtu: _Optional[int] = ...) -> None: ...

class named_sysctl(_message.Message):
    __slots__ = ("name", "value", "usual")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    USUAL_FIELD_NUMBER: _ClassVar[int]
    name: bytes
    value: bytes
    usual: bool
    def __init__(self, name: _Optional[bytes] = ..., value: _Optional[bytes] = ..., usual: _Optional[bool] = ...) -> None: ...

class netns_id(_message.Message):
    __slots__ = ("target_ns_id", "netnsid_value")
    TARGET_NS_ID_FIELD_NUMBER: _ClassVar[int]
    NETNSID_VALUE_FIELD_NUMBER: _ClassVar[int]
    target_ns_id: int
    netnsid_value: int
    def __init__(self, target_ns_id: _Optional[int] = ..., netnsid_value: _Optional[int] = ...) -> None: ...

class netns_entry(_message.Message):
    __slots__ = ("def_conf", "all_conf", "def_conf4", "all_conf4", "def_conf6", "all_conf6", "nsids", "ext_key", "unix_conf", "ipv4_sysctl", "sysctls", "rules6", "neighbours", "nexthops", "bridge_entries", "bridge_vlans", "iptables_nft", "ipsets")
    DEF_CONF_FIELD_NUMBER: _ClassVar[int]
    ALL_CONF_FIELD_NUMBER: _ClassVar[int]
    DEF_CONF4_FIELD_NUMBER: _ClassVar[int]
    ALL_CONF4_FIELD_NUMBER: _ClassVar[int]
    DEF_CONF6_FIELD_NUMBER: _ClassVar[int]
    ALL_CONF6_FIELD_NUMBER: _ClassVar[int]
    NSIDS_FIELD_NUMBER: _ClassVar[int]
    EXT_KEY_FIELD_NUMBER: _ClassVar[int]
    UNIX_CONF_FIELD_NUMBER: _ClassVar[int]
    IPV4_SYSCTL_FIELD_NUMBER: _ClassVar[int]
    SYSCTLS_FIELD_NUMBER: _ClassVar[int]
    RULES6_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    NEXTHOPS_FIELD_NUMBER: _ClassVar[int]
    BRIDGE_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    BRIDGE_VLANS_FIELD_NUMBER: _ClassVar[int]
    IPTABLES_NFT_FIELD_NUMBER: _ClassVar[int]
    IPSETS_FIELD_NUMBER: _ClassVar[int]
    def_conf: _containers.RepeatedScalarFieldContainer[int]
    all_conf: _containers.RepeatedScalarFieldContainer[int]
    def_conf4: _containers.RepeatedCompositeFieldContainer[_sysctl_pb2.sysctl_entry]
    all_conf4: _containers.RepeatedCompositeFieldContainer[_sysctl_pb2.sysctl_entry]
    def_conf6: _containers.RepeatedCompositeFieldContainer[_sysctl_pb2.sysctl_entry]
    all_conf6: _containers.RepeatedCompositeFieldContainer[_sysctl_pb2.sysctl_entry]
    nsids: _containers.RepeatedCompositeFieldContainer[netns_id]
    ext_key: str
    unix_conf: _containers.RepeatedCompositeFieldContainer[_sysctl_pb2.sysctl_entry]
    ipv4_sysctl: _containers.RepeatedCompositeFieldContainer[_sysctl_pb2.sysctl_entry]
    sysctls: _containers.RepeatedCompositeFieldContainer[named_sysctl]
    rules6: bytes
    neighbours: bytes
    nexthops: bytes
    bridge_entries: bytes
    bridge_vlans: bytes
    iptables_nft: _containers.RepeatedScalarFieldContainer[bytes]
    ipsets: bytes
    def __init__(self, def_conf: _Optional[_Iterable[int]] = ..., all_conf: _Optional[_Iterable[int]] = ..., def_conf4: _Optional[_Iterable[_Union[_sysctl_pb2.sysctl_entry, _Mapping]]] = ..., all_conf4: _Optional[_Iterable[_Union[_sysctl_pb2.sysctl_entry, _Mapping]]] = ..., def_conf6: _Optional[_Iterable[_Union[_sysctl_pb2.sysctl_entry, _Mapping]]] = ..., all_conf6: _Optional[_Iterable[_Union[_sysctl_pb2.sysctl_entry, _Mapping]]] = ..., nsids: _Optional[_Iterable[_Union[netns_id, _Mapping]]] = ..., ext_key: _Optional[str] = ..., unix_conf: _Optional[_Iterable[_Union[_sysctl_pb2.sysctl_entry, _Mapping]]] = ..., ipv4_sysctl: _Optional[_Iterable[_Union[_sysctl_pb2.sysctl_entry, _Mapping]]] = ..., sysctls: _Optional[_Iterable[_Union[named_sysctl, _Mapping]]] = ..., rules6: _Optional[bytes] = ..., neighbours: _Optional[bytes] = ..., nexthops: _Optional[bytes] = ..., bridge_entries: _Optional[bytes] = ..., bridge_vlans: _Optional[bytes] = ..., iptables_nft: _Optional[_Iterable[bytes]] = ..., ipsets: _Optional[bytes] = ...) -> None: ...

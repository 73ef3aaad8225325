"""Settings: defaults < /etc/phaul/phaul.toml < ~/.config/phaul/phaul.toml < PHAUL_* variables < flags.

`configs/phaul.toml` is the reference of all keys. A variable is named after section and key: `[migrate] max_downtime`
is PHAUL_MIGRATE_MAX_DOWNTIME. An unknown key, section or variable is an error: a misspelt limit must not go unnoticed.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

SYSTEM_FILE = Path("/etc/phaul/phaul.toml")
SLEEPS = Path("/run/phaul/sleeps")  # when threads that have been stopped will have slept enough (engine: sleep_log)
PREFIX = "PHAUL_"

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_MULTIPLES = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_NUMBER = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(_NUMBER + r"\s*(us|ms|s|m|h)?")
_SIZE = re.compile(_NUMBER + r"\s*([kKMGT]i?)?B?")
_RATE = re.compile(_NUMBER + r"\s*([kKMGT]i?)?(b|B|bit)?(?:/s|ps)?")


class ConfigError(ValueError):
    """A setting does not make sense; the text says which, where it was found, and what would."""


def parse_duration(text: str | float, unit: str = "s") -> float:
    """A duration in seconds from `250ms`, `1.5s`, `2m`; a bare number counts in `unit`."""
    match = _DURATION.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write a number with us, ms, s, m or h, such as 250ms")
    return float(match[1]) * _SECONDS[match[2] or unit]


def parse_rate(text: str | float) -> int:
    """Bytes a second from `100M` (10^8 bytes), `100MiB` (2^20 x 100 bytes), `1Gbit` (125,000,000 bytes).

    Bytes unless it says bit. 0 means no limit. `Mb` is refused: people read it both ways.
    """
    match = _RATE.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"{text!r} is not a rate: write bytes a second such as 100M, 50MiB, or bits such as 1Gbit")
    number, multiple, unit = match[1], (match[2] or "").replace("k", "K"), match[3]
    if unit == "b":
        raise ValueError(f"{text!r} could be bits or bytes: write {number}{multiple}bit or {number}{multiple}B")
    value = float(number) * _MULTIPLES[multiple]
    rate = int(value / 8 if unit == "bit" else value)
    if value and rate < 1000:
        raise ValueError(f"{text!r} is less than 1000 bytes a second")
    return rate


def parse_size(text: str | int) -> int:
    """Bytes from `8GiB` (2^33), `500M` (5 x 10^8 bytes), or a bare number."""
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size: write bytes such as 500M or 8GiB")
    return int(float(match[1]) * _MULTIPLES[(match[2] or "").replace("k", "K")])


@dataclass(frozen=True)
class Compression:
    """What the page stream may do to a chunk. `auto` decides by measured benefit; level 0 is the codec's choice."""

    codec: Literal["auto", "none", "zstd"] = "auto"
    level: int = 0

    def __str__(self) -> str:
        return f"{self.codec}:{self.level}" if self.level else self.codec


def parse_compression(text: str | Compression) -> Compression:
    """`auto`, `none`, `zstd` or `zstd:LEVEL` with a level from -7 to 19 (zstd(1))."""
    if isinstance(text, Compression):
        return text
    codec, separator, level = str(text).partition(":")
    if codec in ("auto", "none") and not separator:
        return Compression("auto" if codec == "auto" else "none")
    if codec == "zstd":
        if not separator:
            return Compression("zstd")
        if re.fullmatch(r"-?\d{1,2}", level) and -7 <= int(level) <= 19 and int(level):
            return Compression("zstd", int(level))
        raise ValueError(f"{text!r}: a zstd level is -7 to -1 or 1 to 19")
    raise ValueError(f"{text!r} is not a compression: write auto, none, zstd or zstd:LEVEL")


@dataclass(frozen=True)
class MovedAddress:
    """An address that goes with the program: off here, on and announced there, on device `device` there."""

    interface: ipaddress.IPv4Interface | ipaddress.IPv6Interface
    device: str

    def __str__(self) -> str:
        return f"{self.interface.with_prefixlen}@{self.device}"


def parse_moved_address(text: str) -> MovedAddress:
    """`ADDR/PREFIX@DEV`, as `192.0.2.7/24@eth0` or `2001:db8::7/64@eth0`."""
    address, _, device = text.rpartition("@")
    if "/" not in address or not device:
        raise ValueError(f"{text!r} is not ADDR/PREFIX@DEV, such as 192.0.2.7/24@eth0")
    # 15 bytes and no '/' or white space: dev_valid_name() of the kernel's net/core/dev.c
    if len(device.encode()) > 15 or device in (".", "..") or re.search(r"[/:\s]", device):
        raise ValueError(f"{device!r} cannot be the name of a network device")
    try:
        interface = ipaddress.ip_interface(address)
    except ValueError as error:
        raise ValueError(f"{address!r} is not an address with its prefix length: {error}") from error
    if interface.ip.is_loopback or interface.ip.is_multicast or interface.ip.is_unspecified:
        raise ValueError(f"{interface.ip} cannot move between hosts")
    return MovedAddress(interface, device)


def _milliseconds(value: str | float) -> float:
    return parse_duration(value, "ms") * 1000


Seconds = Annotated[float, BeforeValidator(parse_duration)]
Milliseconds = Annotated[float, BeforeValidator(_milliseconds)]
Rate = Annotated[int, BeforeValidator(parse_rate)]
Codec = Annotated[Compression, BeforeValidator(parse_compression)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=True)


class MigrateSettings(_Section):
    """[migrate]: the flags of `phaul migrate` that make sense for every migration."""

    max_downtime: Milliseconds = Field(default=100.0, gt=0)
    max_rounds: int = Field(default=30, ge=1, le=1000)
    bandwidth: Rate = 0
    compress: Codec = Compression()
    streams: int = Field(default=0, ge=0, le=64)
    tunnel: bool = False
    tcp: Literal["established", "close", "refuse"] = "established"
    ship: Literal["missing", "none"] = "none"
    stop_copy: bool = False
    auto_converge: bool = False
    verify: bool = False
    pidns: bool = False
    shell_job: bool = False


class SshSettings(_Section):
    """[ssh]: how the other host is reached, and phaul found there."""

    identity: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    config: str = ""
    connect_timeout: Seconds = Field(default=15.0, gt=0)
    keepalive: Seconds = Field(default=5.0, gt=0)
    remote_command: str = Field(default="phaul", min_length=1)

    @field_validator("identity", "options", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class AgentSettings(_Section):
    """[agent]: where agents keep what they need."""

    run_directory: Path = Path("/run/phaul")
    state_directory: Path = Path("/var/lib/phaul")

    @field_validator("run_directory", "state_directory")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if not value.is_absolute():
            raise ValueError(f"{value} is not an absolute path")
        return value


class ArbiterSettings(_Section):
    """[arbiter]: an etcd that both hosts reach. Read by the agents, which are root, on both hosts."""

    endpoints: tuple[str, ...] = ()
    ca: str = ""
    certificate: str = ""
    key: str = ""
    prefix: str = "phaul/"
    timeout: Seconds = Field(default=2.0, gt=0, le=10)
    required: bool = True

    @field_validator("endpoints")
    @classmethod
    def _urls(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for endpoint in endpoints:
            url = urlsplit(endpoint)
            if url.scheme not in ("https", "http") or not url.hostname or url.path not in ("", "/") or url.query:
                raise ValueError(f"{endpoint!r} is not the URL of an etcd, such as https://etcd1.example:2379")
            if url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
                raise ValueError(f"{endpoint!r} is neither encrypted nor on this host: write https://")
        return endpoints


class LogSettings(_Section):
    """[log]: what goes to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "warning"
    format: Literal["auto", "text", "json", "journal"] = "auto"


class Settings(_Section):
    """All settings, merged and checked."""

    migrate: MigrateSettings = MigrateSettings()
    ssh: SshSettings = SshSettings()
    agent: AgentSettings = AgentSettings()
    arbiter: ArbiterSettings = ArbiterSettings()
    log: LogSettings = LogSettings()


def user_file() -> Path:
    """The user's own settings (XDG base directory specification)."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "phaul" / "phaul.toml"


def load(flags: Mapping[str, Mapping[str, Any]] | None = None, *, files: Iterable[Path] | None = None) -> Settings:
    """Read and merge all sources. `flags` is {section: {key: value}}; a value None was not given.

    Raises ConfigError with one line a mistake, each naming the place it was found in.
    """
    paths = list(files) if files is not None else [SYSTEM_FILE, user_file()]
    contents = {str(path): _read(path) for path in paths if path.exists()}
    given = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in (flags or {}).items()
    }
    merged: dict[str, Any] = {}
    for source in (*contents.values(), _variables(os.environ), given):
        for section, values in source.items():
            known = merged.get(section)
            if isinstance(known, dict) and isinstance(values, Mapping):
                values = {**known, **values}
            merged[section] = values
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        lines = [_explain(tuple(map(str, item["loc"])), item["msg"], given, contents) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def variables() -> frozenset[str]:
    """The names of all variables that settings can come from."""
    return frozenset(
        f"{PREFIX}{section}_{key}".upper()
        for section, field in Settings.model_fields.items()
        for key in _keys_of(field.annotation)
    )


def _keys_of(section: Any) -> Iterable[str]:
    return section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else ()


def _variables(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What variables say. One of a section of ours that names no key is an error: who set it wants to hear of it.

    A value that begins like a list in JSON is one.
    """
    found: dict[str, dict[str, Any]] = {}
    known = variables()
    for name, text in environ.items():
        section, _, key = name.removeprefix(PREFIX).lower().partition("_")
        if not name.startswith(PREFIX) or section not in Settings.model_fields:
            continue
        if name not in known:
            raise ConfigError(f"the environment: there is no setting {name}; configs/phaul.toml lists them all")
        try:
            found.setdefault(section, {})[key] = json.loads(text) if text.startswith("[") else text
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
    return found


def _explain(
    loc: tuple[str, ...], message: str, flags: Mapping[str, Mapping[str, Any]], contents: Mapping[str, dict[str, Any]]
) -> str:
    """One mistake for a person: where, which key, what is wrong."""
    section, key = loc[0], loc[1] if len(loc) > 1 else ""
    text = message.removeprefix("Value error, ")
    if message == "Extra inputs are not permitted":
        text = "there is no such setting; configs/phaul.toml lists them all"
    if key in flags.get(section, {}):
        return f"--{key.replace('_', '-')}: {text}"
    variable = f"{PREFIX}{section}_{key}".upper()
    if variable in os.environ:
        return f"{variable}: {text}"
    origin = next(
        (name for name, content in reversed(list(contents.items())) if _holds(content, section, key)), "settings"
    )
    return f"{origin}: [{section}] {key}: {text}" if key else f"{origin}: {section}: {text}"


def _holds(content: dict[str, Any], section: str, key: str) -> bool:
    part = content.get(section)
    return part is not None and (not key or not isinstance(part, dict) or key in part)

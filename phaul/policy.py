"""What this host's agent does for whom: /etc/phaul/agent.toml, which configs/agent.toml explains.

The file is read by the agent of the host that it protects, each time one is started, and asked by nobody else: what the
other side says about itself counts for nothing. It is asked at preflight, where a refusal touches nothing, and again
where something is done. Without the file whoever can become root here may do everything, as with any other command;
with it, only what it allows. One that cannot be trusted refuses everything.
"""

from __future__ import annotations

import functools
import grp
import ipaddress
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from phaul_engine.paths import beneath
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from phaul.config import parse_size
from phaul.errors import RefusedError

if TYPE_CHECKING:
    from phaul_engine.footprint import Footprint
    from phaul_engine.objects.confinement import Confinement

FILE = Path("/etc/phaul/agent.toml")
CALLER = "PHAUL_CALLER"
"""The variable that tells an agent who asked for it. The relay sets it; what came from outside is replaced."""

Direction: TypeAlias = Literal["source", "destination"]
Workload: TypeAlias = Literal["pid", "lxc", "oci", "podman", "vz", "unit"]
Size = Annotated[int, BeforeValidator(parse_size)]

_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OWNER = 0  # of the file and its directory
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class PolicyError(RefusedError):
    """The policy forbids what was asked, or cannot be trusted."""


@dataclass(frozen=True)
class Caller:
    """Who asks: a user of this host, as SSH or sudo let it in, or a key that may do nothing else (`key:NAME`)."""

    name: str
    uid: int
    groups: frozenset[str] = frozenset()

    @classmethod
    def of(cls, name: str) -> Self:
        """A caller by name. PolicyError if this host knows no such user."""
        if name.startswith("key:"):
            return cls(name, os.geteuid())
        if name.startswith("uid:") and name[4:].isdecimal():
            return cls(name, int(name[4:]))
        try:
            found = pwd.getpwnam(name)
        except KeyError as error:
            raise PolicyError(f"{os.uname().nodename} has no user {name!r}") from error
        groups = {group.gr_name for group in grp.getgrall() if name in group.gr_mem}
        try:
            groups.add(grp.getgrgid(found.pw_gid).gr_name)
        except KeyError:
            pass
        return cls(name, found.pw_uid, frozenset(groups))


def caller(key: str | None = None) -> Caller:
    """Whoever this process works for. `key` is what a forced command calls its key: only a root that logged in may be
    called so, since anybody else would choose the name."""
    sudo = os.environ.get("SUDO_UID", "")
    if key is not None:
        if not _KEY_NAME.fullmatch(key):
            raise PolicyError(f"{key!r} is no name for a key: letters, digits, dots, dashes")
        if sudo or _parent_is_sudo():
            raise PolicyError("--key names keys of root's own authorized_keys; through sudo the user's name counts")
        return Caller(f"key:{key}", os.geteuid())
    uid = int(sudo) if sudo.isdecimal() else os.geteuid()
    try:
        return Caller.of(pwd.getpwuid(uid).pw_name)
    except KeyError:  # a user that this host has no name for is somebody, too
        return Caller.of(f"uid:{uid}")


def _parent_is_sudo() -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{os.getppid()}/exe")) == "sudo"
    except OSError:
        return False


class Rule(BaseModel):
    """One `[[allow]]` table."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    users: tuple[str, ...] = Field(min_length=1)
    directions: tuple[Direction, ...] = ("source", "destination")
    workloads: tuple[Workload, ...] = ("pid", "lxc", "oci", "podman", "vz", "unit")
    accounts: tuple[str, ...] = ("*",)
    root: bool = False
    memory: Size = 0
    tasks: int = Field(default=0, ge=0)
    paths: tuple[str, ...] = ("/tmp", "/var/tmp", "/dev/shm")
    addresses: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()

    @field_validator("paths")
    @classmethod
    def _absolute(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not path.startswith("/") or ".." in path.split("/"):
                raise ValueError(f"{path!r} is no absolute path of a directory")
        return paths

    def applies(self, who: Caller) -> bool:
        """Whether it is about this caller."""
        return any(user in ("*", who.name) or (user.startswith("@") and user[1:] in who.groups) for user in self.users)


ANYTHING = Rule(
    users=("*",),
    root=True,
    paths=("/",),
    addresses=(ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0")),
)
"""What holds where there is no policy file."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    allow: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Incoming:
    """What a program is, as far as the policy has something to say: at preflight as told, later as it comes."""

    workload: str = "pid"
    memory: int = 0
    tasks: int = 0
    uids: tuple[int, ...] = ()
    privileged: str = ""
    writes: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()  # addresses, without their prefix
    shipped: tuple[str, ...] = ()  # files that would be sent
    hauled: tuple[str, ...] = ()  # directories that would be sent, with whatever is in them

    @classmethod
    def of(cls, found: Footprint, **more: Any) -> Self:
        """From images."""
        return cls(tasks=found.tasks, uids=found.uids, privileged=found.privileged, writes=found.writes, **more)


@dataclass(frozen=True)
class Gate:
    """The rule that a caller stands under. With `problem`, none: everything is refused for that reason."""

    who: str
    rule: Rule = ANYTHING
    uid: int = 0
    problem: str = ""
    strict: bool = False
    """Whether there is a policy file."""

    def owns(self, name: str) -> bool:
        """Whether a migration that `name` asked for is this caller's to decide about. Nobody's is root's."""
        return name == self.who or not name or (self.uid == 0 and not self.who.startswith("key:"))

    def check(self, direction: Direction) -> None:
        """Whether anything may be asked that belongs to this direction. PolicyError if not."""
        if self.problem:
            raise PolicyError(self.problem, advice=f"the administrator of {_here()} decides that: {FILE}")
        if direction not in self.rule.directions:
            verb = {"source": "send programs from", "destination": "bring programs to"}[direction]
            raise PolicyError(
                f"{self.who} may not {verb} {_here()}",
                advice=f'its {FILE} says so: directions = ["{direction}"] in the rule for {self.who} would allow it',
            )

    def refusals(self, direction: Direction, program: Incoming) -> list[str]:
        """Everything that the policy has against a program, in words; empty if it may."""
        try:
            self.check(direction)
        except PolicyError as error:
            return [str(error)]
        found = [*self._kind(program)]
        if direction == "destination":
            found += [*self._size(program), *self._files(program), *self._addresses(program)]
        return found

    def demand(self, direction: Direction, program: Incoming) -> None:
        """PolicyError if the policy has something against it."""
        found = self.refusals(direction, program)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise PolicyError(f"{found[0]}{more}", advice=f"see {FILE} on {_here()}")

    def demand_shipped(self, path: str, mode: int) -> None:
        """Before a file is made that the source sends. PolicyError if it may not be."""
        self.check("destination")
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if "/" not in self.rule.paths and not any(beneath(real, one) for one in self.rule.paths):
            raise PolicyError(f"{self.who} may not send {path}: {_here()} takes files in {_list(self.rule.paths)}")
        if mode & (stat.S_ISUID | stat.S_ISGID) and not self.rule.root:
            raise PolicyError(f"{self.who} may not send {path}: it would run as somebody else (mode {mode:o})")

    @property
    def confinement(self) -> Confinement | None:
        """For the engine; None where nothing is confined."""
        if self.rule.root and "/" in self.rule.paths:
            return None
        from phaul_engine.objects.confinement import Confinement

        return Confinement(self.rule.paths, privileged=self.rule.root or _in_user_namespace())

    def _kind(self, program: Incoming) -> Iterator[str]:
        if program.workload not in self.rule.workloads:
            yield f"{self.who} may not move a workload of kind {program.workload} on {_here()}"
        if program.privileged and not self.rule.root and not _in_user_namespace():
            yield f"{program.privileged}, and {_here()} takes no such program from {self.who} (root = false)"
        strangers = [uid for uid in program.uids if not self._is_account(uid)]
        if strangers:
            names = ", ".join(map(_name, strangers))
            yield f"the program runs as {names}, and {self.who} may move programs of {_list(self.rule.accounts)} only"

    def _is_account(self, uid: int) -> bool:
        names = {"*", str(uid), _name(uid)} | ({"self"} if uid == self.uid else set())
        return not names.isdisjoint(self.rule.accounts)

    def _size(self, program: Incoming) -> Iterator[str]:
        if self.rule.memory and program.memory > self.rule.memory:
            wanted, limit = (f"{size / 2**20:,.0f} MiB" for size in (program.memory, self.rule.memory))
            yield f"the program has {wanted} of memory, and {_here()} lets {self.who} bring {limit}"
        if self.rule.tasks and program.tasks > self.rule.tasks:
            yield (
                f"the program has {program.tasks} processes and threads, and {_here()} lets {self.who} bring "
                f"{self.rule.tasks}"
            )

    def _files(self, program: Incoming) -> Iterator[str]:
        if program.hauled and not self.rule.root:
            text = f"{program.hauled[0]} would be sent, and what is in it decides what {_here()} runs as root"
            yield f"{text} (root = false)"
        for path in (*program.writes, *program.shipped, *program.hauled):
            if "/" not in self.rule.paths and not any(beneath(path, one) for one in self.rule.paths):
                yield f"the program would write or make {path}, and {_here()} lets it do so in {_list(self.rule.paths)}"

    def _addresses(self, program: Incoming) -> Iterator[str]:
        for text in program.moved:
            address = ipaddress.ip_address(text)
            if not any(address in network for network in self.rule.addresses if network.version == address.version):
                known = _list(map(str, self.rule.addresses))
                yield f"{self.who} may not bring the address {text} to {_here()} (allowed: {known})"


def _in_user_namespace() -> bool:
    """Whether root here is only this user namespace's (user_namespaces(7))."""
    try:
        return Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    except OSError:
        return False


def _here() -> str:
    return os.uname().nodename


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def gate(who: Caller, file: Path = FILE) -> Gate:
    """What holds for a caller. Never fails: what is wrong with the file is the gate's problem."""
    try:
        rules = _load(file)
    except PolicyError as error:
        return Gate(who.name, uid=who.uid, problem=str(error), strict=True)
    if rules is None:
        return Gate(who.name, uid=who.uid)
    for rule in rules:
        if rule.applies(who):
            return Gate(who.name, rule, who.uid, strict=True)
    return Gate(who.name, uid=who.uid, problem=f"{who.name} may ask {_here()} for nothing: {file}", strict=True)


@functools.cache
def of_agent() -> Gate:
    """In an agent: what holds for whoever had it started. Once a process: a migration ends under the rule that it began
    under."""
    name = os.environ.get(CALLER)
    try:
        return gate(caller() if name is None else Caller.of(name))
    except PolicyError as error:
        return Gate(name or "?", problem=str(error), strict=True)


def _load(file: Path) -> tuple[Rule, ...] | None:
    """The rules, None without a file. PolicyError where they are not root's alone to change, or make no sense."""
    try:
        text = _read(file)
        return None if text is None else _File.model_validate(tomllib.loads(text)).allow
    except OSError as error:
        raise _broken(file, str(error.strerror)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _broken(file, str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "there is no such key; configs/agent.toml lists them all"
        raise _broken(file, f"{where}: {message}") from error


def _read(file: Path) -> str | None:
    """The text of a file that only root can have written; None if there is none."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        for status, name in ((os.stat(file.parent), str(file.parent)), (os.fstat(fd), str(file))):
            if status.st_uid != _OWNER:
                raise _broken(file, f"{name} belongs to {_name(status.st_uid)}, not to root")
            if status.st_mode & _OTHERS:
                raise _broken(file, f"{name} can be written by others than root (mode {status.st_mode & 0o7777:o})")
        with open(fd, "rb", closefd=False) as opened:
            return opened.read().decode()
    finally:
        os.close(fd)


def _broken(file: Path, why: str) -> PolicyError:
    return PolicyError(f"{_here()} refuses everything until its {file} is put right: {why}")

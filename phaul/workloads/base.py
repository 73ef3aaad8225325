"""What a kind of workload offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from phaul.errors import PhaulError
from phaul.events import Finding
from phaul.haul.places import NOWHERE, Places

if TYPE_CHECKING:
    from phaul_engine.target import Tracer


@dataclass(frozen=True)
class Found:
    """A workload of this host. `pid` is its first process, `words` what people call it. `facts` (JSON) are what the
    destination has to know; `findings` what speaks against moving it, so far as its runtime is concerned. `trees` are
    the directories that it lives on, none in another: they are on storage that both hosts see, or are sent. `options`
    are what the engine has to know on both sides. Trees in `rooms` are file systems that the runtime has mounted for it
    alone, and will have mounted at the destination, wherever (`Workload.rooms`)."""

    pid: int
    words: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    trees: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    rooms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """What a runtime has made ready at the destination: the cgroup where the tree is to live, empty for the agent's
    own, and what the engine has to know (options of a `Restoration`)."""

    cgroup: str = ""
    options: dict[str, Any] = field(default_factory=dict)


Note: TypeAlias = Callable[[dict[str, Any]], object]
"""Writes notes (JSON) into the journal, in place of those before: for `take_over` and `withdraw`, whoever does them."""


def refuse(findings: Iterable[Finding]) -> None:
    """PhaulError for the first blocker."""
    for finding in findings:
        if finding.severity == "blocker":
            raise PhaulError(finding.text, advice=finding.advice)


class Workload(ABC):
    """A kind of workload. What comes from the other host is checked like anything that does."""

    kind: ClassVar[str]
    supervised: ClassVar[bool] = False  # whether who sees it end is the runtime, which knows what to do

    @abstractmethod
    def find(self, name: str) -> Found:
        """The workload of that name, running on this host. UsageError if there is none."""

    def examine(self, facts: dict[str, Any], hauled: Collection[str] = ()) -> list[Finding]:
        """At the destination, before anything is touched: what keeps this host from taking it over. Of its trees,
        those in `hauled` will come, and are not there yet."""
        return []

    def rooms(self, facts: dict[str, Any], note: Note) -> dict[str, str]:
        """At the destination, before trees come: where those go that were in rooms of the runtime, by where they were.
        Note it before it is done; `withdraw` undoes it. PhaulError if that fails."""
        return {}

    def prepare(self, facts: dict[str, Any], note: Note, tracer: Tracer, places: Places = NOWHERE) -> Place:
        """At the destination: make ready what it will live in, and note it before it is done. `tracer` is what the tree
        will be traced by. EngineError or PhaulError if that fails. Trees that have come are under other names until the
        commit: `places.now` says where a path is, and a command of the runtime is to be run as `places.command` says,
        which has it see them under their final names."""
        return Place()

    def take_over(self, notes: dict[str, Any], root: int, pids: Iterable[int]) -> None:
        """At the destination, when it runs: it is the runtime's own. Doing it twice does no harm."""

    def withdraw(self, notes: dict[str, Any]) -> None:
        """At the destination, when the copy is dead: undo `prepare`. Doing it twice does no harm."""

    def hold(self, facts: dict[str, Any]) -> None:
        """At the source, before it is frozen: whatever happens to it, the runtime starts no other one in its place, and
        ends none, until `give_up` or `let_go`. PhaulError if that fails."""

    def let_go(self, facts: dict[str, Any]) -> None:
        """At the source, when it stays: undo `hold`. Doing it twice, or where nothing was held, does no
        harm."""

    def give_up(self, facts: dict[str, Any]) -> None:
        """At the source, when the copy here is dead: the runtime forgets it. Doing it twice does no harm."""

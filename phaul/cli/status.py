"""`phaul status`: where the migrations of this host stand, from their journals."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phaul.cli import options
from phaul.errors import PhaulError

if TYPE_CHECKING:
    from phaul.journal import Row

app = typer.Typer(add_completion=False)

Migration = Annotated[str | None, typer.Argument(metavar="[ID]", help="A migration, as `phaul migrate` named it.")]
All = Annotated[bool, typer.Option("--all", help="Also those that are over.")]


@app.command()
def status(migration: Migration = None, everything: All = False, as_json: options.Json = False) -> None:
    """Tell where the migrations of this host stand.

    Without an ID: those that are not over. Reads journals only, and decides nothing: `phaul resolve` does.
    """
    rows = _rows(options.settings(), migration)
    if migration is None and not everything:
        rows = [row for row in rows if not row.ended]
    if migration is not None and not rows:
        raise PhaulError(f"there is no migration {migration!r} on this host", advice="phaul status --all lists them")
    for row in rows:
        if as_json:
            print(json.dumps({"event": "migration", **row.model_dump(mode="json"), "owned": row.owned}))
        else:
            print("\n".join(_lines(row)))
    if not rows and not as_json:
        print("no migration is going on" if not everything else "this host has seen no migration")


def _rows(settings: Any, migration: str | None) -> list[Row]:
    from phaul.journal import Store

    store = Store(settings.agent.state_directory)
    found = []
    for name, role in store.names():
        if migration is None or name == migration:
            journal = store.open(name, role)
            if journal is not None:
                with journal:
                    found.append(journal.row)
    return found


_MEANING = {
    ("source", "prepared"): "runs here, and is being copied to {peer}",
    ("source", "frozen"): "is frozen here for the switchover to {peer}",
    ("source", "committed"): "is frozen here, and does not run here; {peer} decides whether it runs there",
    ("source", "aborted"): "runs here; it did not move to {peer}",
    ("source", "released"): "runs on {peer}",
    ("destination", "prepared"): "runs on {peer}, and is being copied here",
    ("destination", "parked"): "is complete here, but frozen, and waits for the commit from {peer}",
    ("destination", "resumed"): "runs here; {peer} has not said yet that its copy is gone",
    ("destination", "discarded"): "did not come here; ask {peer}",
    ("destination", "released"): "runs here; it came from {peer}",
}
"""What a state says of the program, for somebody who has just been woken."""

_AFTER_BOOT = {
    ("source", "prepared"): "ran here when this host went down, and ended with it",
    ("source", "frozen"): "was frozen here when this host went down, and ended with it, unless {peer} has it",
    ("source", "committed"): "was frozen here when this host went down; {peer} says whether it runs there",
    ("destination", "prepared"): "was being copied here when this host went down; ask {peer}",
    ("destination", "parked"): "was complete here when this host went down; it may have run; ask {peer}",
    ("destination", "resumed"): "ran here when this host went down, and ended with it; {peer} has the copy from before",
}
"""The same, where this host has been booted since."""


def _lines(row: Row) -> list[str]:
    """A row for a person. What it means, not only what it says: who acts on it, and what to do if nobody does."""
    age = _age(time.time() - row.since) if row.since else "?"
    state = (row.role.value, row.state.value)
    meanings = _MEANING if row.same_boot or row.ended else _MEANING | _AFTER_BOOT
    meaning = meanings[state].format(peer=row.peer or "the other host")
    over = "" if not row.ended else ", over"
    lines = [f"{row.migration}  {row.program or 'the program'} {meaning} ({row.state} for {age}{over})"]
    if row.why:
        lines.append(f"  {row.why}")
    if not row.ended and not row.owned:
        because = "its agent is gone" if row.same_boot else "this host was booted since"
        lines.append(f"  nobody works on it, {because}: phaul resolve {row.migration}")
    return lines


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"

"""`phaul report`: all that this host knows of a migration, for whoever has to find out what happened."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phaul.cli import options
from phaul.errors import PhaulError

if TYPE_CHECKING:
    from phaul.journal import Change, Row

app = typer.Typer(add_completion=False)

Migration = Annotated[str | None, typer.Argument(metavar="[ID]", help="A migration; without, the last one.")]


@app.command()
def report(migration: Migration = None, as_json: options.Json = False) -> None:
    """Tell all that this host knows of a migration.

    Its states and when they began, its processes and addresses, and what its agents said.
    """
    settings = options.settings()
    found = _find(settings, migration)
    if not found:
        raise PhaulError(
            f"this host knows no migration {migration!r}" if migration else "this host has seen no migration",
            advice="phaul status --all lists them",
        )
    for row, history in found:
        said = _said(settings, row)
        if as_json:
            changes = [change._asdict() for change in history]
            body = {**row.model_dump(mode="json"), "owned": row.owned, "history": changes, "log": said}
            print(json.dumps({"event": "report", **body}))
        else:
            print("\n".join(_lines(row, history, said)))


def _find(settings: Any, migration: str | None) -> list[tuple[Row, list[Change]]]:
    from phaul.journal import Store

    store = Store(settings.agent.state_directory)
    names = store.names()
    wanted = migration or (names[-1][0] if names else "")
    found = []
    for name, role in names:
        journal = store.open(name, role) if name == wanted else None
        if journal is not None:
            with journal:
                found.append((journal.row, journal.history()))
    return found


def _said(settings: Any, row: Row) -> str:
    from phaul import logs

    return logs.last_words(settings.agent.run_directory, row.migration, row.role)[1]


def _lines(row: Row, history: list[Change], said: str) -> list[str]:
    lines = [f"migration {row.migration}, this host is the {row.role}: {row.program or 'a program'}"]
    if row.peer:
        lines.append(f"  {'to' if row.role == 'source' else 'from'} {row.peer}")
    for change in history:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(change.at)) + f".{int(change.at % 1 * 1000):03}"
        lines.append(f"  {when}  {change.state}{': ' if change.why else ''}{change.why}")
    pids = ", ".join(str(task.pid) for task in row.tasks) or "none"
    lines.append(f"  processes {pids}; cgroup {row.cgroup or 'none'}")
    if row.addresses:
        lines.append(f"  addresses {', '.join(row.addresses)}")
    if row.warning:
        lines.append(f"  warning: {row.warning}")
    if not row.ended and not row.owned:
        lines.append(f"  it is not over, and nobody works on it: phaul resolve {row.migration}")
    if said:
        lines += ["  its agent said:", *(f"    {line}" for line in said.splitlines()[-40:])]
    return lines

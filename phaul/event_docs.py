"""docs/events.md, from the events themselves: `python -m phaul.event_docs`."""

from __future__ import annotations

import dataclasses
import inspect

from phaul import events

HEAD = """# Events

`phaul migrate --json` prints one JSON object a line. `event` is its name, `time` when it was printed (seconds since
1970); durations are milliseconds, sizes bytes, rates bytes a second. Readers should skip events and fields that they do
not know: new ones may come. Those below stay. The last line is the `result`, always, also of a command that failed
before there was a migration; its keys are all it has. This text is generated: `python -m phaul.event_docs`.
"""
PARTS = (events.Finding, events.Round)


def markdown() -> str:
    """The whole text."""
    lines = [HEAD]
    for name, kind in events.registry().items():
        lines += [f"## {name}", "", *_description(kind)]
    lines += ["# Parts of events", ""]
    for part in PARTS:
        lines += [f"## {part.__name__}", "", *_description(part)]
    return "\n".join(lines).rstrip() + "\n"


def _description(kind: type) -> list[str]:
    lines = [inspect.cleandoc(kind.__doc__ or ""), ""]
    fields = dataclasses.fields(kind)
    if fields:
        lines += ["| field | type |", "|---|---|"]
        lines += [f"| `{field.name}` | {_type(str(field.type))} |" for field in fields]
        lines.append("")
    return lines


def _type(text: str) -> str:
    """A Python annotation in words of JSON."""
    for python, words in (
        ("Outcome", "migrated, refused, stayed, cancelled, in-doubt, lost or error"),
        ("Side", "source or destination"),
    ):
        if text == python:
            return words
    if text.startswith("Literal["):
        return ", ".join(text[8:-1].replace('"', "").split(", "))
    if text.startswith("tuple["):
        return f"list of {text[6:-1].removesuffix(', ...')}"
    text = text.replace(" | None", ", or null")
    for python, words in (("str", "string"), ("int", "integer"), ("float", "number")):
        text = words + text.removeprefix(python) if text.startswith(python) else text
    return text


if __name__ == "__main__":
    print(markdown(), end="")

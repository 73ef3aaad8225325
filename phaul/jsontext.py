"""JSON from elsewhere: from another host, or from a file that may be damaged."""

from __future__ import annotations

import json
from typing import Any


def parse(text: str | bytes) -> Any:
    """The value. ValueError for anything that is none: what is nested without end, and numbers that are none, too."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no number")

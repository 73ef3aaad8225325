"""Logs: what happened, for whoever looks later, on stderr.

Every line says when, how grave, and whose it is: the migration, the role and the process. `[log]` decides from which
level on, and in which form: `text`; `json`, one object a line; `journal`, text with the prefix of sd-daemon(3); `auto`,
which is `journal` where stderr leads to systemd's journal, else text. An agent's stderr is the journal where systemd
runs, and a file beside its socket elsewhere (keeper.py).

It is the standard library's logging: asyncio brings that along anyway, and an agent is waited for while it starts.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import traceback
from datetime import datetime
from pathlib import Path

from phaul import keeper
from phaul.config import ConfigError, LogSettings, load

# sd-daemon(3): what syslog(3) calls the levels
_READ = 5.0  # seconds for journalctl
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def set_up(settings: LogSettings, **context: str) -> None:
    """Log to stderr from now on; `context` stands on each line. Once more replaces what was."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(settings.format, context | {"pid": str(os.getpid())}))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.level.upper())


def set_up_agent(migration: str, role: str) -> None:
    """As this host's settings say; mistakes in them keep no agent from its work, and are logged."""
    try:
        settings, mistake = load().log, ""
    except ConfigError as error:
        settings, mistake = LogSettings(), str(error)
    set_up(settings, migration=migration, role=role)
    if mistake:
        logging.getLogger(__name__).warning("the settings are not used: %s", mistake)


def _formatter(form: str, context: dict[str, str]) -> logging.Formatter:
    if form == "auto":
        form = "journal" if keeper.stderr_is_journal() else "text"
    return {"text": _Text, "json": _Json, "journal": _Journal}[form](context)


def last_words(run_directory: Path, migration: str, role: str, lines: int = 40) -> tuple[str, str]:
    """Where an agent's log is, and the end of it; empty for one that had nothing to explain."""
    path = keeper.log_path(run_directory, migration, role)
    if path.exists():
        text = path.read_text(errors="replace").strip()
        return (str(path), "\n".join(text.splitlines()[-lines:])) if text else ("", "")
    if not keeper.JOURNAL.is_socket():
        return "", ""
    words = ["journalctl", "-t", keeper.journal_name(migration, role)]
    try:
        command = [*words, "-q", "--no-pager", "-o", "cat", "-n", str(lines)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=_READ, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    return (" ".join(words), said) if said else ("", "")


class _Text(logging.Formatter):
    def __init__(self, context: dict[str, str]) -> None:
        super().__init__()
        self._context = " ".join(f"{name}={value}" for name, value in context.items())

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback below it."""
        when = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        return f"{when} {record.levelname.lower():7} {self._told(record)}"

    def _told(self, record: logging.LogRecord) -> str:
        text = f"[{self._context}] {record.getMessage()}"
        return text + "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip() if record.exc_info else text


class _Journal(_Text):
    """The journal knows the time; a prefix on every line, since it takes each for an entry."""

    def format(self, record: logging.LogRecord) -> str:
        """Lines with the priority."""
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in self._told(record).splitlines())


class _Json(logging.Formatter):
    def __init__(self, context: dict[str, str]) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        """One object: time, level, what the line is about, the text, and a traceback if there is one."""
        content = {"time": round(record.created, 3), "level": record.levelname.lower(), **self._context}
        content["text"] = record.getMessage()
        if record.exc_info:
            content["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(content, ensure_ascii=False)

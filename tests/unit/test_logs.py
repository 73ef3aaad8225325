"""Logs: each line says whose it is, in every form; an agent's go to the journal where there is one."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul import keeper, logs
from phaul.config import LogSettings


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def say(capsys: pytest.CaptureFixture[str], **settings: str) -> str:
    logs.set_up(LogSettings(**settings), migration="0390cd005dfd", role="source")  # type: ignore[arg-type]
    logger = logging.getLogger("phaul.test")
    logger.info("it goes on")
    try:
        raise ValueError("no such thing")
    except ValueError:
        logger.exception("a mistake in %s", "FREEZE")
    return capsys.readouterr().err


def test_text_says_when_how_grave_and_whose(capsys: pytest.CaptureFixture[str]) -> None:
    lines = say(capsys, format="text", level="info").splitlines()
    context = rf"\[migration=0390cd005dfd role=source pid={os.getpid()}\]"
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\S+ info    {context} it goes on", lines[0])
    assert re.fullmatch(rf"\S+ error   {context} a mistake in FREEZE", lines[1])
    assert lines[-1] == "ValueError: no such thing"


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = map(json.loads, say(capsys, format="json", level="info").splitlines())
    assert (first["level"], first["text"], first["migration"]) == ("info", "it goes on", "0390cd005dfd")
    assert (second["level"], second["role"], second["pid"]) == ("error", "source", str(os.getpid()))
    assert "ValueError: no such thing" in second["traceback"]


def test_the_journal_gets_priorities_on_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = say(capsys, format="journal", level="info").splitlines()
    assert lines[0].startswith("<6>[migration=")
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines[1:])


def test_the_level_is_kept_to(capsys: pytest.CaptureFixture[str]) -> None:
    text = say(capsys, level="error", format="text")
    assert "it goes on" not in text
    assert "a mistake" in text


def test_an_agents_stderr_is_the_journal_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for systemd-journald's socket: the header of its stream protocol, then lines with priorities."""
    place = tmp_path / "stdout"
    monkeypatch.setattr(keeper, "JOURNAL", place)
    text = "from phaul import logs; import logging; logs.set_up_agent('0390cd005dfd', 'source'); logging.error('oh')"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as journal:
        journal.bind(str(place))
        journal.listen()
        with keeper._log(tmp_path, "0390cd005dfd", "source") as (log, environment):
            subprocess.run([sys.executable, "-c", text], stderr=log, env=os.environ | environment, check=True)
        stream, _ = journal.accept()
        with stream, stream.makefile() as lines:
            said = lines.read().splitlines()
    assert said[:7] == ["phaul-0390cd005dfd.source", "", "6", "1", "0", "0", "0"]
    assert re.fullmatch(r"<3>\[migration=0390cd005dfd role=source pid=\d+\] oh", said[7])
    assert not list(tmp_path.glob("*.log"))


def test_last_words_are_those_of_the_file(tmp_path: Path) -> None:
    assert logs.last_words(tmp_path, "0390cd005dfd", "source") == ("", "")
    path = keeper.log_path(tmp_path, "0390cd005dfd", "source")
    path.write_text("one\ntwo\nthree\n")
    assert logs.last_words(tmp_path, "0390cd005dfd", "source", lines=2) == (str(path), "two\nthree")


def test_the_journal_is_asked_where_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "journalctl"
    tool.write_text('#!/bin/sh\necho "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as journal:
        journal.bind(str(tmp_path / "stdout"))
        monkeypatch.setattr(keeper, "JOURNAL", tmp_path / "stdout")
        where, said = logs.last_words(tmp_path, "0390cd005dfd", "source")
    assert where == "journalctl -t phaul-0390cd005dfd.source"
    assert said == "-t phaul-0390cd005dfd.source -q --no-pager -o cat -n 40"

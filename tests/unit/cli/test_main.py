"""The command itself: its list of commands, its quick start, and how errors end it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from phaul import __version__
from phaul.cli import main as cli
from phaul.errors import InDoubtError, UsageError


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "phaul", *args], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_table_says_what_the_command_says(name: str) -> None:
    module, line = cli.COMMANDS[name]
    command = typer.main.get_command(importlib.import_module(module).app)
    assert (command.help or "").splitlines()[0] == line


def test_help_names_every_command_and_imports_none() -> None:
    """What makes `phaul --help` slow is what it imports: nothing of phaul's but the errors, and no heavy library."""
    text = (
        "import sys\n"
        "sys.argv = ['phaul', '--help']\n"
        "from phaul.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30, check=True)
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    modules = set(done.stderr.split())
    assert {name for name in modules if name.startswith("phaul.")} == {"phaul.cli", "phaul.cli.main", "phaul.errors"}
    assert not modules & {"asyncio", "asyncssh", "pydantic", "rich", "google.protobuf", "phaul_engine", "pyroute2"}


def test_what_is_started_over_there_imports_little() -> None:
    """The relay, and the agents that it starts, are waited for: what only a command line needs stays out of them."""
    text = "import sys, importlib\nimportlib.import_module(sys.argv[1])\nprint(*sorted(sys.modules))"
    for module in ("phaul.agent", "phaul.source.agent", "phaul.dest.agent", "phaul.keeper"):
        done = subprocess.run([sys.executable, "-c", text, module], capture_output=True, text=True, check=True)
        found = set(done.stdout.split())
        assert module in found
        assert not found & {"typer", "click", "rich", "asyncssh", "phaul.cli.main"}, module
        if module == "phaul.agent":  # it is asked for a dozen facts before anything needs an image
            assert not found & {"phaul_engine.images.checkpoint", "phaul_engine.native"}
        if module == "phaul.keeper":
            assert {name for name in found if name.startswith("phaul.")} == {module}


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert tomllib.loads(text)["project"]["version"] == __version__


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("phaul ")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["chek"], "No such command 'chek'"),
        (["check", "--jason"], "No such option: --jason"),
        (["check", "-o", "NoSuchThing=1", "db2"], "Bad configuration option"),
        (["check", "db2:99999"], "a port is 1 to 65535"),
        (["agent"], "phaul agent --stdio"),
    ],
)
def test_wrong_usage_is_2(args: list[str], words: str) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert words.lower() in done.stderr.lower()
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (UsageError("what happened", advice="what to do"), 2, ["phaul: what happened", "  what to do"]),
        (
            InDoubtError("no answer", migration="m1", where="frozen here", advice="phaul resolve m1"),
            40,
            ["phaul: no answer", "  frozen here", "  phaul resolve m1"],
        ),
    ],
)
def test_errors_say_what_where_and_what_next(
    error: Exception, status: int, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
    assert capsys.readouterr().err.splitlines() == lines

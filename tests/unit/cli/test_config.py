"""Settings: what each source says, in which order, and what a mistake is answered with."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest

from phaul import config

REFERENCE = Path(__file__).parents[3] / "configs" / "phaul.toml"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in config.variables():
        monkeypatch.delenv(name, raising=False)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_reference_file_holds_every_key_at_its_default() -> None:
    content = tomllib.loads(REFERENCE.read_text())
    expected = {
        section: set(getattr(config.load(files=[]), section).model_dump()) for section in config.Settings.model_fields
    }
    assert {section: set(keys) for section, keys in content.items()} == expected
    assert config.load(files=[REFERENCE]) == config.load(files=[])


def test_reference_file_explains_every_key() -> None:
    lines = REFERENCE.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if " = " in line and not line.startswith("#"):
            assert above.startswith("#"), f"{line!r} has no explanation"


def test_every_key_is_used() -> None:
    """A setting that nothing reads would be a promise that nobody keeps."""
    code = "\n".join(
        path.read_text() for path in (REFERENCE.parents[1] / "phaul").rglob("*.py") if path.name != "config.py"
    )
    for section, field in config.Settings.model_fields.items():
        for key in config._keys_of(field.annotation):
            assert re.search(rf"\b(settings|migrate|ssh|agent|log|options|section)\.{key}\b", code), (
                f"[{section}] {key}"
            )


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = write(
        tmp_path / "system.toml", '[migrate]\nmax_rounds = 1\nstreams = 1\ntcp = "close"\nbandwidth = "1M"\n'
    )
    user = write(tmp_path / "user.toml", '[migrate]\nmax_rounds = 2\nstreams = 2\ntcp = "refuse"\n')
    monkeypatch.setenv("PHAUL_MIGRATE_MAX_ROUNDS", "3")
    monkeypatch.setenv("PHAUL_MIGRATE_STREAMS", "3")
    settings = config.load({"migrate": {"max_rounds": 4, "tunnel": None}}, files=[system, user])
    migrate = settings.migrate
    assert (migrate.max_rounds, migrate.streams, migrate.tcp, migrate.bandwidth) == (4, 3, "refuse", 1_000_000)
    assert migrate.max_downtime == 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("100M", 100_000_000),
        ("100MB/s", 100_000_000),
        ("1MiB", 1_048_576),
        ("1Gbit", 125_000_000),
        ("1Gbit/s", 125_000_000),
        ("1.5k", 1500),
        (5000, 5000),
    ],
)
def test_rates(text: str | int, expected: int) -> None:
    assert config.parse_rate(text) == expected


@pytest.mark.parametrize("text", ["", "fast", "-1M", "1Mb", "1X", "10 10", "1e9", "100"])
def test_rates_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"rate|bits or bytes|less than"):
        config.parse_rate(text)


def test_durations() -> None:
    assert config.parse_duration("250ms") == 0.25
    assert config.parse_duration("2m") == 120
    assert config.load({"migrate": {"max_downtime": "1.5s"}}, files=[]).migrate.max_downtime == 1500
    assert config.load({"migrate": {"max_downtime": 20}}, files=[]).migrate.max_downtime == 20
    with pytest.raises(ValueError, match="not a duration"):
        config.parse_duration("soon")


def test_compression() -> None:
    assert str(config.parse_compression("zstd:-3")) == "zstd:-3"
    assert config.parse_compression("zstd").level == 0
    for text in ("zstd:20", "zstd:0", "zstd:", "auto:1", "lz4"):
        with pytest.raises(ValueError, match="zstd"):
            config.parse_compression(text)


def test_moved_addresses() -> None:
    assert str(config.parse_moved_address("192.0.2.7/24@eth0")) == "192.0.2.7/24@eth0"
    assert str(config.parse_moved_address("2001:db8::7/64@bond0.7")) == "2001:db8::7/64@bond0.7"
    for text in (
        "192.0.2.7@eth0",
        "192.0.2.7/33@eth0",
        "192.0.2.7/24",
        "127.0.0.1/8@lo",
        "::1/128@lo",
        "1.2.3.4/24@a/b",
    ):
        with pytest.raises(ValueError, match=r"ADDR/PREFIX|prefix length|cannot"):
            config.parse_moved_address(text)


def test_mistakes_name_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = write(tmp_path / "bad.toml", '[migrate]\nmax_round = 3\ntcp = "drop"\n[shh]\n')
    with pytest.raises(config.ConfigError) as raised:
        config.load(files=[bad])
    text = str(raised.value)
    assert f"{bad}: [migrate] max_round: there is no such setting" in text
    assert f"{bad}: [migrate] tcp: " in text
    assert f"{bad}: shh: there is no such setting" in text

    with pytest.raises(config.ConfigError, match=r"^--bandwidth: 'fast' is not a rate"):
        config.load({"migrate": {"bandwidth": "fast"}}, files=[])

    monkeypatch.setenv("PHAUL_SSH_KEEPALIVE", "0")
    with pytest.raises(config.ConfigError, match=r"^PHAUL_SSH_KEEPALIVE: .*greater than 0"):
        config.load(files=[])
    monkeypatch.setenv("PHAUL_SSH_KEEPALIVE", "3s")
    monkeypatch.setenv("PHAUL_SSH_KEEPALIF", "3")
    with pytest.raises(config.ConfigError, match="there is no setting PHAUL_SSH_KEEPALIF"):
        config.load(files=[])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    broken = write(tmp_path / "broken.toml", "[migrate\n")
    with pytest.raises(config.ConfigError, match=r"broken\.toml: "):
        config.load(files=[broken])

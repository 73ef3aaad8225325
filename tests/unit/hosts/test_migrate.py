"""The tests' own reading of `phaul migrate --json` lets nothing pass that breaks the contract."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.hosts.migrate import ContractError, parse

RESULT: dict[str, Any] = {
    "event": "result",
    "outcome": "migrated",
    "pid": 7,
    "downtime_ms": 2.5,
    "total_ms": 300.0,
    "rounds": [{"pages": 10, "bytes": 40960, "ms": 1.0}],
    "bytes_sent": 40960,
    "reason": None,
}


def done(status: int, *lines: str) -> subprocess.CompletedProcess[str]:
    """What a command that wrote these lines and ended so looks like."""
    return subprocess.CompletedProcess(["phaul", "migrate"], status, "".join(f"{line}\n" for line in lines), "said why")


def test_result_is_read() -> None:
    migration = parse(done(0, json.dumps({"event": "connected"}), json.dumps(RESULT)))
    assert (migration.outcome, migration.downtime_ms, migration.reason) == ("migrated", 2.5, "")
    assert migration.rounds == RESULT["rounds"]
    assert len(migration.of("connected")) == 1
    assert "said why" in str(migration)


def test_refusal_has_its_status_and_reason() -> None:
    refused = RESULT | {"outcome": "refused", "reason": "fd 7"}
    assert parse(done(20, json.dumps(refused))).reason == "fd 7"


@pytest.mark.parametrize(
    ("status", "lines"),
    [
        (0, ()),
        (0, ("Traceback",)),
        (0, (json.dumps(["result"]),)),
        (0, (json.dumps(RESULT), json.dumps({"event": "connected"}))),
        (0, (json.dumps(RESULT), json.dumps(RESULT))),
        (30, (json.dumps(RESULT),)),
        (0, (json.dumps(RESULT | {"outcome": "refused"}),)),
        (0, (json.dumps(RESULT | {"outcome": "error"}),)),
        (0, (json.dumps(RESULT | {"outcome": "who knows"}),)),
    ],
)
def test_breach_of_contract_is_named(status: int, lines: tuple[str, ...]) -> None:
    with pytest.raises(ContractError, match=r"phaul migrate ended with status"):
        parse(done(status, *lines))

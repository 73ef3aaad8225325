"""Decoders in Python against bytes that nobody meant to write (targets.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

_CORPUS = Path(__file__).with_name("corpus")
_EXAMPLES = int(os.environ.get("PHAUL_FUZZ_EXAMPLES", "120"))
_NUMBERS = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff" * 8, b"9" * 30)


def _known(name: str) -> list[bytes]:
    """Where to begin: what fuzzing has found before, and what is said in words."""
    found = sorted((_CORPUS / name).glob("*")) if (_CORPUS / name).is_dir() else []
    return [*TARGETS[name].seeds(), *(path.read_bytes() for path in found)]


@st.composite
def _damaged(draw: st.DrawFn, name: str) -> bytes:
    """Something known, with pieces changed, taken out, put in, or from another."""
    known = _known(name)
    data = bytearray(draw(st.sampled_from(known)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                number = draw(st.sampled_from(_NUMBERS))
                data[at : at + len(number)] = number
            case 2:
                del data[at : at + draw(st.integers(1, 16))]
            case 3:
                data[at:at] = draw(st.binary(max_size=16))
            case _:
                other = draw(st.sampled_from(known))
                data[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_known(name: str) -> None:
    for data in _known(name):
        TARGETS[name].feed(data)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged(name: str) -> None:
    @settings(max_examples=_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(_damaged(name) | st.binary(max_size=64))
    def feed(data: bytes) -> None:
        TARGETS[name].feed(data)

    feed()

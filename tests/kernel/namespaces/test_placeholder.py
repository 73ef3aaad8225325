"""A port that keeps a bridge in use changes nothing of it."""

from __future__ import annotations

import subprocess

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.namespaces.net import placeholder


def _ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, stdout=-1).stdout.decode()


def test_a_bridge_is_as_it_was() -> None:
    _ip("link add bridge mtu 9000 type bridge")
    _ip("link set bridge up")
    _ip("link add port mtu 9000 type veth peer name other")
    _ip("link set port master bridge")
    before, count = _ip("link show bridge"), len(_ip("-o link show").splitlines())
    name = placeholder.make_name()
    placeholder.occupy(name, "bridge")
    assert f"{name}@" in _ip("link show master bridge")
    assert _ip("link show bridge") == before
    placeholder.vacate(name)
    placeholder.vacate(name)
    assert _ip("link show bridge") == before
    assert len(_ip("-o link show").splitlines()) == count
    with pytest.raises(RebuildError, match="not here"):
        placeholder.occupy(name, "none")
    _ip("link del port")
    _ip("link del bridge")

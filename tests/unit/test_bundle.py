"""What `phaul deploy` sends, and what becomes of it there."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from phaul import bundle, unpacking
from phaul.errors import PhaulError, VersionError
from phaul.transport import hello


def test_the_bundle_has_all_that_phaul_needs() -> None:
    with bundle.bundle(sys.version_info[:2]) as content:
        assert all(path.is_file() for path in content.files.values())
    names = set(content.files)
    assert {"phaul/__main__.py", "phaul_engine/_native.abi3.so", "asyncssh/__init__.py"} <= names
    assert not [name for name in names if name.startswith(("/", "..")) or "__pycache__" in name]
    assert not [name for name in names if name.startswith(("pytest", "mypy", "hypothesis"))]


def test_its_digest_tells_contents_apart(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("one")
    one = bundle.Bundle({"a.py": file}, (3, 11))
    first = one.digest
    assert first == bundle.Bundle({"a.py": file}, (3, 11)).digest
    assert (
        len({first, bundle.Bundle({"b.py": file}, (3, 11)).digest, bundle.Bundle({"a.py": file}, (3, 12)).digest}) == 3
    )
    with tarfile.open(fileobj=io.BytesIO(one.archive())) as archive:
        assert archive.getnames() == ["a.py"]
        assert archive.getmember("a.py").uid == 0
    file.write_text("two")
    assert one.digest != first


def test_another_python_without_a_way_to_its_packages_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(PhaulError, match=r"cannot be had for Python 3\.99") as raised:
        with bundle.bundle((3, 99)):
            pass
    assert "install Python" in raised.value.advice


def test_links_are_changed_in_one_step_and_only_once(tmp_path: Path) -> None:
    link = tmp_path / "new" / "phaul"
    assert unpacking.point(link, "one")
    assert not unpacking.point(link, "one")
    assert unpacking.point(link, "two")
    assert os.readlink(link) == "two"
    assert [path.name for path in link.parent.iterdir()] == ["phaul"]


def test_old_versions_go(tmp_path: Path) -> None:
    for age, name in enumerate("abcde"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert unpacking.remove_old(tmp_path, tmp_path / "e") == ["c", "d"]  # e is in use, a and b are the newest others
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "e"]


@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [("0.1.0", "0.1.7", True), ("0.1.0", "0.2.0", False), ("1.0", "1.9", True), ("1.9", "2.0", False)],
)
def test_versions_that_do_not_fit_advise_to_deploy(ours: str, theirs: str, fits: bool) -> None:
    here, there = hello.Hello(ours, (1, 1)), hello.Hello(theirs, (1, 1))
    if fits:
        assert hello.agree(here, there, "bob@db2").protocol == 1
        return
    with pytest.raises(VersionError, match=f"phaul {theirs} on bob@db2") as raised:
        hello.agree(here, there, "bob@db2")
    assert "phaul deploy bob@db2" in raised.value.advice

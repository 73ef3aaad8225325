"""Every test here is audited: see tests/hosts/audit.py."""

import pytest


@pytest.fixture(autouse=True)
def _audit(audited: None) -> None:
    """Fail the test that leaves something behind."""

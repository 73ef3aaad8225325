"""The rules that are broken on purpose (tests/rules.py) can be: what they change is there, and who is to notice."""

from __future__ import annotations

import pytest

from tests.rules import ROOT, RULES, Rule


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_breaks_a_rule_is_there(rule: Rule) -> None:
    assert (ROOT / rule.file).read_text().count(rule.old) == 1, f"{rule.file} has changed: what breaks the rule now?"
    assert rule.new != rule.old
    for test in rule.tests.split():
        assert (ROOT / test).exists()

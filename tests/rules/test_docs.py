"""docs/ops.md says what the table says."""

from __future__ import annotations

from pathlib import Path

from fxshard.rules.docs import NO_RULE, ops_page
from fxshard.rules.table import all_rules, rule_function

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ops.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == ops_page(), "run python -m fxshard.rules.docs > docs/ops.md"


def test_every_rule_is_described() -> None:
    page = ops_page()
    for name, rule in all_rules().items():
        assert name.removeprefix("aten.") in page
        assert not rule.text.startswith("@") or rule_function(rule.text).__doc__, f"{rule.text} has no docstring"


def test_what_stays_whole_says_why() -> None:
    page = ops_page()
    for name, why in (("masked_scatter", "depends on the whole mask"), ("view.dtype", "speaks of memory")):
        rule = all_rules()[f"aten.{name}"]
        assert why in rule.whole
        assert rule.whole in page


def test_what_is_said_to_have_no_rule_has_none() -> None:
    for name in ("arange", "expand_as", "type_as", "eye"):
        assert any(name in names for names in NO_RULE)
        assert f"aten.{name}" not in all_rules()

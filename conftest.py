"""Fixtures of all tests, the doctests of the package included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxshard.rules import table


@pytest.fixture(autouse=True)
def the_table_as_it_was() -> Iterator[None]:
    """Rules that a test or an example registers are gone after it: other tests read the whole table."""
    before = table.all_rules()
    yield
    if table.all_rules() != before:
        table._rules.clear()
        table._rules.update(before)
        table.generation.append("restored")

"""Fixtures of all tests, the doctests of the package included."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

from fxshard.rules import table

if "PYTEST_XDIST_WORKER" not in os.environ:
    # A model is captured once for all plans, tests and processes: they inherit the folder.
    _captures = tempfile.TemporaryDirectory(prefix="fxshard-captures-", ignore_cleanup_errors=True)
    os.environ["FXSHARD_CACHE"] = _captures.name


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A failure is printed when it happens, not an hour later."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{'_' * 20} {report.nodeid} ({report.when}) {'_' * 20}\n{report.longreprtext}", file=sys.__stdout__)


@pytest.fixture(autouse=True)
def the_table_as_it_was() -> Iterator[None]:
    """Rules that a test or an example registers are gone after it: other tests read the whole table."""
    before = table.all_rules()
    yield
    if table.all_rules() != before:
        table._rules.clear()
        table._rules.update(before)
        table.generation.append("restored")

"""What every test runs under: one thread a process, no network, hypothesis without deadlines."""

from __future__ import annotations

import os
from collections import defaultdict

# Before torch and transformers are imported, here and in the processes that tests spawn.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# CI repeats the same examples every time; `HYPOTHESIS_PROFILE=dev` draws new ones, `explore` many more of them.
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", parent=settings.get_profile("dev"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a function that is ``thin(n)``, one case in n is run always, with every value of each parameter among them.

    Of the slow cases of one that is ``in_turn(n)``, one in n is run at all, unless ``FXSHARD_SWEEP`` is set.
    """
    seen: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    dropped = set()
    for item in items:
        thin, in_turn = item.get_closest_marker("thin"), item.get_closest_marker("in_turn")
        if thin is None and in_turn is None:
            continue
        positions = 0  # of the values of its parameters
        for name, value in item.callspec.params.items():  # type: ignore[attr-defined]
            values = seen[item.nodeid.split("[")[0], name]
            positions += values.setdefault(id(value), len(values))
        if thin is not None and positions % thin.args[0]:
            item.add_marker("slow")
        is_slow = item.get_closest_marker("slow") is not None
        if in_turn is not None and is_slow and positions % in_turn.args[0] != 1 and "FXSHARD_SWEEP" not in os.environ:
            dropped.add(item)
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)

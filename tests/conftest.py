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
    """Of a function that is ``thin(n)``, one case in n is run always, with every value of each parameter among them."""
    seen: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for item in items:
        thin = item.get_closest_marker("thin")
        if thin is None:
            continue
        positions = 0  # of the values of its parameters
        for name, value in item.callspec.params.items():  # type: ignore[attr-defined]
            values = seen[item.nodeid.split("[")[0], name]
            positions += values.setdefault(id(value), len(values))
        if positions % thin.args[0]:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test's random numbers do not depend on the tests before it."""
    torch.manual_seed(0)

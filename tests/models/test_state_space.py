"""State-space and recurrent mixers: their features are split, though they compute their steps from these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import assert_equivalent
from tests.models.zoo import ids
from tests.presets import presets

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "use_cache": False}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "time_step_rank": 4, "use_mambapy": False, "expand": 2},
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 64, "context_length": 32, "rescale_every": 0},
}
PLANS = presets("tp2", "sp2", "dp2")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SMALL, **MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 0.1)
    return model.double().eval()


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_mixers_are_split(name: str, plan: str) -> None:
    """Their slow paths compute in single precision."""
    model = build(name)
    inputs = {"input_ids": ids(length=8)}
    program = assert_equivalent(model, PLANS[plan], (), inputs, tolerance=1e-4)
    if plan == "dp2":
        return
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "time_mix" not in n}
    split = sum(size for n, size in sizes.items() if n in program.plan.params)
    assert split >= 0.9 * sum(sizes.values())
    backward = [c for c in program.collectives() if c.phase == "backward" and c.kind == "all_reduce"]
    assert len(backward) <= 30, "the gradients of a scan's steps are summed at once, not step by step"

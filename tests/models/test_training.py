"""Training GPT-2 with dropout, as one device does: every mask, every loss, every weight, over twenty steps.

Real ranks: ``tests/distributed/test_ranks.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fxshard
from tests.helpers import slow_but_for
from tests.models.zoo import build, ids
from tests.presets import presets

STEPS = 20
PLANS = presets("dp2_tp2", "dp2_sp2", "tp4", "sp4", "dp4")


def batches() -> list[torch.Tensor]:
    return [ids(seed=100 + step) for step in range(STEPS)]


def loss_of(output: Any, batch: torch.Tensor) -> torch.Tensor:
    """In the dtype of the logits; transformers' own loss is always in float32."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def train_whole(model: torch.nn.Module) -> list[float]:
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model(input_ids=batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_ranks(program: fxshard.ParallelModule) -> list[list[float]]:
    torch.manual_seed(7)
    modules = [program.rank_module(r) for r in range(program.mesh.world_size)]
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-3) for module in modules]
    losses = []
    for batch in batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        run = fxshard.simulate(program, input_ids=batch)
        losses.append([loss.item() for loss in run.backward(lambda output, batch=batch: loss_of(output, batch))])
        for optimizer in optimizers:
            optimizer.step()
    return losses


@slow_but_for("plan", PLANS, "dp2_tp2")
def test_losses_and_weights_are_one_devices(plan: str) -> None:
    model = copy.deepcopy(build("gpt2", training=True)[0])
    assert model.config.resid_pdrop == model.config.attn_pdrop == model.config.embd_pdrop == 0.1
    program = fxshard.parallelize(model, PLANS[plan], (), {"input_ids": ids()})
    simulated = train_ranks(program)
    expected = train_whole(model)
    for losses, want in zip(simulated, expected, strict=True):
        assert losses == pytest.approx([want] * len(losses), rel=1e-9)
    state = program.full_state_dict()
    for name, want in model.state_dict().items():
        torch.testing.assert_close(state[name], want, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_the_masks_matter() -> None:
    """Without dropout, or from another seed, the losses are others: what the test above compares is not trivial."""
    trained, plain = (copy.deepcopy(build("gpt2", training=training)[0]) for training in (True, False))
    batch = ids(seed=100)
    losses = []
    for model, seed in ((trained, 7), (trained, 8), (plain, 7)):
        torch.manual_seed(seed)
        losses.append(loss_of(model(input_ids=batch), batch).item())
    assert len({round(loss, 6) for loss in losses}) == 3


@pytest.mark.slow
def test_independent_masks_train_as_well() -> None:
    """Other masks than one device's: another run, but one that learns; and ranks agree on what they share."""
    model = copy.deepcopy(build("gpt2", training=True)[0])
    program = fxshard.parallelize(model, PLANS["dp2_tp2"], (), {"input_ids": ids()}, randomness="independent")
    simulated = train_ranks(program)
    assert all(len(set(losses)) == 1 for losses in simulated)
    expected = train_whole(model)
    assert simulated[0][0] != pytest.approx(expected[0], rel=1e-6)
    assert simulated[-1][0] == pytest.approx(expected[-1], rel=0.05)

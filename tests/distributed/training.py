"""What ranks run to train as one device does: AdamW steps with clipping, under every kind of plan."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import fxshard
from tests.models.zoo import build, ids, mixtral
from tests.presets import preset

STEPS, CLIP = 20, 0.5
Curve = list[tuple[float, float]]


def model_of(name: str, dtype: torch.dtype) -> nn.Module:
    if name == "mixtral":
        torch.manual_seed(0)
        return mixtral()[0].to(dtype).train()
    model, _ = build(name, dtype, True, **({"attention_dropout": 0.0} if name == "llama" else NO_DROPOUT))
    return copy.deepcopy(model)


NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def train(module: Any, name: str, steps: int = STEPS) -> Curve:
    """The loss and the norm of the gradient of every step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    curve = []
    for step in range(steps):
        batch = ids(seed=100 + step)
        optimizer.zero_grad()
        loss = module(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        norm = fxshard.clip_grad_norm_(module, CLIP)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


def follows_one_device(cases: list[tuple[str, str]]) -> None:
    """20 steps in float32: losses within 1e-5, norms within 1e-6 (relative), weights within 1e-4 (absolute)."""
    references: dict[str, tuple[Curve, dict[str, torch.Tensor]]] = {}
    problems = []
    for name, plan in cases:
        if name not in references:
            single = model_of(name, torch.float32)
            references[name] = train(single, name), single.state_dict()
        curve, weights = references[name]
        batch = ids(seed=100)
        inputs = {"input_ids": batch, "labels": batch, "use_cache": False}
        program = fxshard.parallelize(model_of(name, torch.float32), preset(plan), (), inputs)
        found = train(program, name)
        assert any(norm > CLIP for _, norm in curve), "nothing was clipped"
        losses, norms = (max(abs(a[i] / b[i] - 1) for a, b in zip(found, curve, strict=True)) for i in (0, 1))
        state = program.full_state_dict()
        apart = max((state[key] - want).abs().max().item() for key, want in weights.items())
        line = f"{name:8} {plan:10} loss {losses:.1e}  norm {norms:.1e}  weights {apart:.1e}"
        if torch.distributed.get_rank() == 0:
            print(line, flush=True)
        if losses > 1e-5 or norms > 1e-6 or apart > 1e-4 or found[0][0] == found[-1][0]:
            problems.append(line)
    assert not problems, "\n".join(problems)

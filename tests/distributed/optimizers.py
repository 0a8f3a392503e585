"""What the spawned processes run between a backward pass and an optimizer's step."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

import fxshard
from fxshard.errors import GradientError
from tests.distributed.ranks import run_rank
from tests.helpers import run_original
from tests.models.zoo import build
from tests.presets import preset


def gathered(value: torch.Tensor) -> list[torch.Tensor]:
    """The value of every rank."""
    out = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(out, value)
    return out


def norm_and_clipping(cases: list[tuple[str, str]]) -> None:
    """The norm is one device's, the same bits on all ranks; so are the clipped gradients."""
    for name, plan in cases:
        model, inputs = build(name)
        program = fxshard.parallelize(model, preset(plan), (), inputs)
        assert fxshard.grad_norm(program).item() == 0
        expected = run_original(model, (), inputs).grads
        run_rank(program, inputs)
        for order in (2.0, 3.0, math.inf):
            norm = fxshard.grad_norm(program, order)
            assert all(torch.equal(norm, other) for other in gathered(norm))
            assert norm.item() == pytest.approx(get_total_norm(list(expected.values()), order).item(), rel=1e-12)
        holders = [nn.Parameter(torch.zeros_like(grad)) for grad in expected.values()]
        for holder, grad in zip(holders, expected.values(), strict=True):
            holder.grad = grad
        limit = norm.item() / 5
        want = clip_grad_norm_(holders, limit)
        assert fxshard.clip_grad_norm_(program, limit).item() == pytest.approx(want.item(), rel=1e-12)
        for key, grad in program.full_grads().items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-10, atol=1e-12)
        bad = 0 if plan == "dp2" else 1  # one that counts the first parameter
        if dist.get_rank() == bad:
            next(p for p in program.parameters() if p.grad is not None).grad.fill_(math.nan)
        with pytest.raises(GradientError, match="of 1 parameters" if dist.get_rank() == bad else "of other ranks"):
            fxshard.clip_grad_norm_(program, 1.0, error_if_nonfinite=True)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def loss_scaling(fused: bool) -> None:
    """float16 autocast: an infinity in one rank's part skips the step of all; other steps are one device's."""
    model, x = Mlp(), torch.linspace(-1, 1, 48).reshape(6, 8)
    with torch.autocast("cpu", torch.float16):
        program = fxshard.parallelize(model, preset("tp2"), (x,))
    losses: list[list[float]] = []
    for trained, make in ((program, fxshard.GradScaler), (model, torch.amp.GradScaler)):
        optimizer, scaler = torch.optim.SGD(trained.parameters(), lr=0.1, fused=fused), make("cpu", init_scale=1024.0)
        parameters = dict(trained.named_parameters())
        losses.append([])
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = trained(x).float().square().mean()
            scaler.scale(loss).backward()
            before = {name: p.detach().clone() for name, p in parameters.items()}
            if step == 1 and (trained is model or dist.get_rank() == 1):
                parameters["up.weight"].grad[0, 0] = math.inf
            if step == 3 and trained is program:  # a rank that holds no gradient takes part
                optimizer.zero_grad() if dist.get_rank() == 1 else parameters["up.weight"].grad.fill_(math.nan)
            if step == 3 and trained is model:
                parameters["up.weight"].grad.fill_(math.nan)
            scaler.step(optimizer)
            scaler.update()
            skipped = all(torch.equal(p, before[name]) for name, p in parameters.items())
            assert skipped == (step in (1, 3)), f"rank {dist.get_rank()}, step {step}"
            losses[-1] += [loss.item(), scaler.get_scale()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][1::2] == [1024.0, 512.0, 512.0, 256.0]
    for name, whole in program.full_state_dict().items():
        torch.testing.assert_close(whole, model.state_dict()[name], rtol=1e-2, atol=1e-3)

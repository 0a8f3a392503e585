"""Layers that are dropped by chance, and what ranks run to show that they drop the same ones as one device."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from tests.presets import preset


class Layer(nn.Module):
    """A small layer with a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(12, 24), nn.Linear(24, 12), nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x + F.dropout(self.down(self.up(x).relu()), 0.1, self.training))
        return out


class Dropping(nn.Module):
    """Drops each layer with probability ``p`` in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.layers, self.head, self.p = nn.ModuleList(Layer() for _ in range(4)), nn.Linear(12, 12), p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = []
        for layer in self.layers:
            skip = self.training and torch.rand([]) < self.p
            if not skip:
                x = layer(x)
            seen.append(x)
        out: torch.Tensor = self.head(x) + torch.stack(seen).mean(0)
        return out


def dropping() -> None:
    """Ten steps with clipping: losses, which weights have a gradient, and the weights at the end."""
    for plan in ("tp2", "sp2", "dp2", "zero2"):
        torch.manual_seed(0)
        model, x = Dropping(0.4).double(), torch.randn(4, 6, 12, dtype=torch.float64)
        program = fxshard.parallelize(copy.deepcopy(model), preset(plan), (x,), bucket_bytes=600)
        ours = torch.optim.AdamW(program.parameters(), 0.01)
        theirs = torch.optim.AdamW(model.parameters(), 0.01)
        for step in range(10):
            losses = []
            for module, optimizer in ((model, theirs), (program, ours)):
                torch.manual_seed(step)
                loss = module(x).pow(2).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(float(loss.detach()))
            assert abs(losses[0] - losses[1]) < 1e-12 * abs(losses[0]), (plan, step, losses)
        for name, weight in program.full_state_dict().items():
            torch.testing.assert_close(weight, model.state_dict()[name])

"""Small mixtures of experts, in double precision: the ways in which models compute them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers.integrations.moe")  # it registers a product in groups that has double precision

grouped_mm = torch.ops.transformers.grouped_mm_fallback


class Experts(nn.Module):
    """Router and experts: ``down(relu(up(x)))``, each token's ``k`` best, weighed. The stream around it is normed."""

    def __init__(self, experts: int = 4, k: int = 2, dim: int = 8, hidden: int = 12, bias: bool = False) -> None:
        super().__init__()
        self.k, self.norm, self.router = k, nn.LayerNorm(dim), nn.Linear(dim, experts)
        self.up = nn.Parameter(torch.randn(experts, dim, hidden) * 0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, dim) * 0.5)
        self.up_bias = nn.Parameter(torch.randn(experts, hidden)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.norm(x).flatten(0, -2)
        return x + self.mixture(rows).view_as(x)

    def mixture(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = self.router(x).softmax(-1).topk(self.k)
        return weights, chosen


class Sorted(Experts):
    """Rows sorted by expert, products in groups, and the results added to their tokens."""

    def mixture(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        expert, order = chosen.flatten().sort()
        ends = torch.histc(expert.float(), len(self.up), 0, len(self.up) - 1).cumsum(0, dtype=torch.int32)
        h = grouped_mm(x[order // self.k], self.up, ends)
        if self.up_bias is not None:
            h = h + self.up_bias[expert]
        made = grouped_mm(h.sigmoid(), self.down, ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // self.k, made)


class Unsorted(Sorted):
    """As ``Sorted``, but the results go back to their places, and the ``k`` of each token are summed."""

    def mixture(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        expert, order = chosen.flatten().sort()
        ends = torch.histc(expert.float(), len(self.up), 0, len(self.up) - 1).cumsum(0, dtype=torch.int32)
        h = grouped_mm(x[order // self.k], self.up, ends).sigmoid()
        made = grouped_mm(h, self.down, ends) * weights.flatten()[order, None]
        return made[order.argsort()].view(len(x), self.k, -1).sum(1)


class Picked(Experts):
    """Every token with the matrices that are picked for it."""

    def mixture(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        ids = chosen.flatten()
        h = torch.bmm(x.repeat_interleave(self.k, 0).unsqueeze(1), self.up[ids])
        if self.up_bias is not None:
            h = h + self.up_bias.index_select(0, ids).unsqueeze(1)
        made = torch.bmm(F.gelu(h), self.down.index_select(0, ids)).squeeze(1) * weights.flatten()[:, None]
        return made.view(len(x), self.k, -1).sum(1)


class Dense(Experts):
    """Every expert computes every token; what was not chosen weighs nothing."""

    def mixture(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        gates = torch.zeros(len(x), len(self.up), dtype=x.dtype).scatter(1, chosen, weights)
        h = torch.einsum("td,edf->tef", x, self.up)
        if self.up_bias is not None:
            h = h + self.up_bias
        return torch.einsum("te,ted->td", gates, torch.einsum("tef,efd->ted", F.gelu(h), self.down))


class Batched(Experts):
    """As ``Dense``, by products of batches, the experts first."""

    def mixture(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        gates = torch.zeros(len(x), len(self.up), dtype=x.dtype).scatter(1, chosen, weights)
        rows = x.expand(len(self.up), *x.shape)
        h = torch.bmm(rows, self.up) if self.up_bias is None else torch.baddbmm(self.up_bias[:, None], rows, self.up)
        return (torch.matmul(F.gelu(h), self.down) * gates.t()[:, :, None]).sum(0)


KINDS = {kind.__name__.lower(): kind for kind in (Sorted, Unsorted, Picked, Dense, Batched)}


def build(kind: str, experts: int = 4, layers: int = 1, bias: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """A model of experts, and its input: 4 sequences of 6 tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(*(KINDS[kind](experts, bias=bias) for _ in range(layers))).double()
    return model, torch.randn(4, 6, 8, dtype=torch.float64)

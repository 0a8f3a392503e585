"""Modules and functions that generated programs use by name: what takes more than a line."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Twice(torch.autograd.Function):
    """Doubles, with a backward pass of its own that is not the derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 3


class Gated(torch.autograd.Function):
    """Two operands, two results, one of which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, y)
        positive = x > 0
        ctx.mark_non_differentiable(positive)
        return x * y.sigmoid(), positive

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = ctx.saved_tensors
        gate = y.sigmoid()
        return grad * gate, grad * x * gate * (1 - gate)


class Running(nn.Module):
    """Statistics that forward writes: in place, by assignment, and a count."""

    mean: torch.Tensor
    largest: torch.Tensor
    count: torch.Tensor

    def __init__(self, size: int, by_assignment: bool = False) -> None:
        super().__init__()
        self.by_assignment = by_assignment
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("largest", torch.ones(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen = x.detach().reshape(-1, x.shape[-1])
            if self.by_assignment:
                self.mean = 0.9 * self.mean + 0.1 * seen.mean(0)
            else:
                self.mean.mul_(0.9).add_(seen.mean(0), alpha=0.1)
            self.largest.copy_(torch.maximum(self.largest, seen.abs().amax()))
            self.count += 1
        return (x - self.mean) / self.largest


class Scaled(nn.Module):
    """Reads attributes, which the fuzzer changes between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.options = 1.5, {"act": "tanh"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(torch, self.options["act"])(x * self.gain)


class MLP(nn.Module):
    """up, gate, down, and the residual stream."""

    def __init__(self, size: int, inner: int, kind: str = "plain", bias: bool = True) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(size, 2 * inner if kind == "fused" else inner, bias=bias)
        self.gate = nn.Linear(size, inner, bias=bias) if kind == "gated" else None
        self.down, self.norm = nn.Linear(inner, size, bias=bias), nn.LayerNorm(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.norm(x))
        if self.kind == "fused":
            gate, h = h.chunk(2, -1)
            h = F.silu(gate) * h
        elif self.gate is not None:
            h = F.silu(self.gate(x)) * h
        else:
            h = F.gelu(h)
        return x + self.down(h)


class Attention(nn.Module):
    """Self-attention of [batch, length, size], in one of a few spellings."""

    def __init__(self, size: int, heads: int, kind: str = "fused", dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.kind, self.dropout = heads, kind, dropout
        self.qkv, self.o = nn.Linear(size, 3 * heads * 4), nn.Linear(heads * 4, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        p = self.dropout if self.training else 0.0
        if self.kind == "by hand":
            scores = q @ k.mT / 2
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            out = F.dropout(scores.masked_fill(hidden, -torch.inf).softmax(-1), p) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal", dropout_p=p)
        return x + self.o(out.transpose(1, 2).flatten(-2))

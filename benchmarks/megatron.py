"""Megatron's way of splitting layers, by hand: raw torch.distributed under five autograd functions.

Weights are plain tensors, the parts that this rank holds. As in Megatron the reductions work in place, on values that
nothing else reads: the output of a row linear, the input gradient of a column linear.

Reference: Megatron-LM, ``core/tensor_parallel/mappings.py`` (Shoeybi et al., 2019; Korthikanti et al., 2022).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather_raw(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The whole of ``x`` from the ranks' parts along ``dim``."""
    out = x.new_empty((2 * x.shape[0], *x.shape[1:]))
    dist.all_gather_single(out, x.contiguous())
    return out if dim == 0 else torch.cat(out.chunk(2), dim)


def scatter_raw(x: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's part along ``dim`` of the sum of ``x``."""
    parts = x.contiguous() if dim == 0 else torch.cat(x.chunk(2, dim))
    out = x.new_empty((parts.shape[0] // 2, *parts.shape[1:]))
    dist.reduce_scatter_single(out, parts)
    return out


def own_raw(x: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's part of ``x``."""
    return x.chunk(2, dim)[dist.get_rank()].contiguous()


class Copy(torch.autograd.Function):
    """*f*: nothing forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(grad)
        return grad


class Reduce(torch.autograd.Function):
    """*g*: all-reduce forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Gather(torch.autograd.Function):
    """All-gather forward; backward reduce-scatter, or this rank's part where what follows is the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, summed: bool) -> torch.Tensor:
        ctx.dim, ctx.summed = dim, summed
        return gather_raw(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return (scatter_raw if ctx.summed else own_raw)(grad, ctx.dim), None, None


class Scatter(torch.autograd.Function):
    """Reduce-scatter forward, all-gather backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.dim = dim
        return scatter_raw(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_raw(grad, ctx.dim), None


class Own(torch.autograd.Function):
    """This rank's part forward, all-gather backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.dim = dim
        return own_raw(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gather_raw(grad, ctx.dim), None

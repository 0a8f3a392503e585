"""Small weights that are stored in parts, gathered together: one collective for many.

A collective has a price of its own, however little it moves. So weights that are small, and are gathered one after the
other, lie end to end in one tensor for it; when the first is asked for, all of them are gathered, and the others wait
for their turn. Their gradients come back together too, and are reduce-scattered at once.

    rank 0   a0 b0 c0        one all-gather        a0 b0 c0 a1 b1 c1   ->   a = a0 a1, b = b0 b1, c = c0 c1
    rank 1   a1 b1 c1             ->               a0 b0 c0 a1 b1 c1

Reference: PyTorch FSDP (Zhao et al., 2023), section 3.2.1, whose FlatParameter is such a tensor, kept for good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from fxshard.runtime.collectives import Axis, ProcessAxisGroup
from fxshard.runtime.regather import Regather, Together

PACK_BYTES = 2**20
"""The most that is gathered together: above it, what copies cost is more than what collectives do."""


class Pack:
    """Weights of one dtype that are gathered together along one axis.

    Args:
        axis: the mesh axis.
        weights: this rank's parts, in the order in which they are asked for.
        dims: along which dim each is cut.
        summed: their gradients differ by rank, and are summed.
        lane: packs of one lane take turns.
    """

    def __init__(
        self, axis: Axis, weights: Sequence[torch.Tensor], dims: Sequence[int], summed: bool, lane: int
    ) -> None:
        self.axis, self.weights, self.dims, self.summed, self.lane = axis, list(weights), list(dims), summed, lane
        assert isinstance(axis.group, ProcessAxisGroup)
        self.group = axis.group
        self.sizes = [weight.numel() for weight in weights]
        self.waiting: dict[int, torch.Tensor] = {}
        self.with_grad = False

    def take(self, weight: torch.Tensor) -> torch.Tensor:
        """A whole weight, and with it the others, unless they were gathered with one of them before."""
        if self.with_grad != torch.is_grad_enabled() or id(weight) not in self.waiting:
            self.with_grad = torch.is_grad_enabled()
            wholes: Sequence[torch.Tensor] = _Gathered.apply(self, *self.weights)  # type: ignore[no-untyped-call]
            regather = self.group.regather
            if isinstance(regather, Regather) and self.with_grad:
                together = Together(self.gather, self.lane)
                for i, (whole, part) in enumerate(zip(wholes, self.weights, strict=True)):
                    regather.note(whole, part, partial(regather.from_last, together, i))
            self.waiting = {id(part): whole for part, whole in zip(self.weights, wholes, strict=True)}
        return self.waiting.pop(id(weight))

    def gather(self) -> list[torch.Tensor]:
        """All of them, whole, without a gradient."""
        with torch.no_grad():
            flat = torch.cat([weight.reshape(-1) for weight in self.weights])
            every = self.group.raw("all_gather", flat).view(self.axis.size, -1).split(self.sizes, 1)
            return [self._joined(piece, i) for i, piece in enumerate(every)]

    def scatter(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's parts of the gradients."""
        with torch.no_grad():
            flat = torch.cat([self._cut(grad, i) for i, grad in enumerate(grads)], 1)
            name = "reduce_scatter" if self.summed else "own_part"
            mine = self.group.raw(name, flat.view(-1)).split(self.sizes)
            return [part.view(weight.shape) for part, weight in zip(mine, self.weights, strict=True)]

    def _joined(self, piece: torch.Tensor, index: int) -> torch.Tensor:
        """``[ranks, elements of a part]`` -> the whole."""
        dim, shape = self.dims[index], list(self.weights[index].shape)
        whole = [*shape[:dim], shape[dim] * self.axis.size, *shape[dim + 1 :]]
        return piece.reshape(self.axis.size, *shape).movedim(0, dim).reshape(whole)

    def _cut(self, whole: torch.Tensor, index: int) -> torch.Tensor:
        """The inverse of ``_joined``."""
        dim, shape = self.dims[index], list(self.weights[index].shape)
        parts = whole.reshape([*shape[:dim], self.axis.size, *shape[dim:]]).movedim(dim, 0)
        return parts.reshape(self.axis.size, math.prod(shape))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pack: Pack, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.pack = pack
        return tuple(pack.gather())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.pack.scatter(grads)

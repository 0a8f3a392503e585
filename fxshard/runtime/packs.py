"""Weights that are stored in parts, gathered ahead: small ones together, each while the one before is computed with.

A collective has a price of its own, however little it moves. So weights that are small, and are gathered one after the
other, lie end to end in one tensor for it: a pack. When the first is asked for, all are gathered, and the others wait
for their turn. A large weight is a pack by itself.

    rank 0   a0 b0 c0        one all-gather        a0 b0 c0 a1 b1 c1   ->   a = a0 a1, b = b0 b1, c = c0 c1
    rank 1   a1 b1 c1             ->               a0 b0 c0 a1 b1 c1

And a collective takes time in which the rank could compute. So when a pack is asked for, the next one begins to be
gathered: in the forward pass the next in the program, in the backward pass the one that was saved before it. A pack's
gradients are reduce-scattered together, and the sums go to ``.grad`` when the next pack's are on their way.

All ranks run the same statements, so all of them begin the same collectives in the same order.

Reference: PyTorch FSDP (Zhao et al., 2023), sections 3.2.1 and 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fxshard.runtime.collectives import Axis, ProcessAxisGroup, joined
from fxshard.runtime.regather import Regather, Together
from fxshard.torch_internals import after_backward, backward_id, hooks_of, will_accumulate

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
        ahead: what is under way.
    """

    def __init__(
        self, axis: Axis, weights: Sequence[torch.Tensor], dims: Sequence[int], summed: bool, lane: int, ahead: Ahead
    ) -> None:
        assert isinstance(axis.group, ProcessAxisGroup)
        self.group, self.summed, self.lane, self.ahead = axis.group, summed, lane, ahead
        self.weights, self.dims = list(weights), list(dims)
        self.sizes = [weight.numel() for weight in weights]
        self.waiting: dict[int, torch.Tensor] = {}
        self.with_grad = False
        self.next: Pack | None = None

    def take(self, weight: torch.Tensor) -> torch.Tensor:
        """A whole weight, and with it the others, unless they were gathered with one of them before."""
        if self.with_grad != torch.is_grad_enabled() or id(weight) not in self.waiting:
            self.with_grad = torch.is_grad_enabled()
            self.begin()
            if self.next is not None:
                self.next.begin()
            wholes: Sequence[torch.Tensor] = _Gathered.apply(self, *self.weights)  # type: ignore[no-untyped-call]
            regather = self.group.regather
            if isinstance(regather, Regather) and self.with_grad:
                together = Together(self.gather, self.begin, self.lane if len(wholes) > 1 else None, regather.saved)
                for i, (whole, part) in enumerate(zip(wholes, self.weights, strict=True)):
                    regather.note(whole, part, partial(regather.from_last, together, i), together)
            self.waiting = {id(part): whole for part, whole in zip(self.weights, wholes, strict=True)}
        return self.waiting.pop(id(weight))

    def begin(self) -> None:
        """Begins to gather, unless that has begun."""
        if self not in self.ahead.begun:
            with torch.no_grad():
                parts = [weight.reshape(-1) for weight in self.weights]
                flat = torch.cat(parts) if len(parts) > 1 else self.weights[0]
                self.ahead.begun[self] = self.group.begin("all_gather", flat)

    def gather(self) -> list[torch.Tensor]:
        """All of them, whole, without a gradient."""
        self.begin()
        every = self.ahead.begun.pop(self)()
        with torch.no_grad():
            if len(self.weights) == 1:
                return [joined(every, self.group.size, self.dims[0])]
            pieces = every.view(self.group.size, -1).split(self.sizes, 1)
            return [self._joined(piece, i) for i, piece in enumerate(pieces)]

    def scatter(self, grads: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Begins to sum gradients; what it returns waits for this rank's parts."""
        with torch.no_grad():
            parts = [self._cut(grad, i) for i, grad in enumerate(grads)]
            flat = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).view(-1)
            if self.summed:
                wait = self.group.begin("reduce_scatter", flat)
            else:
                wait = partial(self.group.raw, "own_part", flat)

        def mine() -> list[torch.Tensor]:
            with torch.no_grad():
                summed = wait().split(self.sizes)
                return [part.view(weight.shape) for part, weight in zip(summed, self.weights, strict=True)]

        return mine

    def scattered(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's parts of the sums of gradients, which can be differentiated again."""
        name = "reduce_scatter" if self.summed else "own_part"
        parts = (self.group.run(name, "all_gather", self._cut(grad, i).reshape(-1)) for i, grad in enumerate(grads))
        return [part.view(weight.shape) for part, weight in zip(parts, self.weights, strict=True)]

    def _joined(self, piece: torch.Tensor, index: int) -> torch.Tensor:
        """``[ranks, elements of a part]`` -> the whole."""
        dim, shape = self.dims[index], list(self.weights[index].shape)
        whole = [*shape[:dim], shape[dim] * self.group.size, *shape[dim + 1 :]]
        return piece.reshape(self.group.size, *shape).movedim(0, dim).reshape(whole)

    def _cut(self, whole: torch.Tensor, index: int) -> torch.Tensor:
        """The inverse of ``_joined``."""
        dim, shape = self.dims[index], list(self.weights[index].shape)
        parts = whole.reshape([*shape[:dim], self.group.size, *shape[dim:]]).movedim(dim, 0)
        return parts.reshape(self.group.size, math.prod(shape))


class Ahead:
    """What is under way for the packs of one program: gathers that began ahead, and sums that are waited for late."""

    def __init__(self) -> None:
        self.begun: dict[Pack, Callable[[], torch.Tensor]] = {}
        self.sums: dict[int, tuple[Sequence[torch.Tensor], Callable[[], list[torch.Tensor]]]] = {}

    def add(self, weights: Sequence[torch.Tensor], wait: Callable[[], list[torch.Tensor]]) -> None:
        """Keeps the sums of a pack's gradients, and gives those before it to their weights, which are done by now."""
        task = backward_id()
        if task in self.sums:
            self._finish(task)
        else:
            after_backward(partial(self._finish, task))
        self.sums[task] = weights, wait

    def _finish(self, task: int) -> None:
        weights, wait = self.sums.pop(task)
        for weight, part in zip(weights, wait(), strict=True):
            if weight.requires_grad:
                weight.grad = part if weight.grad is None else weight.grad.add_(part)

    def drop(self) -> None:
        """Lets go of what calls and backward passes that failed, or went only part of the way, left behind."""
        if (self.begun or self.sums) and backward_id() < 0:
            left = [*self.begun.values(), *(wait for _, wait in self.sums.values())]
            self.begun.clear()
            self.sums.clear()
            for wait in left:
                wait()


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pack: Pack, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.pack = pack
        return tuple(pack.gather())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: at once, so that it can be differentiated once more
            return None, *ctx.pack.scattered(grads)
        return _scattered(ctx, *grads)


def _scattered(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    pack: Pack = ctx.pack
    wait = pack.scatter(grads)
    trained = [i for i, weight in enumerate(pack.weights) if weight.requires_grad]
    if any(hooks_of(pack.weights[i]) or not will_accumulate(ctx, i) for i in trained):
        return None, *wait()
    pack.ahead.add(pack.weights, wait)
    return (None,) * (1 + len(grads))

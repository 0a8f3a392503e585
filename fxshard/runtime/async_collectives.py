"""Collectives that are under way: they begin where what they move is made, and are waited for where it is read.

    begun = begin_all_gather(x, axis, dim=2)      the collective begins
    ...                                           what is computed here, it runs beside
    x = wait(begun)                               all_gather(x, axis, dim=2)

The backward pass goes the other way. Where the forward pass waited, the collective of the gradient begins; where the
forward pass began, it is waited for. So it runs beside the backward pass of what stands between the two.

Values and gradients are those of ``runtime.collectives``, which run at the beginning where nothing can run beside: on
ranks of ``fxshard.simulate``, under ``torch.compile`` (whose own passes move waits) and transforms of ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch

from fxshard.runtime.collectives import (
    Axis,
    Blocks,
    ProcessAxisGroup,
    all_gather,
    all_reduce,
    all_to_all,
    joined,
    put_in_place,
    reduce_scatter,
    stack_parts,
    stacked,
)
from fxshard.torch_internals import is_recorded, is_transformed, record

Arrive = Callable[[], torch.Tensor]


class Begun:
    """A collective that is under way.

    Args:
        arrive: waits for it.
    """

    __slots__ = ("arrive",)

    def __init__(self, arrive: Arrive) -> None:
        self.arrive = arrive


def wait(begun: Begun | torch.Tensor) -> torch.Tensor:
    """What the collective gives; that is there already where nothing can run beside."""
    return begun.arrive() if isinstance(begun, Begun) else begun


def begin_all_reduce(x: torch.Tensor, axis: Axis, inplace: bool = False) -> Begun | torch.Tensor:
    """Begins ``all_reduce(x, axis, inplace)``."""
    group = axis.group
    if not _runs_beside(group):
        return all_reduce(x, axis, inplace)
    if inplace and group.sums_in_place(x):
        arrive = group.begin("all_reduce", x.detach())  # behind autograd's back: the gradient of the sum is that of x
        return Begun(lambda: _itself(group.pass_back(x), arrive()))
    return _begin(group, _Way("all_reduce", "identity"), x)


def begin_all_gather(
    x: torch.Tensor, axis: Axis, summed: bool = False, dim: int = 0, blocks: Blocks = (1,)
) -> Begun | torch.Tensor:
    """Begins ``all_gather(x, axis, summed, dim, blocks)``."""
    group, backward = axis.group, "reduce_scatter" if summed else "own_part"
    if not _runs_beside(group):
        return all_gather(x, axis, summed, dim, blocks)
    if blocks == (1,):
        return _begin(group, _Way("all_gather", backward, dim), x)
    begun = _begin(group, _Way("all_gather", backward), x)
    return Begun(lambda: put_in_place(begun.arrive(), axis.size, dim, blocks))


def begin_reduce_scatter(x: torch.Tensor, axis: Axis, dim: int, blocks: Blocks = (1,)) -> Begun | torch.Tensor:
    """Begins ``reduce_scatter(x, axis, dim, blocks)``."""
    group = axis.group
    if not _runs_beside(group) or x.shape[dim] % axis.size:
        return reduce_scatter(x, axis, dim, blocks)
    if blocks == (1,):
        return _begin(group, _Way("reduce_scatter", "all_gather", dim), x)
    return _begin(group, _Way("reduce_scatter", "all_gather"), stack_parts(x, axis, dim, blocks, ()))


def begin_all_to_all(x: torch.Tensor, axis: Axis, source: int, target: int) -> Begun | torch.Tensor:
    """Begins ``all_to_all(x, axis, source, target)``."""
    group = axis.group
    if not _runs_beside(group) or x.shape[target] % axis.size:
        return all_to_all(x, axis, source, target)
    return _begin(group, _Way("all_to_all", "all_to_all", source, target), x)


def _itself(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return x


def _runs_beside(group: object) -> TypeGuard[ProcessAxisGroup]:
    """Whether a collective can be begun here, and waited for later."""
    return isinstance(group, ProcessAxisGroup) and not is_transformed()


@dataclass(frozen=True)
class _Way:
    """A collective and that of its gradient.

    Attributes:
        name: the collective.
        backward: that of the gradient.
        dim: the dim that it joins or cuts; of an all_to_all, the one that it joins.
        other: the dim that an all_to_all cuts.
    """

    name: str
    backward: str
    dim: int = 0
    other: int = 0

    def back(self) -> _Way:
        """The collective of the gradient."""
        return _Way(self.backward, self.name, *((self.other, self.dim) if self.name == "all_to_all" else (self.dim,)))


def _start(group: ProcessAxisGroup, way: _Way, x: torch.Tensor) -> Arrive:
    """Begins a collective without a gradient."""
    if way.name in ("identity", "own_part"):
        out = group.raw(way.name, x, dim=way.dim)
        return lambda: out
    if way.name == "all_reduce":
        return group.begin("all_reduce", x.clone(memory_format=torch.contiguous_format))
    if way.name == "reduce_scatter":
        return group.begin("reduce_scatter", stacked(x, group.size, way.dim))
    if way.name == "all_to_all":
        arrive = group.begin("all_to_all", stacked(x, group.size, way.other))
    else:
        arrive = group.begin("all_gather", x)
    return lambda: joined(arrive(), group.size, way.dim)


def _begin(group: ProcessAxisGroup, way: _Way, x: torch.Tensor) -> Begun:
    if not is_recorded(x):
        return Begun(_start(group, way, x))
    between = _Between(group, way)
    token: torch.Tensor = record(_Begin, x, between)
    return Begun(lambda: record(_Wait, token, between))


@dataclass(eq=False)
class _Between:
    """What the two ends of a collective share: the forward pass hands on from the first to the second, the backward
    pass from the second to the first.
    """

    group: ProcessAxisGroup
    way: _Way
    arrive: Arrive | None = None
    back: list[Arrive] = field(default_factory=list)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, between: _Between) -> torch.Tensor:
        ctx.between = between
        between.arrive = _start(between.group, between.way, x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.between.back.pop()(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, between: _Between) -> torch.Tensor:
        assert between.arrive is not None
        ctx.between = between
        out, between.arrive = between.arrive(), None
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        between: _Between = ctx.between
        way = between.way.back()
        if torch.is_grad_enabled():  # create_graph=True: at once, so that it can be differentiated once more
            out = _at_once(between.group, way, grad)
            between.back.append(lambda: out)
        else:
            between.back.append(_start(between.group, way, grad))
        return grad.new_empty(0), None


def _at_once(group: ProcessAxisGroup, way: _Way, x: torch.Tensor) -> torch.Tensor:
    if way.name != "all_to_all":
        return group.run(way.name, way.backward, x, dim=way.dim)
    return joined(group.run(way.name, way.backward, stacked(x, group.size, way.other)), group.size, way.dim)

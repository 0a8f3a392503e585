"""The collectives of a rank under ``torch.compile`` and ``torch.export``: operators that these know.

``runtime.collectives`` gives a rank's code its axes over process groups, whose calls a tracer cannot see into. Here the
same code gets axes whose groups issue the functional collectives of torch (``_c10d_functional``). So the forward and
the backward pass are one graph each, and the passes of inductor see what is communicated.

The gradient that torch gives ``all_reduce`` is another ``all_reduce``: too large by the number of ranks, where all of
them go on alike from the sum. Gradients here are those that the types imply, by the same pairs of names as in
``runtime.collectives``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fxshard.errors import DistributedError
from fxshard.runtime.collectives import ProcessAxisGroup, joined, stacked, sum_dtype
from fxshard.runtime.regather import Gathering
from fxshard.runtime.rounds import Joint

functional = torch.ops._c10d_functional


class TracedGroup:
    """A process group of torch.distributed along one mesh axis, by its name: see ``collectives.Group``.

    Args:
        group: the group as it communicates without a tracer.
    """

    def __init__(self, group: ProcessAxisGroup) -> None:
        self.name = group.group.group_name
        self.size, self.index = group.size, group.index
        self.reduce_dtype = group.reduce_dtype
        self.deferred: dict[Any, Any] = {}
        self.packed: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] = {}  # the compiler may pack
        self.regather: Gathering | None = None if group.regather is None else _GatheredAnew()

    def run(self, name: str, backward: str, x: torch.Tensor, inplace: bool = False, dim: int = 0) -> torch.Tensor:
        """See ``Group.run``; what may be done in place is for the compiler to find."""
        out: torch.Tensor = _Traced.apply(x, self, name, backward, dim)  # type: ignore[no-untyped-call]
        return out

    def joint(self, function: Joint, *inputs: torch.Tensor) -> torch.Tensor:
        """There is none: see ``compiling.obstacle``."""
        raise DistributedError("what the ranks compute together while tensors go round cannot be compiled")

    def raw(self, name: str, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Runs one collective without a gradient."""
        if name == "identity":
            return x.view_as(x)
        if name == "own_part":
            return x.chunk(self.size, dim)[self.index].contiguous()
        x, dtype = (stacked(x, self.size, dim) if name == "reduce_scatter" else x), x.dtype
        wide = x.to(sum_dtype(name, dtype, self.reduce_dtype)).contiguous()
        out: torch.Tensor = functional.wait_tensor(_ISSUE[name](self, wide)).to(dtype)
        return joined(out, self.size, dim) if name == "all_gather" else out


class _GatheredAnew:
    """Gathers weights in calls that are computed anew in the backward pass: so the partitioner does not save them."""

    def gather(self, gather: Callable[[], torch.Tensor], part: torch.Tensor) -> torch.Tensor:
        """See ``regather.Gathering``."""
        if torch.compiler.is_exporting():  # there is no backward pass
            return gather()
        whole: torch.Tensor = checkpoint(gather, use_reentrant=False)
        return whole


class _Traced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: TracedGroup, name: str, backward: str, dim: int) -> torch.Tensor:
        ctx.group, ctx.backward_name, ctx.dim = group, backward, dim
        return group.raw(name, x, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.group.raw(ctx.backward_name, grad, ctx.dim), None, None, None, None


_ISSUE: dict[str, Callable[[TracedGroup, torch.Tensor], torch.Tensor]] = {
    "all_reduce": lambda group, x: functional.all_reduce(x, "sum", group.name),
    "all_gather": lambda group, x: functional.all_gather_into_tensor(x, group.size, group.name),
    "reduce_scatter": lambda group, x: functional.reduce_scatter_tensor(x, "sum", group.size, group.name),
    "all_to_all": lambda group, x: functional.all_to_all_single(
        x, [x.shape[0] // group.size] * group.size, [x.shape[0] // group.size] * group.size, group.name
    ),
}


class VaryTogether(torch.autograd.Function):
    """Weights that every rank holds whole, as their readers see them: their gradients are summed by one all-reduce."""

    @staticmethod
    def forward(ctx: Any, group: TracedGroup, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The weights themselves."""
        ctx.group = group
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The sums of the gradients over the ranks."""
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        parts = ctx.group.raw("all_reduce", flat).split([grad.numel() for grad in grads])
        return (None, *(part.view(grad.shape) for part, grad in zip(parts, grads, strict=True)))

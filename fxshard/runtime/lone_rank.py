"""One rank without the others: collectives that give results of the right sizes, and note what they would have moved.

On the meta device that costs neither memory nor time, so what a rank does can be counted at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fxshard.mesh import Mesh
from fxshard.runtime.collectives import Axis, sum_dtype
from fxshard.runtime.regather import Gathering
from fxshard.runtime.rounds import Arrival, Joint, OnRank, Rotation


class Moved(NamedTuple):
    """A collective that a rank issued.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter, all_to_all, or rotate.
        axis: the mesh axis.
        num_bytes: of the full-size tensor along the axis; of a rotation, what is passed on.
    """

    kind: str
    axis: str
    num_bytes: int


class AloneGroup:
    """An axis's group of which only one rank is there."""

    def __init__(self, axis: str, size: int, index: int, dtype: torch.dtype | None, moved: list[Moved]) -> None:
        self.axis, self.size, self.index, self.reduce_dtype = axis, size, index, dtype
        self.moved = moved
        self.deferred: dict[tuple[int, tuple[str, ...]], Callable[[torch.Tensor], torch.Tensor]] = {}
        self.regather: Gathering | None = None
        self.packed: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def run(self, name: str, backward: str, x: torch.Tensor, inplace: bool = False, dim: int = 0) -> torch.Tensor:
        """See ``collectives.Group.run``."""
        out: torch.Tensor = _Alone.apply(x, self, name, backward, dim)  # type: ignore[no-untyped-call]
        return out

    def joint(self, function: Joint, *inputs: torch.Tensor) -> torch.Tensor:
        """See ``collectives.Group.joint``."""
        out: torch.Tensor = OnRank.apply(function, self.index, self.size, self._rotate, *inputs)  # type: ignore[no-untyped-call]
        return out

    def _rotate(self, rotation: Rotation) -> Arrival:
        self._note("rotate", sum(x.numel() * x.itemsize for x in rotation.tensors))
        came = [x.new_zeros(shape) for x, shape in zip(rotation.tensors, rotation.shapes, strict=True)]
        return lambda: came

    def _note(self, kind: str, num_bytes: int) -> None:
        self.moved.append(Moved(kind, self.axis, num_bytes))

    def raw(self, name: str, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The result of a collective to which all ranks brought what this one brings, but sums are its own."""
        if name == "own_part":
            return x.chunk(self.size, dim)[self.index]
        if name == "identity":
            return x
        out = x
        if name == "all_gather":
            out = torch.cat([x] * self.size, dim)
        elif name == "reduce_scatter":
            out = x.chunk(self.size, dim)[self.index]
        whole = out if name == "all_gather" else x
        self._note(name, whole.numel() * sum_dtype(name, x.dtype, self.reduce_dtype).itemsize)
        return out.clone()


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: AloneGroup, name: str, backward: str, dim: int) -> torch.Tensor:
        ctx.group, ctx.backward_name, ctx.dim = group, backward, dim
        return x.view_as(x) if name == "identity" else group.raw(name, x, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.group.raw(ctx.backward_name, grad, ctx.dim), None, None, None, None


def alone_axes(mesh: Mesh, rank: int, reduce_dtype: torch.dtype | None, moved: list[Moved]) -> dict[str, Axis]:
    """The axes of ``rank``, which has no other rank beside it; what it would communicate is added to ``moved``."""
    where = zip(mesh.names, mesh.sizes, mesh.coordinate(rank), strict=True)
    return {n: Axis(n, size, at, AloneGroup(n, size, at, reduce_dtype, moved)) for n, size, at in where}

"""What lowerings of norms and reductions are written with: statistics of a dim of which every rank holds a part.

A rank computes the statistics of its part, and the ranks share them: sums by an all-reduce, everything else by
gathering the parts' results and reducing those once more. All of it is small: a number for each row, not the rows.

    total = all_reduce(sum(x))                          equal on every rank, and its gradient too
    y     = x - vary(total / count)                     every rank uses it for its own part: gradients sum

Sums are divided by the count of the *whole* tensor, never are means of parts averaged: parts may differ in size. Half
precision is computed in float32, as ATen's own kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from fxshard.ir.info import Info, info_of, set_info, values_of
from fxshard.ir.paths import steps
from fxshard.lowerings.convert import emit
from fxshard.lowerings.writer import Writer, give_lengths
from fxshard.mesh import RankMesh
from fxshard.placement import Placement
from fxshard.runtime import collectives as run

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)

Lowered: TypeAlias = "fx.Node | tuple[fx.Node, ...]"
"""What a lowering gives for a call: a node, or one for each of its results."""


def replace(new: fx.Graph, node: fx.Node, out: Lowered) -> Lowered:
    """Puts what a lowering wrote in the place of its call."""
    info = info_of(node)
    if isinstance(out, fx.Node):
        out.meta = dict(node.meta)
    else:
        for made, value, placements in zip(out, values_of(node), info.outputs, strict=True):
            made.meta = {**node.meta, "val": value}
            set_info(made, Info((placements,), info.choices, info_of(made).differentiable))
    new.erase_node(node)
    return out


class Statistics(Writer):
    """Writes the nodes of one lowering; ``axes``: those that split the dims over which it reduces."""

    def __init__(self, new: fx.Graph, node: fx.Node, mesh: RankMesh, axes: Sequence[int]) -> None:
        super().__init__(new, node, mesh)
        self.axes = tuple(axes)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``x`` in another dtype."""
        return x if x.meta["val"].dtype == dtype else self(aten.to.dtype, x, dtype)

    def exact(self, x: fx.Node) -> fx.Node:
        """``x`` in the dtype in which ATen computes: half precision in single."""
        return self.cast(x, torch.float32) if x.meta["val"].dtype in HALF else x

    def total(self, x: fx.Node, dims: Sequence[int], axes: Sequence[int] | None = None) -> fx.Node:
        """The sum over dims, which stay, and over the ranks."""
        if dims:
            x = self(aten.sum.dim_IntList, x, list(dims), True)
        for axis in self.axes if axes is None else axes:
            x = self.collective(run.all_reduce, x, axis)
        return x

    def varied(self, x: fx.Node, axes: Sequence[int] | None = None) -> fx.Node:
        """``x``, which is equal on every rank, where each goes on to compute something else from it."""
        for axis in self.axes if axes is None else axes:
            x = self.collective(run.vary, x, axis)
        return x

    def moments(self, x: fx.Node, dims: Sequence[int], count: Any) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The mean, this rank's deviations from it, and the sum of all ranks' squared ones; the dims stay."""
        mean = self(aten.div.Tensor, self.total(x, dims), count)
        away = self(aten.sub.Tensor, x, self.varied(mean))
        return mean, away, self.total(self(aten.square.default, away), dims)

    def again(self, x: fx.Node, function: Any, *args: Any) -> fx.Node:
        """A reduction of the ranks' results of it; ``args``: what it is told behind the tensor."""
        for axis in self.axes:
            x = self(function, self.gathered(x, axis), *args)
        return x

    def placed(self, x: fx.Node, axis: int, placement: Placement) -> fx.Node:
        """``x`` as ``placement`` along one axis."""
        before = info_of(x).placements
        for step in steps(before, (*before[:axis], placement, *before[axis + 1 :]), self.mesh.sizes):
            x = emit(self.new, x, step, self.mesh, self.node)
            for made in (*x.all_input_nodes, x):  # of a gather there are two
                give_lengths(made, self.mesh)
        return x

"""Writes the nodes of a lowering: each knows its value when whole, and its placements, as every other node does."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxshard.ir.facts import recipe_on_parts, split_choice
from fxshard.ir.info import Info, info_of, is_float, parts_along, set_info, values_of
from fxshard.ir.origins import source_meta
from fxshard.mesh import RankMesh
from fxshard.placement import (
    PARTIAL,
    REPLICATE,
    VARYING,
    Placement,
    Placements,
    cut_of,
    is_partial,
    is_shard,
    lengths_of,
    local_shape,
    shard,
)
from fxshard.rules.lookup import is_constant
from fxshard.rules.recipe import At, operands_of, shape_of
from fxshard.runtime import collectives as run
from fxshard.runtime.row_groups import group_rows
from fxshard.torch_internals import OpOverload

aten = torch.ops.aten


class Writer:
    """Writes nodes before the call that they replace; each knows its value when whole, and its placements."""

    def __init__(self, new: fx.Graph, node: fx.Node, mesh: RankMesh) -> None:
        self.new, self.node, self.mesh = new, node, mesh

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Writes a call."""
        made = self.new.call_function(function, args, kwargs)
        made.meta = source_meta(self.node)
        if isinstance(function, OpOverload):
            values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            with torch.no_grad():
                made.meta["val"] = function(*values, **named)
            operands = operands_of(made)
            flows = not is_constant(function) and is_float(made.meta["val"])
            differentiable = flows and any(info_of(o).differentiable for o in operands)
            set_info(made, Info((self._placements(made, operands),), differentiable=differentiable))
        return made

    def _placements(self, made: fx.Node, operands: Sequence[fx.Node]) -> tuple[Placement, ...]:
        """What a written node is along every axis, by its operator's rule."""
        out: list[Placement] = []
        for axis, size in enumerate(self.mesh.sizes):
            now = [info_of(o).placements[axis] for o in operands]
            inputs = [(shape_of(o.meta["val"]), info_of(o).placements[:axis]) for o in operands]
            result = (shape_of(made.meta["val"]), tuple(out))
            recipe = recipe_on_parts(made, inputs, [result], self.mesh.sizes[:axis], now)
            found: Placement = PARTIAL if any(map(is_partial, now)) else REPLICATE
            for factor in recipe.factors if recipe is not None else ():
                for placement, at in zip(now, factor.inputs, strict=True):
                    cut = factor.cut_for(at, At.of(placement), size)
                    if cut is not None:
                        found = split_choice(factor, cut, [False] * len(now), frozenset(), 0).outputs[0]
            out.append(found)
        return tuple(out)

    def gathered(self, x: fx.Node, axis: int) -> fx.Node:
        """The ranks' results in a new first dim."""
        parts = self.collective(run.all_gather, x, axis)
        made = self(run.by_rank, parts, self.mesh.names[axis])
        made.meta["val"] = torch.stack([x.meta["val"]] * self.mesh.sizes[axis])
        placed = (shard(p.dim + 1, *cut_of(p)) if is_shard(p) else p for p in info_of(parts).placements)
        set_info(made, Info((tuple(placed),), differentiable=info_of(x).differentiable))
        return made

    def number(self, function: Any, *args: Any) -> fx.Node:
        """A number that depends on the rank: an offset, a local index."""
        made = call_number(self.new, function, args, self.node)
        set_info(made, Info(((REPLICATE,) * self.mesh.ndim,)))
        return made

    def count(self, x: fx.Node, dims: Sequence[int]) -> Any:
        """How many elements the whole of ``x`` has along ``dims``: a number, or a node that gives it."""
        out: Any = 1
        for dim in dims:
            size: Any = x.meta["val"].shape[dim]
            if not isinstance(size, int):
                parts = parts_along(info_of(x), 0, dim, self.mesh)
                size = self.calculated(operator.mul, self.number(aten.sym_size.int, x, dim), parts)
            out = self.calculated(operator.mul, out, size)
        return out

    def calculated(self, function: Any, a: Any, b: Any) -> Any:
        """Arithmetic of numbers, or of nodes that give them."""
        if function is operator.mul and 1 in (a, b):
            return b if a == 1 else a
        return self.number(function, a, b) if isinstance(a, fx.Node) or isinstance(b, fx.Node) else function(a, b)

    def range_of(self, axis: int, size: int, placement: Placement) -> tuple[Any, int]:
        """Where this rank's part begins of a dim of ``size`` that ``axis`` alone cuts, and its length."""
        lengths = lengths_of(size, placement, self.mesh.sizes[axis])
        if lengths:
            position = self.mesh.at[axis]
            return sum(lengths[:position]), lengths[position]
        return self.number(run.offset, self.mesh.names[axis], size), size // self.mesh.sizes[axis]

    def positions(self, length: Any, placed: Placements, *bounds: Any) -> fx.Node:
        """The positions ``0 .. length``, of which ``placed`` says what a rank has: from ``bounds`` to ``bounds``."""
        value = values_of(self.node)[0]
        function = aten.arange.start if len(bounds) > 1 else aten.arange.default
        made = call_like(self.new, function, bounds, self.node, device=value.device)
        made.meta["val"] = value.new_empty((length,), dtype=torch.int64)
        set_info(made, Info((placed,)))
        return made

    def held_elsewhere(self, local: fx.Node, axis: int, size: int, placement: Placement) -> fx.Node:
        """Which indices, counted within this rank's part, another rank holds.

        What is out of the whole range belongs to the first and the last rank, which have no such row and raise.
        """
        if lengths_of(size, placement, self.mesh.sizes[axis]):
            start, length = self.range_of(axis, size, placement)
            least: Any = -run.FAR if length and start == 0 else 0
            bound: Any = run.FAR if length and start + length == size else length
        else:
            least = self.number(run.least_index, self.mesh.names[axis])
            bound = self.number(run.index_bound, self.mesh.names[axis], size)
        low, high = self(aten.lt.Scalar, local, least), self(aten.ge.Scalar, local, bound)
        return self(aten.logical_or.default, low, high)

    def index_in(self, axis: int, size: int, placement: Placement, index: int) -> Any:
        """``index`` counted within this rank's part; -1 where another rank holds it."""
        if not lengths_of(size, placement, self.mesh.sizes[axis]):
            return self.number(run.local_index, index, self.mesh.names[axis], size)
        start, length = self.range_of(axis, size, placement)
        return index - start if start <= index < start + length else -1

    def summand(self, x: fx.Node, axis: int) -> fx.Node:
        """Says of ``x`` that the ranks' values sum, where no rule can tell: what is not a rank's is masked."""
        info = info_of(x)
        after = tuple(PARTIAL if a == axis else p for a, p in enumerate(info.placements))
        set_info(x, Info((after,), differentiable=info.differentiable))
        return x

    def collective(self, function: Any, x: fx.Node, axis: int) -> fx.Node:
        """A collective of ``x``, after which all ranks of the axis have the same."""
        made = self(function, x, self.mesh.names[axis])
        value = x.meta["val"]
        made.meta["val"] = torch.cat([value] * self.mesh.sizes[axis]) if function is run.all_gather else value
        made.meta["fxshard_reader"] = source_meta(self.node)
        equal = VARYING if function is run.vary else REPLICATE
        after = tuple(equal if a == axis else p for a, p in enumerate(info_of(x).placements))
        set_info(made, Info((after,), differentiable=info_of(x).differentiable))
        return made


def call_like(new: fx.Graph, function: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
    """Writes a call that stands for ``like``: with its value, placements and source."""
    made = new.call_function(function, args, kwargs)
    made.meta = dict(like.meta)
    return made


def call_number(new: fx.Graph, function: Any, args: tuple[Any, ...], beside: fx.Node) -> fx.Node:
    """Writes a call that gives a number, which every rank has, for a call beside it."""
    made = new.call_function(function, args)
    made.meta = {**source_meta(beside), "val": 0}
    return made


def give_lengths(node: fx.Node, mesh: RankMesh) -> None:
    """Where a conversion speaks of the shares of the ranks: in this rank's group those are so many elements."""
    if "lengths" not in node.kwargs or node.target is group_rows or isinstance(node.kwargs["lengths"], fx.Node):
        return
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axis = mesh.index(str(node.args[1]))
    before, after = info_of(source).placements, info_of(node).placements
    whole = shape_of(values_of(source)[0])

    def lengths(placements: Placements) -> tuple[int, ...]:
        cut = placements[axis]
        outer = local_shape(whole, placements[:axis], mesh.sizes[:axis], mesh.at[:axis])
        return lengths_of(outer[cut.dim], cut, mesh.sizes[axis])  # type: ignore[attr-defined]

    found: Any = lengths(before if is_shard(before[axis]) else after)
    if node.target is run.all_to_all:
        found = found, lengths(after)
    node.kwargs = {**node.kwargs, "lengths": found}

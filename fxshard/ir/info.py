"""All that the compiler knows of a node: one frozen ``Info`` under one key of ``node.meta``, touched here only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxshard.mesh import Mesh
from fxshard.placement import REPLICATE, Placement, Placements, is_shard, local_size
from fxshard.rules.recipe import is_list
from fxshard.torch_internals import Graph

_KEY = "fxshard"


@dataclass(frozen=True)
class Choice:
    """How one mesh axis runs one call.

    Attributes:
        kind: ``split`` over ``factor``; ``partial``: a sum passes through unreduced; ``whole``: every rank the same;
            ``vary``: every rank the same, of which it goes on to compute something else.
        inputs: what each tensor operand must be along the axis; None where it is not read.
        outputs: what each result is along the axis.
        factor: the name of the split factor.
        lowering: the local replacement that the split needs.
        reason: why, for ``explain``; e.g. ``model.embed.weight is split over v``.
    """

    kind: str
    inputs: tuple[Placement | None, ...]
    outputs: tuple[Placement, ...]
    factor: str | None = None
    lowering: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Info:
    """The placements of a node's results, and the choices that led to them.

    Attributes:
        outputs: for each tensor result (one for a node that is a tensor) a placement per mesh axis.
        choices: one per mesh axis; None where the axis runs the call whole on replicated operands.
        differentiable: whether a gradient may flow through the result.
        given: the placements that the plan asked for, on parameters and constraints; None leaves an axis open.
    """

    outputs: tuple[Placements, ...]
    choices: tuple[Choice | None, ...] = ()
    differentiable: bool = False
    given: tuple[Placement | None, ...] | None = None

    @property
    def placements(self) -> Placements:
        """The placements of the one result."""
        return self.outputs[0]


def info_of(node: fx.Node) -> Info:
    """What is known of ``node``; ``KeyError`` before ``propagate``."""
    found: Info = node.meta[_KEY]
    return found


def has_info(node: fx.Node) -> bool:
    """Whether anything is known of ``node`` yet."""
    return _KEY in node.meta


def set_info(node: fx.Node, info: Info) -> None:
    """Records what is known of ``node``."""
    node.meta[_KEY] = info


def values_of(node: fx.Node) -> tuple[Any, ...]:
    """The tensors that a node gives: one, or those of a list."""
    value: Any = node.meta.get("val")
    return tuple(value) if is_list(node) else (value,)


def is_float(value: Any) -> bool:
    """Whether a gradient may flow through values of this dtype."""
    return isinstance(value, torch.Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)


def parts_along(info: Info, index: int, dim: int, mesh: Mesh) -> int:
    """Over how many ranks dim ``dim`` of the ``index``-th result is cut."""
    out = 1
    for placement, size in zip(info.outputs[index], mesh.sizes, strict=True):
        if is_shard(placement) and placement.dim == dim:
            out *= size
    return out


def num_bytes(value: torch.Tensor) -> int:
    """The bytes of a whole value; symbolic sizes as in ``sizes_of``."""
    return math.prod(sizes_of(value)) * value.element_size()


def sizes_of(value: torch.Tensor) -> tuple[int, ...]:
    """The sizes of a whole value; for a symbolic one its hint, or 1 where nothing is known of it."""
    return tuple(dim if isinstance(dim, int) else int(dim.node.hint or 1) for dim in value.shape)


def placed_beside(placements: Placements, along: int | None) -> Placements:
    """The placements, as if the value were whole along the axis ``along``."""
    return tuple(REPLICATE if axis == along else placement for axis, placement in enumerate(placements))


def local_bytes(node: fx.Node, mesh: Mesh, along: int | None = None) -> int:
    """The bytes that the first rank holds of a node's result, as if it were whole along the axis ``along``."""
    size = num_bytes(values_of(node)[0])
    if has_info(node) and info_of(node).outputs:
        for placement, count in zip(placed_beside(info_of(node).placements, along), mesh.sizes, strict=True):
            size = local_size(size, placement, count, 0) if is_shard(placement) else size
    return size


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph; the nodes' meta dicts are copied, what they hold is shared."""
    new = Graph()
    result = new.graph_copy(graph, {})
    new.output(result).meta = dict(next(iter(reversed(graph.nodes))).meta)
    return new

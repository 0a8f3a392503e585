"""localize: what speaks of the whole tensor speaks of this rank's part.

In: a graph whose operands are what their readers need.   Out: the same graph, with local sizes.

    %v = view(%h, [4, 16, -1, 8])  Shard(2) over 2 ranks  ->  view(%h, [4, 16, 4, 8])
    %n = sym_size(%x, 0)           x: Shard(0)            ->  mul(sym_size(%x, 0), 2)     sizes stay global

Size arguments are written anew from the result's type, never adjusted in place. The lowerings that a split asked for
(vocabulary-parallel embedding, means, dropout) replace their call here.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from fxshard.ir.info import Info, info_of, parts_along, set_info, values_of
from fxshard.lowerings import split_attention, split_experts, split_losses, split_norms, split_reductions
from fxshard.lowerings.memory_order import as_drawn, as_on_one_device
from fxshard.lowerings.statistics import Lowered
from fxshard.lowerings.writer import Writer, call_like, call_number, give_lengths
from fxshard.mesh import Mesh, RankMesh
from fxshard.passes.propagate import METADATA
from fxshard.placement import (
    REPLICATE,
    Placements,
    cut_of,
    is_grouped,
    is_shard,
    local_shape,
)
from fxshard.rules.recipe import bind, operands_of, shape_of, signature_of
from fxshard.runtime import collectives as run
from fxshard.torch_internals import FloorDiv, Graph, OpOverload

aten = torch.ops.aten

SIZE_ARGUMENT: dict[Any, tuple[str, Any]] = {
    aten.view.default: ("size", aten.reshape.default),  # a part of a tensor is not always contiguous
    aten._unsafe_view.default: ("size", aten.reshape.default),
    aten.reshape.default: ("shape", aten.reshape.default),
    aten.expand.default: ("size", aten.expand.default),
    aten.broadcast_to.default: ("size", aten.broadcast_to.default),
    aten.flatten.using_ints: ("", aten.reshape.default),
    aten.unflatten.int: ("", aten.reshape.default),
    aten.ravel.default: ("", aten.reshape.default),
    aten.squeeze.default: ("", aten.reshape.default),
    aten.squeeze.dim: ("", aten.reshape.default),  # a dim whose part has size 1 stays
    aten.squeeze.dims: ("", aten.reshape.default),
}
"""Operators whose result's shape is an argument, or depends on one: (the argument, what to call instead)."""

_CUTS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split.sizes,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}


WITHOUT_EMPTY = frozenset({None, "groups", "mean", "causal", "heads", "experts", "picked"})
"""Lowerings of which a rank that has an empty part has nothing to run: they neither communicate nor draw."""


def localize(graph: fx.Graph, whole_mesh: Mesh, rank: int = 0, independent: bool = False) -> fx.Graph:
    """Rewrites sizes from global to ``rank``'s, and applies lowerings. See the module's text.

    Args:
        graph: whose operands are what their readers need; it is not changed.
        whole_mesh: the mesh.
        rank: whose sizes to write; it matters where parts are uneven.
        independent: what is dropped of a split value, each rank draws for itself.
    """
    mesh = whole_mesh.seen_by(rank)
    new = Graph()
    copies: dict[fx.Node, Any] = {}
    alike = as_on_one_device(graph)
    for node in graph.nodes:
        if node.target is operator.getitem and isinstance(copies[node.args[0]], tuple):
            copies[node] = copies[node.args[0]][node.args[1]]  # of a lowering that gives each result by itself
            copies[node]._rename(node.name)
            continue
        copy = new.node_copy(node, copies.__getitem__)
        copies[node] = copy
        if node.op != "call_function":
            continue
        if node.target in METADATA:
            copies[node] = _global_size(new, copy, mesh)
            continue
        give_lengths(copy, mesh)
        info = info_of(node)
        lowered: Lowered | None = None
        if any(info.choices):
            lowered = _nothing(new, copy, info, mesh) or _lower(new, copy, info, mesh, independent)
        if lowered is None:
            drawn = as_drawn(new, copy, [operand in alike for operand in operands_of(node)])
            lowered = None if drawn is copy else drawn
        if lowered is not None:
            copies[node] = lowered
            if copy.name == node.name:
                copy._rename(f"{node.name}_local")
            if isinstance(lowered, fx.Node):
                lowered._rename(node.name)  # the value keeps its name through all stages
        elif any(map(is_shard, (p for output in info.outputs for p in output))):
            _local_sizes(new, copy, info, mesh)
    return new


def _nothing(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh) -> fx.Node | None:
    """Where this rank has nothing of a factor its results are empty, or add nothing: there is nothing to compute.

    Operators differ in what they do with empty tensors; some refuse, or give another shape.
    """
    split = [(c, n, at) for c, n, at in zip(info.choices, mesh.sizes, mesh.at, strict=True) if c and c.kind == "split"]
    if any(c.lowering not in WITHOUT_EMPTY | {"share"} for c, _, _ in split) or node.target is operator.getitem:
        return None
    if all(cut_of(p).share(n, at) for c, n, at in split for p in (*c.inputs, *c.outputs) if p is not None):
        return None
    shapes = [local_sizes(value, placed, mesh) for value, placed in zip(values_of(node), info.outputs, strict=True)]
    if any(c.lowering == "share" for c, _, _ in split) and not any(0 in shape for shape in shapes):
        return None  # it adds its share of a bias
    results = []
    with new.inserting_before(node):
        for index, (value, placements) in enumerate(zip(values_of(node), info.outputs, strict=True)):
            shape: list[Any] = list(shapes[index])
            for dim, size in enumerate(value.shape):
                if not isinstance(size, int):
                    shape[dim] = _read_size(new, node, size, parts_along(info, index, dim, mesh), mesh)
                elif shape[dim] and any(is_grouped(p) and p.is_shard(dim) for p in placements):
                    shape[dim] = _read_rows(new, node, dim, placements)
            if None in shape:
                return None
            flows = () if info.differentiable else (False,)
            results.append(call_like(new, run.nothing, (operands_of(node), shape, value.dtype, *flows), node))
            results[-1].meta["val"] = value
            set_info(results[-1], Info((placements,), differentiable=info.differentiable))
        out = results[0] if isinstance(node.meta["val"], torch.Tensor) else call_like(new, tuple, (results,), node)
    new.erase_node(node)
    return out


def _read_size(new: fx.Graph, node: fx.Node, size: torch.SymInt, parts: int, mesh: Mesh) -> fx.Node | None:
    """A symbolic size, cut in ``parts``: read off an operand that has it too, or calculated from the inputs' sizes."""
    for operand in operands_of(node):
        for dim, other in enumerate(values_of(operand)[0].shape):
            alike = isinstance(other, torch.SymInt) and other.node.expr == size.node.expr
            if alike and parts_along(info_of(operand), 0, dim, mesh) == parts:
                return call_number(new, aten.sym_size.int, (operand, dim), node)
    whole = _calculated(new, node, size.node.expr)
    return whole if whole is None or parts == 1 else call_number(new, operator.floordiv, (whole, parts), node)


def _read_rows(new: fx.Graph, node: fx.Node, dim: int, placements: Placements) -> fx.Node | None:
    """How many rows this rank has, which lie in groups: read off an operand that has them too."""
    mine = next(p for p in placements if is_grouped(p) and p.is_shard(dim))
    for operand in operands_of(node):
        for placement in info_of(operand).placements:
            if is_grouped(placement) and cut_of(placement) == cut_of(mine):
                return call_number(new, aten.sym_size.int, (operand, placement.dim), node)  # type: ignore[attr-defined]
    return None


def _calculated(new: fx.Graph, node: fx.Node, expr: sympy.Expr) -> Any:
    """A whole size, from the sizes of the inputs, which every rank has whole; None where these do not say it."""
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol:
        for given in new.find_nodes(op="placeholder"):
            for dim, size in enumerate(shape_of(given.meta.get("val"))):
                if size == expr:
                    return call_number(new, aten.sym_size.int, (given, dim), node)
        return None
    terms, function = expr.args, _OF_SIZES.get(type(expr).__name__)
    if type(expr).__name__ == "ModularIndexing":
        first, divisor, modulus = terms
        terms, function = (FloorDiv(first, divisor), modulus), operator.mod
    elif function in (None, operator.add, operator.mul):
        above, below = expr.as_numer_denom()
        if below != 1:
            terms, function = (above, below), operator.floordiv
    if function is None:
        return None
    found = [_calculated(new, node, term) for term in terms]
    if None in found:
        return None
    return functools.reduce(lambda a, b: call_number(new, function, (a, b), node), found)


_OF_SIZES: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
}
"""What the expressions of dynamic sizes are made of, by the names of their classes."""


def local_sizes(value: Any, placements: Placements, mesh: RankMesh) -> tuple[Any, ...]:
    """The shape that this rank holds of a value; a symbolic size is never cut unevenly."""
    return local_shape(shape_of(value), placements, mesh.sizes, mesh.at)


def _global_size(new: fx.Graph, node: fx.Node, mesh: RankMesh) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    info = info_of(source)
    dims: Any = range(values_of(source)[0].dim()) if node.target is aten.sym_numel.default else [node.args[1]]
    if node.target is aten.sym_numel.default:
        return Writer(new, node, mesh).count(source, dims)  # type: ignore[no-any-return]
    parts = parts_along(info, 0, dims[0], mesh)
    return node if parts == 1 else call_number(new, operator.mul, (node, parts), node)


def _local_sizes(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh) -> None:
    if node.target in _CUTS:
        _local_cut(node, info, mesh)
        return
    entry = SIZE_ARGUMENT.get(node.target)
    if entry is None:
        return
    name, target = entry
    value = values_of(node)[0]
    asked = bind(node)[name] if name else [None] * value.dim()
    here = local_sizes(value, info.placements, mesh)
    sizes: list[Any] = []
    with new.inserting_before(node):
        for dim, size in enumerate(value.shape):
            parts = parts_along(info, 0, dim, mesh)
            given = asked[dim]
            if any(is_grouped(p) and p.is_shard(dim) for p in info.placements):
                sizes.append(-1)
            elif isinstance(size, int):
                sizes.append(here[dim])
            elif isinstance(given, fx.Node):
                sizes.append(given if parts == 1 else call_number(new, operator.floordiv, (given, parts), given))
            else:
                sizes.append(-1)
        for dim, size in enumerate(value.shape):
            if sizes[dim] == -1 and (sizes.count(-1) > 1 or 0 in sizes):  # no argument names it, nor does the rest
                if isinstance(size, int):
                    sizes[dim] = _read_rows(new, node, dim, info.placements) or -1
                else:
                    sizes[dim] = _read_size(new, node, size, parts_along(info, 0, dim, mesh), mesh) or -1
    node.target = target
    node.args, node.kwargs = (operands_of(node)[0], sizes), {}


def _local_cut(node: fx.Node, info: Info, mesh: RankMesh) -> None:
    """A cut along a split dim: each result holds its share of this rank's part."""
    arguments = bind(node)
    source, dim = arguments["input" if "input" in arguments else "self"], arguments["dim"]
    value = values_of(source)[0]
    dim %= value.dim()
    if parts_along(info, 0, dim, mesh) == 1:
        return
    if all(v.shape[dim] == value.shape[dim] for v in values_of(node)) and node.target is aten.slice.Tensor:
        node.args, node.kwargs = (source, dim, 0, torch.iinfo(torch.int64).max), {}
        return
    if node.target is aten.slice.Tensor and arguments["step"] != 1:
        node.args = (source, dim, arguments["start"], torch.iinfo(torch.int64).max, arguments["step"])
        node.kwargs = {}
        return
    if node.target in (aten.slice.Tensor, aten.narrow.default):
        start = arguments.get("start") or 0
        start = max(0, start + value.shape[dim] if start < 0 else start)
        length = values_of(node)[0].shape[dim]
        node.target = aten.slice.Tensor
        cuts = _along(info_of(source).placements, dim)
        begin, end = (
            local_shape((at,) * value.dim(), cuts, mesh.sizes, mesh.at)[dim] for at in (start, start + length)
        )
        node.args, node.kwargs = (source, dim, begin, end), {}
        return
    lengths = [local_sizes(v, p, mesh)[dim] for v, p in zip(values_of(node), info.outputs, strict=True)]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (source, lengths, dim), {}


def _along(placements: Placements, dim: int) -> Placements:
    """The placements of one dim, taken for itself."""
    return tuple(p if p.is_shard(dim) else REPLICATE for p in placements)


def _lower(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, independent: bool) -> Lowered | None:
    """Applies the lowerings of a node's choices; None where it has none."""
    names = {c.lowering for c in info.choices if c is not None and c.lowering}
    if not names:
        return None
    (name,) = names
    axes = [a for a, c in enumerate(info.choices) if c is not None and c.lowering]
    if independent and name in ("dropout", "attention"):
        return split_attention.draw_apart(new, node, info, mesh)
    return LOWERINGS[name](new, node, info, mesh, axes)


def _mean(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """Every rank's mean weighs by its share of the elements."""
    weight = 1.0
    for axis in axes:
        choice = info.choices[axis]
        assert choice is not None
        cut = next(cut_of(p) for p in choice.inputs if is_shard(p) and p is not None)
        weight *= cut.share(mesh.sizes[axis], mesh.at[axis]) / cut.pieces(mesh.sizes[axis])
    return call_like(new, aten.mul.Tensor, (node, weight), node)


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    assert isinstance(node.target, OpOverload)
    arguments = bind(node) | {name: value}
    later = signature_of(node.target).kwarg_only
    node.args = tuple(v for k, v in arguments.items() if k not in later)
    node.kwargs = {k: arguments[k] for k in arguments if k in later}


def _groups(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """Every rank has its share of the groups."""
    name = "num_groups" if node.target is aten.group_norm.default else "groups"
    value = values_of(node)[0]
    dim = 1 if name == "num_groups" else value.dim() - values_of(bind(node)["weight"])[0].dim() + 1  # no batch: 0
    here = local_shape(value.shape, _along(info.placements, dim), mesh.sizes, mesh.at)[dim]
    _set_argument(node, name, bind(node)[name] * here // value.shape[dim])
    return node


def _share(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """Where the contraction is split, every rank adds its share of what is added: the ranks' results sum."""
    ranks = math.prod(mesh.sizes[a] for a in axes)
    arguments = bind(node)
    if "beta" in arguments:
        _set_argument(node, "beta", arguments["beta"] / ranks)
        return node
    with new.inserting_before(node):
        bias = call_like(new, aten.mul.Tensor, (arguments["bias"], 1 / ranks), arguments["bias"])
    _set_argument(node, "bias", bias)
    return node


def _embedding(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """Vocabulary-parallel: ids of this rank's rows are looked up, the others give zeros; the ranks' results sum.

    Reference: Megatron-LM (Shoeybi et al., 2019), VocabParallelEmbedding.
    """
    arguments = bind(node)
    weight, ids, padding = arguments["weight"], arguments["indices"], arguments["padding_idx"]
    if len(axes) != 1:
        raise NotImplementedError("an embedding's vocabulary can be split over one mesh axis")
    rows = info_of(weight).placements[axes[0]]
    vocabulary = values_of(weight)[0].shape[0]
    with new.inserting_before(node):
        write = Writer(new, node, mesh)
        start, _ = write.range_of(axes[0], vocabulary, rows)
        local = write(aten.sub.Tensor, ids, start)
        outside = write.held_elsewhere(local, axes[0], vocabulary, rows)
        safe = write(aten.masked_fill.Scalar, local, outside, 0)
        if padding is not None and padding >= 0:
            padding = write.index_in(axes[0], vocabulary, rows, padding)
        column = write(aten.unsqueeze.default, outside, -1)
    node.args, node.kwargs = (weight, safe, *([padding] if padding is not None else [])), {}
    return call_like(new, aten.masked_fill.Scalar, (node, column, 0), node)


LOWERINGS: dict[str, Callable[[fx.Graph, fx.Node, Info, RankMesh, list[int]], Lowered]] = {
    "mean": _mean,
    "embedding": _embedding,
    "dropout": split_attention.dropout,
    "groups": _groups,
    "share": _share,
    "softmax": split_losses.softmax,
    "loss": split_losses.loss,
    "attention": split_attention.with_dropout,
    "causal": split_attention.causal,
    "heads": split_attention.heads,
    "ring": split_attention.ring,
    "norm": split_norms.norm,
    "reduction": split_reductions.reduction,
    "position": split_reductions.reduction,
    "extreme": split_reductions.reduction,
    "cumsum": split_reductions.cumsum,
    "experts": split_experts.experts,
    "picked": split_experts.pick,
    "added": split_experts.added,
}

"""Lowerings of dropout and attention, where a rank has a part of what is dropped, of the queries, or of their heads.

dropout(x, p)                 x: Shard(d)    every rank draws the whole mask, and keeps its part
attention(q, .., is_causal)   q: Shard(-2)   the mask says where this rank's queries stand
attention(q, .., enable_gqa)  q: Shard(-3)   fewer key heads than ranks: each takes those that its queries need
attention(q, k, v)            all: Shard(-2) keys and values go round the ranks
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxshard.ir.info import Info, info_of, set_info, values_of
from fxshard.ir.origins import source_meta
from fxshard.ir.paths import how
from fxshard.lowerings.memory_order import order_drawn
from fxshard.lowerings.writer import Writer, call_like, give_lengths
from fxshard.mesh import RankMesh
from fxshard.placement import REPLICATE, Placement, cut_of, is_shard, lengths_of, shard
from fxshard.rules.recipe import bind
from fxshard.runtime import collectives as run
from fxshard.runtime.ring import ring_attention

aten = torch.ops.aten
HEADS, QUERIES = -3, -2


def dropout(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """Every rank draws the whole mask, as one device would, and keeps its part: the results are the single device's."""
    arguments = bind(node)
    source, p = arguments["input"], arguments["p"]
    value = values_of(node)[0]
    with new.inserting_before(node):
        shape = _global_shape(Writer(new, node, mesh), source, value)
        mask = _mask_part(new, node, (source, shape, order_drawn(node), p), value, info, mesh, value.dim())
    result = call_like(new, aten.mul.Tensor, (source, mask), node)
    new.erase_node(node)  # it would draw once more
    return result


def _mask_part(
    new: fx.Graph, node: fx.Node, args: tuple[Any, ...], value: torch.Tensor, info: Info, mesh: RankMesh, dims: int
) -> fx.Node:
    """This rank's part of a whole dropout mask, which is like ``value``, along the first ``dims`` dims."""
    mask = call_like(new, run.dropout_mask, args, node)
    mask.meta["val"] = value
    set_info(mask, Info(((REPLICATE,) * mesh.ndim,)))
    now: list[Placement] = [REPLICATE] * mesh.ndim
    for axis, placement in enumerate(info.placements):
        if is_shard(placement) and placement.dim < dims:
            args = (mask, mesh.names[axis], placement.dim)
            now[axis] = placement
            mask = call_like(new, run.chunk, args, mask, **how(placement))
            set_info(mask, Info((tuple(now),)))
            give_lengths(mask, mesh)
    return mask


def draw_apart(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh) -> fx.Node:
    """The call as it stands, on this rank's part, with a random stream of this part's own."""
    split = [name for name, p in zip(mesh.names, info.placements, strict=True) if is_shard(p)]
    if any(choice is not None and choice.factor == "h" for choice in info.choices):
        node = heads(new, node, info, mesh, [])
    made = call_like(new, run.draw_apart, (str(node.target), list(node.args), dict(node.kwargs), *split), node)
    new.erase_node(node)
    return made


def with_dropout(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """Attention with dropout, written out, so that each rank drops what the one device would drop in its part."""
    arguments = bind(node)
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    whole, keys = values_of(query)[0].shape, values_of(key)[0].shape
    root = (arguments["scale"] or whole[-1] ** -0.5) ** 0.5

    def write(function: Any, *args: Any) -> fx.Node:  # not a Writer: nothing reads their types, of which there are many
        made = new.call_function(function, args)
        made.meta = source_meta(node)
        return made

    with new.inserting_before(node):
        if arguments["enable_gqa"] and whole[HEADS] != keys[HEADS]:
            key, value = (_for_queries(new, node, info, mesh, x) for x in (key, value))
        left = write(aten.mul.Tensor, query, root)
        right = write(aten.mul.Tensor, write(aten.transpose.int, key, -2, -1), root)
        scores = write(aten.matmul.default, left, right)
        masked = arguments["attn_mask"]
        if arguments["is_causal"]:
            ones = write(aten.ones_like.default, scores)
            masked = write(aten.to.dtype, write(aten.tril.default, ones), torch.bool)
        if masked is not None:
            boolean = arguments["is_causal"] or values_of(masked)[0].dtype == torch.bool
            if boolean:
                scores = write(aten.masked_fill.Scalar, scores, write(aten.logical_not.default, masked), float("-inf"))
            else:
                scores = write(aten.add.Tensor, scores, masked)
        weights = write(aten._safe_softmax.default, scores, -1)
        shape = _global_shape(Writer(new, node, mesh), query, values_of(node)[0])
        shape[-1] = keys[-2] if isinstance(keys[-2], int) else write(aten.sym_size.int, key, -2)
        lead = values_of(node)[0].dim() - 1
        told = query, shape, None, arguments["dropout_p"]
        drawn = values_of(query)[0].new_empty((*values_of(node)[0].shape[:-1], keys[-2]))
        mask = _mask_part(new, node, told, drawn, info, mesh, lead)
        kept = write(aten.mul.Tensor, weights, mask)
    result = call_like(new, aten.matmul.default, (kept, value), node)
    new.erase_node(node)
    return result


def causal(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """Causal attention of this rank's queries: of what the mask of the whole would say, its rows."""
    arguments = bind(node)
    query, keys = arguments["query"], values_of(arguments["key"])[0]
    length = values_of(query)[0].shape[QUERIES]
    with new.inserting_before(node):
        write = Writer(new, node, mesh)
        start, count = write.range_of(axes[0], length, info.placements[axes[0]])
        cut = shard(0, *cut_of(info.placements[axes[0]]))
        placed = tuple(cut if axis == axes[0] else REPLICATE for axis in range(mesh.ndim))
        rows = write.positions(length, placed, start, write.calculated(operator.add, start, count))
        columns = write.positions(keys.shape[QUERIES], (REPLICATE,) * mesh.ndim, keys.shape[QUERIES])
        mask = write(aten.le.Tensor, columns, write(aten.unsqueeze.default, rows, -1))
    arguments |= {"attn_mask": mask, "is_causal": False}
    return _with(node, arguments)


def ring(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """Attention of this rank's queries, while keys and values go round the ranks."""
    (axis,) = axes
    arguments = bind(node)
    length = values_of(node)[0].shape[QUERIES]
    lengths = lengths_of(length, info.placements[axis], mesh.sizes[axis]) if isinstance(length, int) else ()
    told = {"mask": arguments["attn_mask"], "is_causal": arguments["is_causal"], "scale": arguments["scale"]}
    told["lengths"] = lengths
    args = (arguments["query"], arguments["key"], arguments["value"], mesh.names[axis])
    made = call_like(new, ring_attention, args, node, **{k: v for k, v in told.items() if v not in (None, False, ())})
    new.erase_node(node)
    return made


def heads(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """Attention of this rank's query heads, of which several share a key head that every rank holds."""
    arguments = bind(node)
    with new.inserting_before(node):
        for name in ("key", "value"):
            arguments[name] = _for_queries(new, node, info, mesh, arguments[name])
    return _with(node, arguments | {"enable_gqa": False})


def _for_queries(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, x: fx.Node) -> fx.Node:
    """Keys or values, once for each query head of this rank."""
    write = Writer(new, node, mesh)
    queries, keys = values_of(node)[0].shape[HEADS], values_of(x)[0].shape[HEADS]
    x = write(aten.repeat_interleave.self_int, x, queries // keys, HEADS)
    for axis, choice in enumerate(info.choices):
        if choice is not None and choice.factor == "h":
            start, count = write.range_of(axis, queries, info.placements[axis])
            before = info_of(x)
            after = (*before.placements[:axis], info.placements[axis], *before.placements[axis + 1 :])
            x = call_like(new, aten.slice.Tensor, (x, HEADS, start, write.calculated(operator.add, start, count)), x)
            set_info(x, Info((after,), differentiable=before.differentiable))
    return x


def _with(node: fx.Node, arguments: dict[str, Any]) -> fx.Node:
    positional = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    node.args = tuple(arguments[name] for name in positional)
    node.kwargs = {name: arguments[name] for name in ("scale", "enable_gqa")}
    return node


def _global_shape(write: Writer, source: fx.Node, value: torch.Tensor) -> list[Any]:
    """The whole shape of ``value``, whose symbolic sizes ``source`` has too."""
    return [size if isinstance(size, int) else write.count(source, [dim]) for dim, size in enumerate(value.shape)]

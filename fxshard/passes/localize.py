"""localize: what speaks of the whole tensor speaks of this rank's part.

In: a graph whose operands are what their readers need.   Out: the same graph, with local sizes.

    %v = view(%h, [4, 16, -1, 8])  Shard(2) over 2 ranks  ->  view(%h, [4, 16, 4, 8])
    %n = sym_size(%x, 0)           x: Shard(0)            ->  mul(sym_size(%x, 0), 2)     sizes stay global

Size arguments are written anew from the result's type, never adjusted in place. The lowerings that a split asked for
(vocabulary-parallel embedding, means, dropout) replace their call here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxshard.mesh import Mesh
from fxshard.passes import losses
from fxshard.passes.propagate import METADATA
from fxshard.passes.typing import Info, info_of, set_info, values_of
from fxshard.passes.writer import Writer
from fxshard.placement import REPLICATE, Placement, blocks_of, is_shard
from fxshard.rules.recipe import bind, operands_of, signature_of
from fxshard.runtime import collectives as run

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


def localize(graph: fx.Graph, mesh: Mesh) -> fx.Graph:
    """Rewrites sizes from global to local, and applies lowerings. See the module's text."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copy = new.node_copy(node, copies.__getitem__)
        copies[node] = copy
        if node.op != "call_function":
            continue
        if node.target in METADATA:
            copies[node] = _global_size(new, copy, mesh)
            continue
        info = info_of(node)
        if not any(info.choices):
            continue
        lowered = _lower(new, copy, info, mesh)
        if lowered is not None:
            copies[node] = lowered
            if copy.name == node.name:
                copy._rename(f"{node.name}_local")
            lowered._rename(node.name)  # the value keeps its name through all stages
        elif any(map(is_shard, (p for output in info.outputs for p in output))):
            _local_sizes(new, copy, info, mesh)
    return new


def parts_along(info: Info, index: int, dim: int, mesh: Mesh) -> int:
    """Over how many ranks dim ``dim`` of the ``index``-th result is cut."""
    out = 1
    for placement, size in zip(info.outputs[index], mesh.sizes, strict=True):
        if is_shard(placement) and placement.dim == dim:  # type: ignore[attr-defined]
            out *= size
    return out


def _global_size(new: fx.Graph, node: fx.Node, mesh: Mesh) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    info = info_of(source)
    dims = range(len(values_of(source)[0].shape)) if node.target is aten.sym_numel.default else [node.args[1]]
    parts = 1
    for dim in dims:
        parts *= parts_along(info, 0, int(dim), mesh)  # type: ignore[arg-type]
    return node if parts == 1 else _call(new, operator.mul, (node, parts), node)


def _call(new: fx.Graph, function: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
    made = new.call_function(function, args, kwargs)
    made.meta = dict(like.meta)
    return made


def _local_sizes(new: fx.Graph, node: fx.Node, info: Info, mesh: Mesh) -> None:
    if node.target in _CUTS:
        _local_cut(node, info, mesh)
        return
    entry = SIZE_ARGUMENT.get(node.target)
    if entry is None:
        return
    name, target = entry
    value = values_of(node)[0]
    asked = bind(node)[name] if name else [None] * value.dim()
    sizes: list[Any] = []
    with new.inserting_before(node):
        for dim, size in enumerate(value.shape):
            parts = parts_along(info, 0, dim, mesh)
            given = asked[dim]
            if isinstance(size, int):
                sizes.append(size // parts)
            elif isinstance(given, fx.Node):
                sizes.append(given if parts == 1 else _call(new, operator.floordiv, (given, parts), given))
            else:
                sizes.append(-1)
        if sizes.count(-1) > 1:
            sizes = _sizes_from_operand(new, node, sizes)
    node.target = target
    node.args, node.kwargs = (operands_of(node)[0], sizes), {}


def _sizes_from_operand(new: fx.Graph, node: fx.Node, sizes: list[Any]) -> list[Any]:
    """Symbolic sizes that no argument names are read off the operand's dim with the same size."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = values_of(source)[0].shape
    value = values_of(node)[0].shape
    out = list(sizes)
    for dim, size in enumerate(sizes):
        same = [i for i, s in enumerate(shape) if isinstance(s, torch.SymInt) and s.node.expr == value[dim].node.expr]
        if size == -1 and same and out.count(-1) > 1:
            out[dim] = new.call_function(aten.sym_size.int, (source, same[0]))
    return out


def _local_cut(node: fx.Node, info: Info, mesh: Mesh) -> None:
    """A cut along a split dim: each result holds its share of this rank's part."""
    arguments = bind(node)
    source, dim = arguments["input" if "input" in arguments else "self"], arguments["dim"]
    value = values_of(source)[0]
    dim %= value.dim()
    parts = parts_along(info, 0, dim, mesh)
    if parts == 1:
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
        node.args, node.kwargs = (source, dim, start // parts, (start + length) // parts), {}
        return
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (source, [v.shape[dim] // parts for v in values_of(node)], dim), {}


def _lower(new: fx.Graph, node: fx.Node, info: Info, mesh: Mesh) -> fx.Node | None:
    """Applies the lowerings of a node's choices; None where it has none."""
    names = {c.lowering for c in info.choices if c is not None and c.lowering}
    if not names:
        return None
    (name,) = names
    axes = [a for a, c in enumerate(info.choices) if c is not None and c.lowering]
    return LOWERINGS[name](new, node, info, mesh, axes)


def _mean(new: fx.Graph, node: fx.Node, info: Info, mesh: Mesh, axes: list[int]) -> fx.Node:
    """Every rank's mean weighs by its share of the elements; shares are equal."""
    share = 1.0
    for axis in axes:
        share /= mesh.sizes[axis]
    return _call(new, aten.mul.Tensor, (node, share), node)


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = bind(node) | {name: value}
    later = signature_of(node.target).kwarg_only
    node.args = tuple(v for k, v in arguments.items() if k not in later)
    node.kwargs = {k: arguments[k] for k in arguments if k in later}


def _groups(new: fx.Graph, node: fx.Node, info: Info, mesh: Mesh, axes: list[int]) -> fx.Node:
    """Every rank has its share of the groups."""
    name = "num_groups" if node.target is aten.group_norm.default else "groups"
    _set_argument(node, name, bind(node)[name] // math.prod(mesh.sizes[a] for a in axes))
    return node


def _share(new: fx.Graph, node: fx.Node, info: Info, mesh: Mesh, axes: list[int]) -> fx.Node:
    """Where the contraction is split, every rank adds its share of what is added: the ranks' results sum."""
    ranks = math.prod(mesh.sizes[a] for a in axes)
    arguments = bind(node)
    if "beta" in arguments:
        _set_argument(node, "beta", arguments["beta"] / ranks)
        return node
    with new.inserting_before(node):
        bias = _call(new, aten.mul.Tensor, (arguments["bias"], 1 / ranks), arguments["bias"])
    _set_argument(node, "bias", bias)
    return node


def _embedding(new: fx.Graph, node: fx.Node, info: Info, mesh: Mesh, axes: list[int]) -> fx.Node:
    """Vocabulary-parallel: ids of this rank's rows are looked up, the others give zeros; the ranks' results sum.

    Reference: Megatron-LM (Shoeybi et al., 2019), VocabParallelEmbedding.
    """
    arguments = bind(node)
    weight, ids, padding = arguments["weight"], arguments["indices"], arguments["padding_idx"]
    if len(axes) != 1:
        raise NotImplementedError("an embedding's vocabulary can be split over one mesh axis")
    axis, size = mesh.names[axes[0]], mesh.sizes[axes[0]]
    vocabulary = values_of(weight)[0].shape[0]
    with new.inserting_before(node):
        write = Writer(new, node, mesh)
        local = write(aten.sub.Tensor, ids, write.number(run.offset, axis, vocabulary))
        low, high = write(aten.lt.Scalar, local, 0), write(aten.ge.Scalar, local, vocabulary // size)
        outside = write(aten.logical_or.default, low, high)
        safe = write(aten.masked_fill.Scalar, local, outside, 0)
        if padding is not None and padding >= 0:
            padding = write.number(run.local_index, padding, axis, vocabulary)
        column = write(aten.unsqueeze.default, outside, -1)
    node.args, node.kwargs = (weight, safe, *([padding] if padding is not None else [])), {}
    return _call(new, aten.masked_fill.Scalar, (node, column, 0), node)


def _dropout(new: fx.Graph, node: fx.Node, info: Info, mesh: Mesh, axes: list[int]) -> fx.Node:
    """Every rank draws the whole mask, as one device would, and keeps its part: the results are the single device's."""
    arguments = bind(node)
    source, p = arguments["input"], arguments["p"]
    value = values_of(node)[0]
    with new.inserting_before(node):
        shape, strides = _global_layout(new, source, value, info, mesh)
        mask = _mask_part(new, node, (source, shape, strides, p), info, mesh, value.dim())
    result = _call(new, aten.mul.Tensor, (source, mask), node)
    new.erase_node(node)  # it would draw once more
    return result


def _mask_part(new: fx.Graph, node: fx.Node, args: tuple[Any, ...], info: Info, mesh: Mesh, dims: int) -> fx.Node:
    """This rank's part of a whole dropout mask, along the first ``dims`` dims."""
    mask = _call(new, run.dropout_mask, args, node)
    set_info(mask, Info(((REPLICATE,) * mesh.ndim,)))
    now: list[Placement] = [REPLICATE] * mesh.ndim
    for axis, placement in enumerate(info.placements):
        if is_shard(placement) and placement.dim < dims:  # type: ignore[attr-defined]
            blocks = blocks_of(placement)
            args = (mask, mesh.names[axis], placement.dim, *([blocks] if blocks != (1,) else []))  # type: ignore[attr-defined]
            mask = _call(new, run.chunk, args, node)
            now[axis] = placement
            set_info(mask, Info((tuple(now),)))
    return mask


def _attention(new: fx.Graph, node: fx.Node, info: Info, mesh: Mesh, axes: list[int]) -> fx.Node:
    """Attention with dropout, written out, so that each rank drops what the one device would drop in its part."""
    arguments = bind(node)
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    whole, keys = values_of(query)[0].shape, values_of(key)[0].shape
    root = (arguments["scale"] or whole[-1] ** -0.5) ** 0.5

    def write(function: Any, *args: Any) -> fx.Node:  # not a Writer: nothing reads their types, of which there are many
        made = new.call_function(function, args)
        made.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        return made

    with new.inserting_before(node):
        if arguments["enable_gqa"] and whole[-3] != keys[-3]:
            repeats = whole[-3] // keys[-3]
            key, value = (write(aten.repeat_interleave.self_int, x, repeats, -3) for x in (key, value))
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
        shape, _ = _global_layout(new, query, values_of(node)[0], info, mesh)
        shape[-1] = keys[-2] if isinstance(keys[-2], int) else write(aten.sym_size.int, key, -2)
        lead = values_of(node)[0].dim() - 1
        mask = _mask_part(new, node, (query, shape, None, arguments["dropout_p"]), info, mesh, lead)
        kept = write(aten.mul.Tensor, weights, mask)
    result = _call(new, aten.matmul.default, (kept, value), node)
    new.erase_node(node)
    return result


def _global_layout(
    new: fx.Graph, source: fx.Node, value: torch.Tensor, info: Info, mesh: Mesh
) -> tuple[list[Any], list[int] | None]:
    shape: list[Any] = list(value.shape)
    for dim, size in enumerate(shape):
        if not isinstance(size, int):
            local = new.call_function(aten.sym_size.int, (source, dim))
            parts = parts_along(info, 0, dim, mesh)
            shape[dim] = local if parts == 1 else new.call_function(operator.mul, (local, parts))
    contiguous = all(isinstance(s, int) for s in value.shape) and not value.is_contiguous()
    return shape, list(value.stride()) if contiguous else None


LOWERINGS: dict[str, Callable[[fx.Graph, fx.Node, Info, Mesh, list[int]], fx.Node]] = {
    "mean": _mean,
    "embedding": _embedding,
    "dropout": _dropout,
    "groups": _groups,
    "share": _share,
    "softmax": losses.softmax,
    "loss": losses.loss,
    "attention": _attention,
}

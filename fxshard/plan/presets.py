"""What the presets ask for, once the graph is known: names and placements like those that a user writes."""

from __future__ import annotations

import math

import torch
from torch import fx

from fxshard.errors import PlanError
from fxshard.placement import (
    REPLICATE,
    Placement,
    Replicate,
    Shard,
    chunk_shares,
    cut_of,
    shard,
)
from fxshard.plan.detect import residuals
from fxshard.plan.experts import find_experts
from fxshard.plan.graph import is_parameter, shapes_of
from fxshard.plan.sequence import HEADS, POSITIONS, SEQUENCE, Attention, attentions, sequences
from fxshard.plan.work import Work, divides_by, fitting


def _data_parallel(work: Work, axis: str) -> None:
    shapes = {
        name: shapes_of(node)[0]
        for name, node in work.names.inputs.items()
        if isinstance(node.meta.get("val"), torch.Tensor) and shapes_of(node)[0]
    }
    if not shapes:
        work.problems.append(PlanError("data_parallel: the model has no tensor input with a batch dim"))
        return
    batch = next(iter(shapes.values()))[0]
    for name, shape in shapes.items():
        node = work.names.inputs[name]
        if shape[0] == batch and work.free(node, axis):
            work.put("inputs", name, node, axis, Shard(0), "data_parallel")


def _tensor_parallel(work: Work, axis: str) -> None:
    size = work.mesh.size(axis)
    if size == 1:
        return
    by_node = {node: name for name, node in reversed(list(work.names.params.items()))}
    split = work.split(size)
    found = split.weights
    work.without_rule |= dict.fromkeys(node.name for node in split.without_rule)
    if not any(work.free(n, axis) for n in found) and not any(axis in e for e in work.nodes.values()):
        work.notes.append(f"tensor_parallel found no weight that axis {axis!r} (size {size}) could split")
    for name, node in work.names.params.items():
        if node in found and by_node[node] == name:
            work.offer("params", name, node, axis, found[node], "tensor_parallel")
    returned = {nodes[0]: path for path, nodes in work.names.modules.items() if len(nodes) == 1}
    for node, (weight, _) in split.alone.items():
        if isinstance(work.nodes.get(weight, {}).get(axis), Shard) and work.free(node, axis):
            work.put("activations", returned.get(node, f"%{node.name}"), node, axis, Replicate(), "tensor_parallel")


def _sequence_parallel(work: Work, axis: str) -> None:
    if work.mesh.size(axis) > 1:
        _split_streams(work, axis, "sequence_parallel", "it is tensor_parallel here")


def _split_streams(work: Work, axis: str, preset: str, instead: str = "nothing is split") -> None:
    """Splits what the results of rows are added to along the sequence."""
    rows = [pair.row for pair in work.split(work.mesh.size(axis)).pairs]
    streams = residuals(work.facts, rows)
    if not streams and (rows or preset != "sequence_parallel"):
        work.notes.append(
            f"{preset} found no residual stream to split on axis {axis!r}: no value is added to what a row "
            f"weight gives, or a norm stands between; {instead}"
        )
    for node in streams:
        shape = shapes_of(node)[0]
        if len(shape) >= 3:
            work.offer(*work.named(node), node, axis, Shard(SEQUENCE), preset)


def _context_parallel(work: Work, axis: str) -> None:
    size = work.mesh.size(axis)
    if size == 1:
        return
    found = sequences(work.facts, work.names.inputs)
    for name, node in found.items():
        work.offer("inputs", name, node, axis, Shard(SEQUENCE), "context_parallel")
    if not found:  # the sequence is made within: of the patches of an image
        _split_streams(work, axis, "context_parallel")
    inner = work.mesh.names[work.mesh.index(axis) + 1 :]
    split = {name for entry in work.nodes.values() for name, p in entry.items() if isinstance(p, Shard)}
    blocks = (1,) * math.prod(work.mesh.size(name) for name in inner if name in split)
    for each in attentions(work.facts) if axis not in work.ring else ():
        _exchange(work, axis, each, blocks)


def _exchange(work: Work, axis: str, each: Attention, blocks: tuple[int, ...]) -> None:
    """Positions for heads, around one attention; ``blocks``: the heads' parts on the axes inside."""
    size, parts = work.mesh.size(axis), len(blocks)
    dims = [len(shapes_of(x)[0]) for x in (each.query, *each.shared)]
    shares = () if each.key_heads % (parts * size) == 0 or parts > 1 else chunk_shares(each.key_heads, size)
    if each.key_heads % (parts * size) == 0 or (shares and 0 not in shares):
        keys: list[Placement] = [shard(dim + HEADS, blocks, shares) for dim in dims[1:]]
    elif each.heads % (parts * size) == 0:
        keys, shares = [REPLICATE, REPLICATE], ()
    else:
        work.notes.append(
            f"context_parallel gathers the keys and values of %{each.node.name} on axis {axis!r}: its {each.heads} "
            f"heads do not divide by {parts * size}"
        )
        return
    places = [shard(dims[0] + HEADS, blocks, shares), *keys]
    for node, placement in zip((each.query, *each.shared), places, strict=True):
        if work.free(node, axis):
            work.put(*work.named(node), node, axis, placement, "context_parallel")
    back = Shard(len(shapes_of(each.node)[0]) + POSITIONS)
    work.offer("activations", f"%{each.node.name}", each.node, axis, back, "context_parallel")


SMALL = 1 / 50
"""What part of a rank's share of all parameters may lie in parameters that every rank holds whole."""


def _zero(work: Work, axis: str) -> None:
    """Every parameter in parts, but for the smallest: what they are in all is little beside a rank's share."""
    size = work.mesh.size(axis)
    if size == 1:
        return
    free = {node: name for name, node in reversed(list(work.names.params.items())) if is_parameter(node)}
    free = {node: name for node, name in reversed(list(free.items())) if work.free(node, axis)}
    left = SMALL * sum(node.meta["val"].nbytes for node in free) / size
    small = set()
    for node in sorted(free, key=lambda each: each.meta["val"].nbytes):
        left -= node.meta["val"].nbytes
        if left < 0:
            break
        small.add(node)
    for node, name in free.items():
        placement = None if node in small else _stored(work, node, axis)
        if placement is not None:
            work.put("params", name, node, axis, placement, "zero")
        elif node not in small:
            work.notes.append(f"zero leaves {name} whole on axis {axis!r}: no dim of it can be cut")
    work.use("*", {axis: REPLICATE})


def _stored(work: Work, node: fx.Node, axis: str) -> Shard | None:
    """How a parameter is cut to be stored: best along dim 0, whose parts need not be put together when gathered.

    Where an inner axis cuts that dim too, it is cut in blocks so fine that the parts can be gathered within its.
    """
    size, shape = work.mesh.size(axis), shapes_of(node)[0]
    found: list[tuple[bool, int, Shard]] = []
    others = [work.beside(work.nodes.get(node, {}), axis, dim) for dim in range(len(shape))]
    for dim, beside in enumerate(others):
        if any(cut.shares for cut, _ in beside.inner + beside.outer):
            continue
        blocks = math.prod(sum(cut.blocks) * ranks for cut, ranks in beside.inner)
        within = math.prod(sum(cut.blocks) for cut, _ in beside.inner)
        placement = shard(dim, (1,) * blocks)
        if divides_by(shape[dim], (*beside.outer, (cut_of(placement), size), *beside.inner)):
            found.append((dim > 0 or within > 1, dim, placement))
    if found:
        return min(found, key=lambda each: each[:2])[2]
    uncut = [
        dim for dim in range(len(shape)) if shape[dim] and not any(work.beside(work.nodes.get(node, {}), axis, dim))
    ]
    return fitting(shape[uncut[0]], uncut[0], Shard(uncut[0]), size) if uncut else None


def _expert_parallel(work: Work, axis: str) -> None:
    size = work.mesh.size(axis)
    if size == 1:
        return
    found = find_experts(work.facts, size)
    if not found:
        work.notes.append(f"expert_parallel found no weights of experts that axis {axis!r} (size {size}) could split")
    for name, node in work.names.params.items():
        if node in found and str(node.target) == name:
            work.offer("params", name, node, axis, found[node], "expert_parallel")


PRESETS = {
    "data_parallel": _data_parallel,
    "expert_parallel": _expert_parallel,
    "tensor_parallel": _tensor_parallel,
    "sequence_parallel": _sequence_parallel,
    "context_parallel": _context_parallel,
    "zero": _zero,
}
"""In the order in which they are resolved: the later ones see what the earlier ones have placed."""

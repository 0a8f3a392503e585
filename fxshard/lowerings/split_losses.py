"""Lowerings of losses and softmax: what a rank runs where their rows, or the dim that they normalise, are split.

    softmax(x, 1)     x: Shard(1)     maxima are gathered, the sums of exponents all-reduced; the result stays split
    cross_entropy     rows split      each rank's sum, over the weight of the valid targets of *all* ranks
    cross_entropy     classes split   softmax as above; the rank that holds a target's class gives its term

Collectives in a lowering are those of ``runtime.collectives``, so their gradients follow the same table: a reduced sum
that every rank then uses differently goes through ``vary``.

Reference: Megatron-LM (Shoeybi et al., 2019), vocabulary-parallel cross entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxshard.ir.info import Info, info_of, values_of
from fxshard.lowerings.statistics import HALF, Lowered, Statistics, replace
from fxshard.mesh import RankMesh
from fxshard.rules.recipe import bind, signature_of
from fxshard.torch_internals import OpOverload

aten = torch.ops.aten
NONE, SUM = 0, 2  # 1 is the mean


def softmax(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> Lowered:
    """Softmax and log_softmax over a dim that ``axes`` split."""
    arguments = bind(node)
    source = arguments["self"]
    dim = arguments["dim"] % values_of(source)[0].dim()
    wanted = values_of(node)[0].dtype
    log = "log_softmax" in str(node.target)
    with new.inserting_before(node):
        write = Statistics(new, node, mesh, axes)
        out = _normalized(write, source, dim, log, wanted)
    return replace(new, node, out)


def _normalized(write: Statistics, source: fx.Node, dim: int, log: bool, wanted: torch.dtype) -> fx.Node:
    x = write.cast(source, torch.float32 if wanted in HALF else wanted)
    top = write.again(write(aten.amax.default, write(aten.detach.default, x), [dim], True), aten.amax.default, [0])
    shifted = write(aten.sub.Tensor, x, top)
    exps = write(aten.exp.default, shifted)
    total = write.varied(write.total(exps, [dim]))
    if log:
        out = write(aten.sub.Tensor, shifted, write(aten.log.default, total))
    else:
        out = write(aten.div.Tensor, exps, total)
    return write.cast(out, wanted)


def loss(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> Lowered:
    """cross_entropy_loss and nll_loss whose rows or classes ``axes`` split."""
    classes = [a for a in axes if (choice := info.choices[a]) is not None and choice.factor == "v"]
    with new.inserting_before(node):
        write = Statistics(new, node, mesh, classes)
        out = _split_classes(write, node, info) if classes else _split_rows(write, node, info)
    return replace(new, node, out)


def _rows(info: Info) -> list[int]:
    return [a for a, c in enumerate(info.choices) if c is not None and c.kind == "split" and c.factor != "v"]


def _split_rows(write: Statistics, node: fx.Node, info: Info) -> fx.Node:
    """The mean: this rank's sum, over what all ranks' valid targets weigh."""
    arguments = bind(node)
    assert isinstance(node.target, OpOverload)
    names = signature_of(node.target).names
    total = write(node.target, *(SUM if n == "reduction" else arguments[n] for n in names))
    target, weight = arguments["target"], arguments["weight"]
    skipped = write(aten.eq.Scalar, target, arguments["ignore_index"])
    picked = None
    if weight is not None:
        safe = write(aten.masked_fill.Scalar, target, skipped, 0)
        picked = write(aten.index.Tensor, write(aten.detach.default, weight), [safe])
    return write(aten.div.Tensor, total, _valid(write, skipped, picked, _rows(info)))


def _valid(write: Statistics, skipped: fx.Node, picked: fx.Node | None, axes: Sequence[int]) -> fx.Node:
    """What the valid targets of all ranks weigh together; their number where there are no weights."""
    if picked is None:
        count = write(aten.sum.default, write(aten.logical_not.default, skipped))
    else:
        count = write(aten.sum.default, write(aten.masked_fill.Scalar, picked, skipped, 0))
    return write.total(count, [], axes)


def _split_classes(write: Statistics, node: fx.Node, info: Info) -> fx.Node:
    arguments = bind(node)
    source, target, weight = arguments["self"], arguments["target"], arguments["weight"]
    value = values_of(source)[0]
    (axis,) = write.axes
    count = value.shape[1]
    logs = source
    if node.target is aten.cross_entropy_loss.default:
        logs = _normalized(write, source, 1, True, value.dtype)
    start, _ = write.range_of(axis, count, info_of(source).placements[axis])
    local = write(aten.sub.Tensor, target, start)
    elsewhere = write.held_elsewhere(local, axis, count, info_of(source).placements[axis])
    skipped = write(aten.eq.Scalar, target, arguments["ignore_index"])
    absent = write(aten.logical_or.default, elsewhere, skipped)
    safe = write(aten.masked_fill.Scalar, local, absent, 0)
    terms = write.summand(write(aten.gather.default, logs, 1, write(aten.unsqueeze.default, safe, 1)), axis)
    rows = write(aten.squeeze.dim, terms, 1)
    picked = None
    if weight is not None:
        weight = write(aten.detach.default, weight)
        picked = write(aten.masked_fill.Scalar, write(aten.index.Tensor, weight, [safe]), absent, 0)
        rows = write(aten.mul.Tensor, rows, picked)
    out = write(aten.neg.default, write(aten.masked_fill.Scalar, rows, absent, 0))
    smoothing = arguments.get("label_smoothing", 0.0)
    if smoothing:
        if weight is not None:
            shape = [-1 if d == 1 else 1 for d in range(value.dim())]
            logs = write(aten.mul.Tensor, logs, write(aten.reshape.default, weight, shape))
        every = write(aten.neg.default, write(aten.sum.dim_IntList, logs, [1]))
        every = write(aten.masked_fill.Scalar, every, skipped, 0)
        out = write(aten.mul.Tensor, out, 1 - smoothing)
        out = write(aten.add.Tensor, out, write(aten.mul.Tensor, every, smoothing / count))
    if arguments["reduction"] == NONE:
        return out
    out = write(aten.sum.default, out)
    if arguments["reduction"] == SUM:
        return out
    reduced = _rows(info) + (list(write.axes) if weight is not None else [])
    return write(aten.div.Tensor, out, _valid(write, skipped, picked, reduced))

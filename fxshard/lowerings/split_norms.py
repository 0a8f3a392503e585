"""Lowerings of norms whose normalised dims are split: the ranks share their statistics, not their operands.

    layer_norm(x, [8])           x: Shard(-1)    sums of x, then of squared deviations, are all-reduced
    rms_norm(x, [8])             x: Shard(-1)    sums of squares are
    batch_norm(x, training)      x: Shard(0)     one mean and variance a channel; running buffers see the whole batch
    instance_norm(x)             x: Shard(2)     as batch_norm, for each sample
    group_norm(x, 2)             channels split  sums of channels are gathered, and added up to those of groups

Weights and biases are split along with their dim. The mean is shared before deviations from it are taken: a variance as
the difference of two large sums would lose its digits.

Reference: Ioffe & Szegedy, 2015; Ba et al., 2016; Wu & He, 2018; Zhang & Sennrich, 2019.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxshard.ir.info import Info, info_of, set_info, values_of
from fxshard.lowerings.statistics import Lowered, Statistics, replace
from fxshard.mesh import RankMesh
from fxshard.placement import REPLICATE
from fxshard.rules.recipe import bind

aten = torch.ops.aten


def norm(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> Lowered:
    """Any norm, of which ``axes`` split dims that it normalises."""
    with new.inserting_before(node):
        write = Statistics(new, node, mesh, axes)
        out = NORMS[node.target](write, bind(node), info)
    return replace(new, node, out)


def _scale(write: Statistics, squares: fx.Node, count: Any, eps: float) -> fx.Node:
    """One over the root of the mean square."""
    mean = write(aten.div.Tensor, squares, count)
    return write(aten.rsqrt.default, write(aten.add.Tensor, mean, eps))


def _by_features(write: Statistics, x: fx.Node, scale: fx.Node, arguments: dict[str, Any]) -> fx.Node:
    """``x`` scaled, then weight and bias, which have its last dims."""
    x = write(aten.mul.Tensor, x, write.varied(scale))
    if (weight := arguments["weight"]) is not None:
        x = write(aten.mul.Tensor, x, write.cast(weight, x.meta["val"].dtype))
    if (bias := arguments.get("bias")) is not None:
        x = write(aten.add.Tensor, x, write.cast(bias, x.meta["val"].dtype))
    return write.cast(x, values_of(write.node)[0].dtype)


def _by_channels(write: Statistics, x: fx.Node, scale: fx.Node, arguments: dict[str, Any]) -> fx.Node:
    """``x`` scaled, weight and bias of its dim 1; the scale takes up the weight, which saves an activation."""
    dtype = x.meta["val"].dtype
    aligned = [-1] + [1] * (x.meta["val"].dim() - 2)
    if (weight := arguments["weight"]) is not None:
        scale = write(aten.mul.Tensor, scale, write(aten.reshape.default, write.cast(weight, dtype), aligned))
    x = write(aten.mul.Tensor, x, scale)
    if (bias := arguments["bias"]) is not None:
        x = write(aten.add.Tensor, x, write(aten.reshape.default, write.cast(bias, dtype), aligned))
    return write.cast(x, values_of(write.node)[0].dtype)


def _trailing(arguments: dict[str, Any], x: fx.Node) -> list[int]:
    ndim = int(x.meta["val"].dim())
    return list(range(ndim - len(arguments["normalized_shape"]), ndim))


def _layer_norm(write: Statistics, arguments: dict[str, Any], info: Info) -> fx.Node:
    return _layer_norm_statistics(write, arguments)[0]


def _layer_norm_statistics(write: Statistics, arguments: dict[str, Any]) -> tuple[fx.Node, fx.Node, fx.Node]:
    x = write.exact(arguments["input"])
    dims = _trailing(arguments, x)
    count = write.count(x, dims)
    mean, away, squares = write.moments(x, dims, count)
    scale = _scale(write, squares, count, arguments["eps"])
    return _by_features(write, away, scale, arguments), mean, scale


def _native_layer_norm(write: Statistics, arguments: dict[str, Any], info: Info) -> tuple[fx.Node, ...]:
    """With the mean and one over the deviation, through which no gradient flows."""
    out, *found = _layer_norm_statistics(write, arguments)
    wanted = values_of(write.node)[1].dtype
    return out, *(write.cast(write(aten.detach.default, x), wanted) for x in found)


def _rms_norm(write: Statistics, arguments: dict[str, Any], info: Info) -> fx.Node:
    x = write.exact(arguments["input"])
    dims = _trailing(arguments, x)
    eps = arguments["eps"] if arguments["eps"] is not None else torch.finfo(x.meta["val"].dtype).eps
    squares = write.total(write(aten.square.default, x), dims)
    return _by_features(write, x, _scale(write, squares, write.count(x, dims), eps), arguments)


def _instance_norm(write: Statistics, arguments: dict[str, Any], info: Info) -> fx.Node:
    x = write.exact(arguments["input"])
    dims = list(range(2, x.meta["val"].dim()))
    count = write.count(x, dims)
    _, away, squares = write.moments(x, dims, count)
    scale = write.varied(_scale(write, squares, count, arguments["eps"]))
    return _by_channels(write, away, scale, arguments)


def _batch_norm(write: Statistics, arguments: dict[str, Any], info: Info) -> fx.Node:
    """In training. The running variance is the unbiased one, of the count of all ranks."""
    x = write.exact(arguments["input"])
    dims = [d for d in range(x.meta["val"].dim()) if d != 1]
    count = write.count(x, dims)
    mean, away, squares = write.moments(x, dims, count)
    if arguments["running_mean"] is not None:
        unbiased = write(aten.div.Tensor, squares, write.calculated(operator.sub, count, 1))
        _run(write, arguments["running_mean"], mean, arguments["momentum"])
        _run(write, arguments["running_var"], unbiased, arguments["momentum"])
    scale = write.varied(_scale(write, squares, count, arguments["eps"]))
    return _by_channels(write, away, scale, arguments)


def _run(write: Statistics, buffer: fx.Node, statistic: fx.Node, momentum: float) -> None:
    """Moves a running buffer towards what this batch gave, as ATen's kernel rounds: once, when it is stored."""
    new = write(aten.reshape.default, write(aten.detach.default, statistic), [-1])
    old = write.cast(buffer, new.meta["val"].dtype)
    kept = write(aten.mul.Tensor, old, 1 - momentum)
    moved = write(aten.add.Tensor, kept, write(aten.mul.Tensor, new, momentum))
    made = write.new.call_function(aten.copy_.default, (buffer, moved))
    made.meta = {**moved.meta, "val": buffer.meta["val"]}
    set_info(made, Info(info_of(buffer).outputs))


def _group_norm(write: Statistics, arguments: dict[str, Any], info: Info) -> fx.Node:
    """Sums of channels are added over axes that split what is behind them, and gathered over those that split them."""
    x = write.exact(arguments["input"])
    behind = list(range(2, x.meta["val"].dim()))
    across = [a for a in write.axes if (c := info.choices[a]) is not None and c.factor == "c"]
    along = [a for a in write.axes if a not in across]
    groups = arguments["num_groups"]
    each = x.meta["val"].shape[1] // groups
    count = write.calculated(operator.mul, write.count(x, behind), each)

    def grouped(x: fx.Node) -> fx.Node:
        """Of every channel, the sum over its group."""
        sums = write.total(x, behind, along)
        placements = info_of(sums).placements
        for axis in across:
            sums = write.placed(sums, axis, REPLICATE)
        sums = write(aten.unflatten.int, sums, 1, [groups, each])
        sums = write(aten.repeat_interleave.self_int, write(aten.sum.dim_IntList, sums, [2]), each, 1)
        for axis in across:
            sums = write.placed(sums, axis, placements[axis])
        return sums

    mean = write(aten.div.Tensor, grouped(x), count)
    away = write(aten.sub.Tensor, x, write.varied(mean, along))
    squares = grouped(write(aten.square.default, away))
    return _by_channels(write, away, write.varied(_scale(write, squares, count, arguments["eps"]), along), arguments)


NORMS: dict[Any, Any] = {
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.batch_norm.default: _batch_norm,
    aten.instance_norm.default: _instance_norm,
    aten.group_norm.default: _group_norm,
}
"""Each norm by the operator."""

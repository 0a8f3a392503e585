"""Lowerings of reductions over a split dim: the ranks share the results of their parts.

    var(x, [1])           sums, then squared deviations, are all-reduced, and divided by the count of the whole
    amax(x, [1])          the ranks' maxima are gathered, and the greatest is taken
    logsumexp(x, [1])     exponents are taken of what lies below the greatest, and their sums all-reduced
    vector_norm(x, p)     the norm of the ranks' norms
    prod, any, all        once more of the ranks' results
    argmax(x, 1)          the ranks' candidates are gathered with their values and positions
    cumsum(x, 1)          each rank adds the totals of the ranks before it

What comes out is whole on every rank (of ``cumsum`` every rank holds its part): these are no sums, so there is nothing
that a later all-reduce could add up.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxshard.ir.info import Info, info_of, values_of
from fxshard.lowerings.statistics import Lowered, Statistics, replace
from fxshard.mesh import RankMesh
from fxshard.rules.recipe import bind
from fxshard.rules.table import name_of
from fxshard.runtime import collectives as run

aten = torch.ops.aten


def reduction(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> Lowered:
    """Any reduction, of which ``axes`` split dims that it reduces."""
    arguments = bind(node)
    source: fx.Node = arguments["self"]
    ndim = values_of(source)[0].dim()
    given = arguments.get("dim")
    dims = [d % ndim for d in ([given] if isinstance(given, int) else given or range(ndim))]
    with new.inserting_before(node):
        write = Statistics(new, node, mesh, axes)
        found = REDUCTIONS[name_of(node.target)[1]](write, source, dims, arguments)
        several = isinstance(found, tuple)
        out = tuple(
            write.cast(x if arguments.get("keepdim") else write(aten.squeeze.dims, x, dims), value.dtype)
            for x, value in zip(found if isinstance(found, tuple) else (found,), values_of(node), strict=True)
        )
    return replace(new, node, out if several else out[0])


def _variance(
    write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]
) -> tuple[fx.Node, fx.Node]:
    x = write.exact(source)
    given = arguments["correction"] if "correction" in arguments else int(arguments["unbiased"])
    correction = 1 if given is None else given
    count = write.count(x, dims)
    mean, _, squares = write.moments(x, dims, count)
    freedom = write.calculated(operator.sub, count, correction) if correction else count
    return write(aten.div.Tensor, squares, freedom if isinstance(freedom, fx.Node) else max(freedom, 0)), mean


def _root(write: Statistics, variance: fx.Node) -> fx.Node:
    """The deviation. As in ATen, no gradient flows where it is zero."""
    zero = write(aten.eq.Scalar, variance, 0)
    root = write(aten.sqrt.default, write(aten.masked_fill.Scalar, variance, zero, 1))
    return write(aten.masked_fill.Scalar, root, zero, 0)


def _var(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    return _variance(write, source, dims, arguments)[0]


def _std(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    return _root(write, _variance(write, source, dims, arguments)[0])


def _var_mean(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> Lowered:
    return _variance(write, source, dims, arguments)


def _std_mean(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> Lowered:
    variance, mean = _variance(write, source, dims, arguments)
    return _root(write, variance), mean


def _extreme(write: Statistics, x: fx.Node, dims: list[int], function: Any) -> fx.Node:
    """``amax`` or ``amin``. As in ATen, all elements that are equally extreme share the gradient."""
    best = write(function, x, dims, True)
    if not info_of(x).differentiable:
        return write.again(best, function, [0])
    best = write.exact(best)
    ties = write(aten.eq.Tensor, write.exact(x), write(aten.detach.default, best))
    shares = write.cast(write(aten.sum.dim_IntList, ties, dims, True), best.meta["val"].dtype)
    for axis in write.axes:
        best, shares = _best(write, write.gathered(best, axis), write.gathered(shares, axis), function)
    return best


def _best(write: Statistics, parts: fx.Node, shares: fx.Node, function: Any) -> tuple[fx.Node, fx.Node]:
    """The greatest of the ranks' maxima, of which ``shares`` elements each attain them; and how many attain that.

    The value is taken as it is, for others may compare it. The gradient comes by a zero, ``x - detach(x)``, weighed.
    """
    fixed = write(aten.detach.default, parts)
    top = write(function, fixed, [0], True)
    less = write(aten.ne.Tensor, fixed, top)
    shares = write(aten.masked_fill.Scalar, shares, less, 0)
    total = write(aten.sum.dim_IntList, shares, [0], True)
    attained = write(aten.masked_fill.Scalar, parts, less, 0)
    endless = write(aten.isinf.default, fixed)  # inf - inf is no zero: an infinity carries its own gradient
    finite = write(aten.masked_fill.Scalar, attained, endless, 0)
    zero = write(aten.sub.Tensor, finite, write(aten.detach.default, finite))
    infinite = write(aten.masked_fill.Scalar, attained, write(aten.logical_not.default, endless), 0)
    weighed = write(aten.mul.Tensor, write(aten.add.Tensor, zero, infinite), write(aten.div.Tensor, shares, total))
    top = write(aten.select.int, write(aten.masked_fill.Scalar, top, write(aten.isinf.default, top), 0), 0, 0)
    return write(aten.add.Tensor, top, write(aten.sum.dim_IntList, weighed, [0])), write(aten.select.int, total, 0, 0)


def _amax(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    return _extreme(write, source, dims, aten.amax.default)


def _amin(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    return _extreme(write, source, dims, aten.amin.default)


def _aminmax(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> Lowered:
    return _amin(write, source, dims, arguments), _amax(write, source, dims, arguments)


def _max(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> Lowered:
    if write.node.target is aten.max.dim:
        return _position(write, source, dims[0], aten.argmax.default)
    return _amax(write, source, dims, arguments)


def _min(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> Lowered:
    if write.node.target is aten.min.dim:
        return _position(write, source, dims[0], aten.argmin.default)
    return _amin(write, source, dims, arguments)


def _position(write: Statistics, x: fx.Node, dim: int, function: Any) -> tuple[fx.Node, fx.Node]:
    """The first extreme value along a dim that one axis cuts, and where it is in the whole."""
    (axis,) = write.axes
    index = write(function, x, dim, True)
    values = write.gathered(write(aten.gather.default, x, dim, index), axis)
    start, _ = write.range_of(axis, x.meta["val"].shape[dim], info_of(x).placements[axis])
    indices = write.gathered(write(aten.add.Tensor, index, start), axis)
    which = write(function, write(aten.detach.default, values), 0, True)
    value, index = (write(aten.gather.default, parts, 0, which) for parts in (values, indices))
    return write(aten.select.int, value, 0, 0), write(aten.select.int, index, 0, 0)


def _argmax(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    return _position(write, write(aten.detach.default, source), dims[0], aten.argmax.default)[1]


def _argmin(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    return _position(write, write(aten.detach.default, source), dims[0], aten.argmin.default)[1]


def _logsumexp(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    """A rank all of whose elements are -inf gives nothing, and gets no gradient."""
    wanted = values_of(write.node)[0].dtype
    x = write.exact(write.cast(source, wanted))
    top = _extreme(write, write(aten.detach.default, x), dims, aten.amax.default)
    infinite = write(aten.logical_not.default, write(aten.isfinite.default, top))
    top = write(aten.masked_fill.Scalar, top, infinite, 0)
    total = write.total(write(aten.exp.default, write(aten.sub.Tensor, x, top)), dims)
    return write(aten.add.Tensor, write(aten.log.default, total), top)


def _vector_norm(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    given = arguments["ord"] if "ord" in arguments else arguments["p"]
    order = 2 if given is None else given
    wanted = arguments.get("dtype")
    x = write.exact(source if wanted is None else write.cast(source, wanted))
    if order == 0:
        return write.total(write(aten.ne.Scalar, x, 0), dims)
    if math.isinf(order):
        function = aten.amax.default if order > 0 else aten.amin.default
        return _extreme(write, write(aten.abs.default, x), dims, function)
    own = write(aten.linalg_vector_norm.default, x, order, dims, True)
    return write.again(own, aten.linalg_vector_norm.default, order, [0])


def _prod(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    x = write.exact(write.cast(source, values_of(write.node)[0].dtype))
    for dim in dims:
        x = write(aten.prod.dim_int, x, dim, True)
    return write.again(x, aten.prod.dim_int, 0)


def _any(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    return write.again(write(aten.any.dims, source, dims, True), aten.any.dims, [0])


def _all(write: Statistics, source: fx.Node, dims: list[int], arguments: dict[str, Any]) -> fx.Node:
    return write.again(write(aten.all.dims, source, dims, True), aten.all.dims, [0])


REDUCTIONS: dict[str, Callable[[Statistics, fx.Node, list[int], dict[str, Any]], Lowered]] = {
    "aten.var": _var,
    "aten.std": _std,
    "aten.var_mean": _var_mean,
    "aten.std_mean": _std_mean,
    "aten.amax": _amax,
    "aten.amin": _amin,
    "aten.aminmax": _aminmax,
    "aten.max": _max,
    "aten.min": _min,
    "aten.argmax": _argmax,
    "aten.argmin": _argmin,
    "aten.logsumexp": _logsumexp,
    "aten.linalg_vector_norm": _vector_norm,
    "aten.norm": _vector_norm,
    "aten.prod": _prod,
    "aten.any": _any,
    "aten.all": _all,
}
"""Each reduction by the operator: what it gives with the reduced dims kept, in any dtype."""


def cumsum(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> Lowered:
    """The sums of this rank's part, and the totals of the ranks before it: inner axes first, which cut the parts."""
    arguments = bind(node)
    with new.inserting_before(node):
        write = Statistics(new, node, mesh, axes)
        x = write.exact(write.cast(arguments["self"], values_of(node)[0].dtype))
        dim = arguments["dim"]
        out = write(aten.cumsum.default, x, dim)
        total = write(aten.sum.dim_IntList, x, [dim], True)
        for axis in reversed(axes):
            parts = write.varied(write.gathered(total, axis), [axis])
            first = write.number(run.offset, mesh.names[axis], mesh.sizes[axis])
            before = write(aten.slice.Tensor, parts, 0, 0, first)
            out = write(aten.add.Tensor, out, write(aten.sum.dim_IntList, before, [0]))
            total = write(aten.sum.dim_IntList, parts, [0])
        out = write.cast(out, values_of(node)[0].dtype)
    return replace(new, node, out)

"""Rules of operators that read or write at positions held in other tensors."""

from __future__ import annotations

import torch

from fxshard.rules.names import ONE, Names, left, lowered, whole
from fxshard.rules.notation import make_factors
from fxshard.rules.recipe import At, Call, Factor, Operand, Recipe, Shape

LINEAR = (frozenset({0}),)
MASKS = (torch.bool, torch.uint8)


def index(call: Call) -> Recipe:
    """index.Tensor(x, indices): the indices' dims, and dims not indexed, split. So does the dim of a single index of
    positions: every rank picks of what it has, which sums; of several, or of a mask, the indexed dims are whole.
    """
    found = _picked(call)
    if found is None:
        return Recipe(linear=LINEAR)
    names, tensors, picked, marks = found
    if len(picked) != len(call.outputs[0]):
        return Recipe(linear=LINEAR)
    factors = make_factors([names, *tensors], [picked], call, marks)
    given = [(p, i) for p, i in enumerate(call.arguments["indices"]) if i is not None]
    if len(given) == 1 and given[0][1].dtype not in MASKS:
        factors += _own(call, given[0][0])
    return Recipe(factors, LINEAR)


def _own(call: Call, dim: int) -> tuple[Factor, ...]:
    """The dim of the first operand in which positions pick: a rank picks of its part, and has zeros for the rest."""
    return (Factor("v", call.inputs[0][dim], (At(dim), None), (None,), "picked", plain=True),)


def _picked(call: Call) -> tuple[Names, list[Names], Names, dict[str, str]] | None:
    """For ``x[indices]``: the names of x, of the index tensors, and of what is picked, and the marks."""
    indices = call.arguments["indices"]
    if any(i is not None and not isinstance(i, Operand) for i in indices):
        return None
    given: list[tuple[int, Operand]] = [(p, i) for p, i in enumerate(indices) if isinstance(i, Operand)]
    names = left(len(call.inputs[0]))
    if not given:
        return None
    if any(i.dtype in MASKS or i.dtype is None for _, i in given):
        return _masked(call.inputs[given[0][1].index], given[0][0], names) if len(given) == 1 else None
    positions = [p for p, _ in given]
    shapes = [call.inputs[i.index] for _, i in given]
    rank = max(map(len, shapes))
    at = positions[0] if positions == list(range(positions[0], positions[-1] + 1)) else 0
    common: Names = [(f"i{k}",) for k in reversed(range(rank))]
    kept = [n for d, n in enumerate(names) if d not in positions]
    tensors = [common[rank - len(shape) :] for shape in shapes]
    return names, tensors, kept[:at] + common + kept[at:], whole(names, positions)


def _masked(mask: Shape, at: int, names: Names) -> tuple[Names, list[Names], Names, dict[str, str]]:
    """A boolean mask over the dims from ``at`` on picks as many elements as it has: these dims are whole."""
    dims = range(at, at + len(mask))
    return names, [[ONE] * len(mask)], [*names[:at], ONE, *names[at + len(mask) :]], whole(names, dims)


def index_put(call: Call) -> Recipe:
    """index_put(x, indices, values): only dims that are not indexed; values broadcast to what is picked."""
    found = _picked(call)
    if found is None or not isinstance(call.arguments["values"], Operand):
        return Recipe()
    names, tensors, picked, marks = found
    values = call.inputs[-1]
    if len(values) > len(picked):
        return Recipe()
    marks |= {n[0]: "!" for tensor in tensors for n in tensor}
    ins = [names, *tensors, picked[len(picked) - len(values) :]]
    both = (frozenset({0, len(ins) - 1}),) if call.arguments.get("accumulate") else ()
    return Recipe(make_factors(ins, [names], call, marks), both)


def index_select(call: Call) -> Recipe:
    """index_select(x, dim, index): the dim becomes the index's dim; split itself, every rank picks of what it has."""
    ndim = len(call.inputs[0])
    if len(call.inputs[1]) != 1 or not ndim:
        return Recipe(linear=LINEAR)
    dim = call.dim("dim", ndim)
    names = left(ndim)
    out = [("i",) if i == dim else n for i, n in enumerate(names)]
    return Recipe(make_factors([names, [("i",)]], [out], call, whole(names, (dim,))) + _own(call, dim), LINEAR)


def index_write(call: Call) -> Recipe:
    """index_add, index_copy, index_fill(x, dim, index, ...): every dim but the indexed one. The rows that index_add
    adds split as well: every rank adds its own, to its share of x.
    """
    ndim = len(call.inputs[0])
    if not ndim or any(len(s) not in (0, ndim) for s in call.inputs[2:]):
        return Recipe()
    names = left(ndim)
    ins: list[Names] = [names, [ONE] * len(call.inputs[1]), *(names[: len(s)] for s in call.inputs[2:])]
    dim = call.dim("dim", ndim)
    factors = make_factors(ins, [names], call, whole(names, (dim,)))
    if call.name != "aten.index_add":
        return Recipe(factors)
    dtype = call.dtype("self")
    if len(call.inputs[2]) == ndim and (dtype is None or dtype.is_floating_point or dtype.is_complex):
        rows = make_factors(
            [[ONE] * ndim, [("i",)], [("i",) if d == dim else ONE for d in range(ndim)]],
            [[ONE] * ndim],
            call,
            {"i": "+"},
        )
        factors += lowered(rows, "added")
    return Recipe(factors, (frozenset({0, 2}),))


def gather(call: Call) -> Recipe:
    """gather(x, dim, index): the gathered dim of x is whole; other dims follow where both have the same size."""
    ndim = len(call.inputs[0])
    if call.arguments.get("dim") is None or any(len(s) != ndim for s in call.inputs):
        return Recipe(linear=LINEAR)
    dim = call.dim("dim", ndim)
    names = left(ndim)
    picked = [("i",) if i == dim else n for i, n in enumerate(names)]
    unequal = [i for i in range(ndim) if i != dim and call.inputs[0][i] != call.inputs[1][i]]
    return Recipe(make_factors([names, picked], [picked], call, whole(names, [dim, *unequal])), LINEAR)


def scatter(call: Call) -> Recipe:
    """scatter, scatter_add, scatter_reduce(x, dim, index, src): other dims, where all have the same size."""
    ndim = len(call.inputs[0])
    if not ndim or any(len(s) != ndim for s in call.inputs):
        return Recipe()
    names = left(ndim)
    dim = call.dim("dim", ndim)
    unequal = [d for d in range(ndim) if any(s[d] != call.inputs[0][d] for s in call.inputs)]
    both = (frozenset({0, 2}),) if call.name == "aten.scatter_add" else ()
    ins = [names] * len(call.inputs)
    return Recipe(make_factors(ins, [names], call, whole(names, [dim, *unequal])), both)


def slice_scatter(call: Call) -> Recipe:
    """slice_scatter, select_scatter(x, src, dim, ...): every dim but the one that is cut."""
    ndim = len(call.inputs[0])
    names = left(ndim)
    dim = call.dim("dim", ndim, 0)
    source = names if len(call.inputs[1]) == ndim else names[:dim] + names[dim + 1 :]
    factors = make_factors([names, source], [names], call, whole(names, (dim,)))
    return Recipe(factors, (frozenset({0, 1}),))


def searchsorted(call: Call) -> Recipe:
    """searchsorted(sorted, values): the sorted dim is whole; sorted sequences of several dims go with the values'."""
    borders, values = (call.inputs[call.operand(name) or 0] for name in ("sorted_sequence", "self"))
    if call.operand("self") is None:
        return Recipe()
    names = left(len(values))
    rows: Names = [ONE] if len(borders) == 1 else [*names[:-1], ONE]
    return Recipe(make_factors([rows, names, *[rows] * (len(call.inputs) - 2)], [names], call, {}))


def bucketize(call: Call) -> Recipe:
    """bucketize(x, boundaries): pointwise in x, the boundaries are whole."""
    if call.operand("self") is None:
        return Recipe()
    names = left(len(call.inputs[0]))
    return Recipe(make_factors([names, [ONE]], [names], call, {}))


def one_hot(call: Call) -> Recipe:
    """one_hot(x, num_classes): the classes are a new dim; unnamed, their number depends on all of x."""
    if call.arguments.get("num_classes", -1) == -1:
        return Recipe()
    names = left(len(call.inputs[0]))
    return Recipe(make_factors([names], [[*names, ONE]], call, {}))

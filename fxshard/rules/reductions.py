"""Rules of operators that run along some dims: reductions, scans, losses, transforms."""

from __future__ import annotations

import math

from fxshard.rules.names import ONE, Names, left, lowered, right, whole
from fxshard.rules.notation import make_factors
from fxshard.rules.recipe import Call, Recipe

LINEAR = (frozenset({0}),)


def _along(call: Call, dims: tuple[int, ...]) -> Recipe:
    """The dims are whole, every other one follows; all tensors have the operand's dims."""
    names = left(len(call.inputs[0]))
    if any(len(s) != len(names) for s in (*call.inputs, *call.outputs)):
        return Recipe()
    ins, outs = [names] * len(call.inputs), [names] * len(call.outputs)
    return Recipe(make_factors(ins, outs, call, whole(names, dims)))


def dim_whole(call: Call) -> Recipe:
    """softmax, cumsum, sort, topk, roll, ...: the dims they run along are whole, every other one follows."""
    arg = next((a for a in ("dims", "dim") if a in call.arguments), None)
    if arg is None or call.arguments[arg] in (None, ()):
        return Recipe()
    return _along(call, call.dims(arg, len(call.inputs[0])))


def scan(call: Call) -> Recipe:
    """cumsum, flip, roll, fft, ...: as ``dim_whole``, and linear where no dtype is asked for."""
    recipe = dim_whole(call)
    linear = len(call.inputs) == 1 and call.arguments.get("dtype") is None
    return Recipe(recipe.factors, LINEAR if linear else ())


def softmax(call: Call) -> Recipe:
    """softmax, log_softmax: over a split dim, the ranks share their maxima and sums."""
    ndim = len(call.inputs[0])
    names = left(ndim)
    if not ndim:
        return Recipe()
    name = names[call.dim("dim", ndim)][0]
    factors = make_factors([names], [names], call, {})
    return Recipe(lowered(factors, "softmax", (name,)))


def renorm(call: Call) -> Recipe:
    """renorm(x, p, dim, maxnorm): every index of ``dim`` has a norm over all *other* dims."""
    ndim = len(call.inputs[0])
    return _along(call, tuple(d for d in range(ndim) if d != call.dim("dim", ndim)))


def unfold(call: Call) -> Recipe:
    """unfold(x, dimension, size, step): windows along one dim; a new last dim runs within the window."""
    ndim = len(call.inputs[0])
    names = left(ndim)
    if not ndim:
        return Recipe(linear=LINEAR)
    marks = whole(names, (call.dim("dimension", ndim),))
    return Recipe(make_factors([names], [[*names, ONE]], call, marks), LINEAR)


def fft(call: Call) -> Recipe:
    """fft_*: the transformed dims are whole. ``dim=None`` with sizes ``s`` means the last ``len(s)`` dims."""
    ndim = len(call.inputs[0])
    if call.arguments.get("dim") is None:
        sizes = call.arguments.get("s")
        count = ndim if sizes is None else len(sizes)
        return Recipe(_along(call, tuple(range(ndim - count, ndim))).factors, LINEAR)
    return Recipe(_along(call, call.dims("dim", ndim)).factors, LINEAR)


def _reduction(call: Call, mark: str, lowering: str | None = None) -> Recipe:
    ndim = len(call.inputs[0])
    dims = call.dims("dim", ndim) if "dim" in call.arguments else tuple(range(ndim))
    names = left(ndim)
    keep = bool(call.arguments.get("keepdim", False))
    out = [ONE if i in dims else n for i, n in enumerate(names) if keep or i not in dims]
    if len(call.inputs) != 1 or any(len(s) != len(out) for s in call.outputs):
        return Recipe()
    if any(s != 1 for shape in call.outputs for s, n in zip(shape, out, strict=True) if n is ONE):
        return Recipe()  # dim=[] reduces nothing in some operators
    reduced = {names[d][0] for d in dims}
    factors = make_factors([names], [out] * len(call.outputs), call, dict.fromkeys(reduced, mark))
    plain = reduced if lowering == "position" else ()
    return Recipe(lowered(factors, lowering, reduced, reduced=mark == "~", plain=plain))


def sums(call: Call) -> Recipe:
    """sum: the reduced dims sum. It is linear unless it casts."""
    return Recipe(_reduction(call, "+").factors, LINEAR if call.arguments.get("dtype") is None else ())


def counts(call: Call) -> Recipe:
    """nansum, count_nonzero: the reduced dims sum."""
    return _reduction(call, "+")


def histc(call: Call) -> Recipe:
    """histc(x, bins, min, max): counts sum; without bounds these are those of all values, and it stays whole."""
    if call.arguments.get("min", 0) == call.arguments.get("max", 0):
        return Recipe()
    names = left(len(call.inputs[0]))
    return Recipe(make_factors([names], [[ONE]], call, {n[0]: "+" for n in names}))


def means(call: Call) -> Recipe:
    """mean: each rank's mean is weighed by its share of the elements, then summed."""
    return Recipe(_reduction(call, "+", "mean").factors, LINEAR if call.arguments.get("dtype") is None else ())


def reduces(call: Call) -> Recipe:
    """median, kthvalue, mode: the reduced dims are whole."""
    return _reduction(call, "!")


def shares(call: Call) -> Recipe:
    """prod, any, all: over a split dim, the ranks share the results of their parts."""
    return _reduction(call, "~", "reduction")


def moments(call: Call) -> Recipe:
    """var, std, var_mean: over a split dim, the ranks share sums, then those of squared deviations."""
    correction = call.arguments.get("correction")
    several = any(not isinstance(size, int) for size in call.inputs[0]) and correction not in (None, 0, 1)
    wrong = call.arguments.get("dim") == ()  # ATen's gradient is then not that of what it gives
    return _reduction(call, "!" if _is_complex(call) or several or wrong else "~", "reduction")


def extremes(call: Call) -> Recipe:
    """amax, amin, aminmax, max, min, logsumexp: over a split dim, the ranks share their maxima."""
    return _reduction(call, "!" if _is_complex(call) else "~", "extreme")


def vector_norms(call: Call) -> Recipe:
    """norm, linalg_vector_norm: over a split dim, the norm of the ranks' norms; whole where its order is negative."""
    order = call.arguments["ord"] if "ord" in call.arguments else call.arguments.get("p")
    order = 2 if order is None else order
    if math.isinf(order):
        return _reduction(call, "~", "extreme")
    return _reduction(call, "~" if order >= 0 else "!", "reduction")


def positions(call: Call) -> Recipe:
    """argmax, argmin, max and min with indices: over a dim that one axis splits, the ranks share values and indices."""
    ndim = len(call.inputs[0])
    if call.arguments.get("dim") is None or not ndim:
        return _reduction(call, "!")
    dim = call.dim("dim", ndim)
    cut = call.is_cut and call.whole_inputs[0][dim] != call.inputs[0][dim]
    known = isinstance(call.inputs[0][dim], int)
    return _reduction(call, "~" if known and not cut else "!", "position")


def _is_complex(call: Call) -> bool:
    dtype = call.dtype("self")
    return dtype is not None and dtype.is_complex


def cumsum(call: Call) -> Recipe:
    """cumsum: over a split dim, every rank adds the totals of the ranks before it. It is linear unless it casts."""
    ndim = len(call.inputs[0])
    names = left(ndim)
    if not ndim:
        return scan(call)
    dim = call.dim("dim", ndim)
    factors = make_factors([names], [names], call, {})
    linear = LINEAR if call.arguments.get("dtype") is None else ()
    return Recipe(lowered(factors, "cumsum", names[dim], plain=names[dim]), linear)


def cross_entropy(call: Call) -> Recipe:
    """cross_entropy_loss, nll_loss: with reduction none, every dim but the classes; otherwise these sum.

    With reduction mean every rank divides by the weight of *all* valid targets. The classes split over one axis.
    """
    logits, target = call.inputs[:2]
    reduction = call.arguments.get("reduction", 1)
    if len(logits) != len(target) + 1 or len(logits) < 2:
        return Recipe()
    rows: Names = [("n",), *((f"s{i}",) for i in range(len(target) - 1))]
    ins: list[Names] = [[rows[0], ("v",), *rows[1:]], rows] + [[("v",)]] * (len(call.inputs) - 2)
    cut = call.is_cut and call.whole_inputs[0][1] != logits[1]
    marks = {"v": "!" if cut else "~"}
    if reduction != 0:
        marks |= {n[0]: "+" for n in rows}
    factors = make_factors(ins, [rows if reduction == 0 else []], call, marks)
    return Recipe(lowered(factors, "loss", None if reduction == 1 else ("v",), plain=("v",)))


def stft(call: Call) -> Recipe:
    """stft(x, ..., window): a batch of signals."""
    batch: Names = [("b",)] * (len(call.inputs[0]) - 1)
    ins = [[*batch, ONE], *([ONE] * len(s) for s in call.inputs[1:])]
    return Recipe(make_factors(ins, [[*batch, *[ONE] * (len(call.outputs[0]) - len(batch))]], call, {}))


def row_loss(call: Call) -> Recipe:
    """cosine_embedding_loss, triplet_margin_loss, ...: a loss for each row; summed, or a mean of them."""
    reduction = call.arguments.get("reduction", 1)
    rows = call.inputs[0][:1]
    if len(call.inputs[0]) != 2 or any(s[:1] != rows for s in call.inputs) or call.operand("weight") is not None:
        return Recipe()
    ins: list[Names] = [[("n",), *[ONE] * (len(s) - 1)] for s in call.inputs]
    if reduction == 0:
        return Recipe(make_factors(ins, [[("n",)]], call, {}) if len(call.outputs[0]) == 1 else ())
    return Recipe(lowered(make_factors(ins, [[]], call, {"n": "+"}), "mean" if reduction == 1 else None))


def ctc_loss(call: Call) -> Recipe:
    """ctc_loss(log_probs, targets, lengths, lengths) of padded targets: the batch; summed, or a mean over it."""
    reduction = call.arguments.get("reduction", 1)
    if [len(s) for s in call.inputs] != [3, 2, 1, 1]:
        return Recipe()
    ins: list[Names] = [[ONE, ("n",), ONE], [("n",), ONE], [("n",)], [("n",)]]
    if reduction == 0:
        return Recipe(make_factors(ins, [[("n",)]], call, {}))
    return Recipe(lowered(make_factors(ins, [[]], call, {"n": "+"}), "mean" if reduction == 1 else None))


def pairwise_distance(call: Call) -> Recipe:
    """pairwise_distance: operands broadcast, the last dim is whole."""
    if not any(call.inputs):
        return Recipe()
    ins = [right(len(s)) for s in call.inputs]
    names = right(max(len(s) for s in call.inputs))
    out = [*names[:-1], ONE] if call.arguments.get("keepdim") else names[:-1]
    return Recipe(make_factors(ins, [out], call, {"d0": "!"}))

"""Rules of operators whose factors depend on their arguments: which dims they reduce, normalise or contract."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fxshard.rules.notation import make_factors
from fxshard.rules.recipe import At, Call, Factor, Operand, Recipe

Names = list[tuple[str, ...]]


def _right(count: int) -> Names:
    """Names of dims counted from the right, so that broadcasting aligns them."""
    return [(f"d{i}",) for i in reversed(range(count))]


def _left(count: int) -> Names:
    return [(f"d{i}",) for i in range(count)]


def _whole(names: Sequence[tuple[str, ...]], dims: Collection[int]) -> dict[str, str]:
    return {names[d][0]: "!" for d in dims}


def pointwise(call: Call) -> Recipe:
    """Every dim is a factor; operands broadcast."""
    ins = [_right(len(s)) for s in call.inputs]
    outs = [_right(len(s)) for s in call.outputs]
    factors = make_factors(ins, outs, call, {})
    if call.name == "aten.dropout":
        factors = tuple(Factor(f.name, f.size, f.inputs, f.outputs, "dropout") for f in factors)
    if call.name in ("aten.prelu", "aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like"):
        unread = frozenset() if call.name == "aten.prelu" else frozenset({0})
        return Recipe(() if call.name == "aten.prelu" else factors, unread=unread)
    return Recipe(factors)


def shape_only(call: Call) -> Recipe:
    """new_ones and the like: the operand gives dtype and device, and is not read."""
    return Recipe(unread=frozenset(range(len(call.inputs))))


def whole(call: Call) -> Recipe:
    """An operator that is never split."""
    return Recipe()


def dim_whole(call: Call) -> Recipe:
    """softmax, cumsum, sort, topk, ...: the dim they run along is whole, every other one follows."""
    ndim = len(call.inputs[0])
    default = 0 if call.name == "aten.renorm" else -1
    arg = "dims" if "dims" in call.arguments else "dimension" if "dimension" in call.arguments else "dim"
    value = call.arguments.get(arg, default)
    if value is None or value == ():
        return Recipe()
    dims = call.dims(arg, ndim) if arg in call.arguments else (default % max(ndim, 1),)
    names = _left(ndim)
    outs = [_left(len(s)) for s in call.outputs]
    if any(len(s) != ndim for s in (*call.inputs[1:], *call.outputs)):
        outs = [[*n, ("1",)] if len(n) == ndim else n for n in outs]
        if call.name != "aten.unfold":
            return Recipe()
        outs = [[*names, ("1",)]]
    return Recipe(make_factors([names] * len(call.inputs), outs, call, _whole(names, dims)))


def _reduction(call: Call, mark: str, lowering: str | None = None) -> Recipe:
    ndim = len(call.inputs[0])
    dims = call.dims("dim", ndim) if "dim" in call.arguments else tuple(range(ndim))
    names = _left(ndim)
    keep = bool(call.arguments.get("keepdim", False))
    out = [("1",) if i in dims else n for i, n in enumerate(names) if keep or i not in dims]
    marks = {names[d][0]: mark for d in dims}
    if any(len(s) != len(out) for s in call.outputs) or len(call.inputs) != 1:
        return Recipe()
    factors = make_factors([names], [out] * len(call.outputs), call, marks)
    reduced = {names[d][0] for d in dims}
    return Recipe(
        tuple(
            Factor(f.name, f.size, f.inputs, f.outputs, lowering if f.name in reduced else f.lowering) for f in factors
        )
    )


def sums(call: Call) -> Recipe:
    """sum: the reduced dims sum."""
    return _reduction(call, "+")


def means(call: Call) -> Recipe:
    """mean: each rank's mean is weighed by its share of the elements, then summed."""
    return _reduction(call, "+", "mean")


def reduces(call: Call) -> Recipe:
    """Other reductions: the reduced dims are whole."""
    return _reduction(call, "!")


def trailing_norm(call: Call) -> Recipe:
    """layer_norm, rms_norm: the normalised dims are whole, the leading ones follow; weights lack them."""
    ndim = len(call.inputs[0])
    count = len(call.arguments["normalized_shape"])
    names = _right(ndim)
    ins = [names] + [names[ndim - len(s) :] for s in call.inputs[1:]]
    return Recipe(make_factors(ins, [names], call, _whole(names, range(ndim - count, ndim))))


def batch_only(call: Call) -> Recipe:
    """Only the leading dim (the batch) may be split; of 2-D pools and resamplings, all dims before the window."""
    ndim = len(call.inputs[0])
    names = _left(ndim)
    channels_too = any(word in call.name for word in ("pool", "upsample"))
    window = next((k for k in (1, 2, 3) if f"{k}d" in call.name), 2)
    kept = ndim - window if channels_too else 1
    if kept < 1 or (not channels_too and "norm" not in call.name and ndim < window + 2):
        return Recipe()
    ins: list[Names] = [names] + [[("1",)] * len(s) for s in call.inputs[1:]]
    outs: list[Names] = [names[:kept] + [("1",)] * (len(s) - kept) for s in call.outputs]
    if "grid" in call.name:
        ins = [names, [names[0]] + [("1",)] * (len(call.inputs[1]) - 1)] if len(call.inputs) > 1 else ins
    marks = _whole(names, range(kept, ndim))
    return Recipe(make_factors(ins, outs, call, marks))


def batch_norm(call: Call) -> Recipe:
    """batch_norm: in eval mode pointwise; in training its statistics need the whole batch."""
    if call.arguments.get("training", call.arguments.get("use_input_stats")):
        return Recipe()
    names = _left(len(call.inputs[0]))
    return Recipe(make_factors([names] + [[names[1]]] * (len(call.inputs) - 1), [names], call, {}))


def conv(call: Call) -> Recipe:
    """conv1d/2d/3d: the batch and the output channels split; the input channels sum where there is no bias."""
    ndim = len(call.inputs[1])
    if len(call.inputs[0]) != ndim:
        return Recipe()
    space: Names = [("1",)] * (ndim - 2)
    grouped = call.arguments.get("groups", 1) != 1
    bias = len(call.inputs) > 2
    ins: list[Names] = [[("b",), ("c",), *space], [("o",), ("c",), *space]] + [[("o",)]] * bias
    marks = {"o": "!", "c": "!"} if grouped else {"c": "!" if bias else "+"}
    if grouped:
        ins = [[("b",), ("c",), *space], [("o",), ("1",), *space]] + [[("o",)]] * bias
    return Recipe(make_factors(ins, [[("b",), ("o",), *space]], call, marks))


def pad(call: Call) -> Recipe:
    """pad: dims that are not padded follow."""
    ndim = len(call.inputs[0])
    amounts = list(call.arguments["pad"])
    if call.arguments.get("mode", "constant") != "constant":
        padded = set(range(ndim - len(amounts) // 2, ndim))
    else:
        padded = {ndim - 1 - i // 2 for i, a in enumerate(amounts) if a != 0}
    names = _left(ndim)
    return Recipe(make_factors([names], [names], call, _whole(names, padded)))


def matrix_whole(call: Call) -> Recipe:
    """tril, triu: the last two dims are whole."""
    names = _left(len(call.inputs[0]))
    return Recipe(make_factors([names], [names], call, _whole(names, range(len(names) - 2, len(names)))))


def addmm(call: Call) -> Recipe:
    """addmm(bias, a, b): the contraction would add the bias on every rank, so it is whole."""
    bias: Names = [("m",), ("n",)][2 - len(call.inputs[0]) :]
    return Recipe(make_factors([bias, [("m",), ("k",)], [("k",), ("n",)]], [[("m",), ("n",)]], call, {"k": "!"}))


def matmul(call: Call) -> Recipe:
    """matmul: batched, or with vectors."""
    a, b = (len(s) for s in call.inputs)
    batch = [("b" + str(i),) for i in reversed(range(max(a, b, 2) - 2))]
    left: Names = [("k",)] if a == 1 else [*batch[len(batch) - (a - 2) :], ("m",), ("k",)]
    right: Names = [("k",)] if b == 1 else [*batch[len(batch) - (b - 2) :], ("k",), ("n",)]
    out: Names = [*batch, *([("m",)] if a > 1 else []), *([("n",)] if b > 1 else [])]
    return Recipe(make_factors([left, right], [out], call, {"k": "+"}))


def einsum(call: Call) -> Recipe:
    """einsum: the factors are its letters."""
    equation = str(call.arguments["equation"]).replace(" ", "")
    if "." in equation:
        return Recipe()
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(set(left) - {","})
        right = "".join(c for c in letters if left.count(c) == 1)
    if any(len(set(term)) != len(term) for term in terms):
        return Recipe()
    marks = {c: "+" for c in set(left) - set(right) - {","}}
    ins: list[Names] = [[(c,) for c in term] for term in terms]
    return Recipe(make_factors(ins, [[(c,) for c in right]], call, marks))


def embedding(call: Call) -> Recipe:
    """embedding(weight, ids): the vocabulary splits by offset and mask; gradient scaling by counts needs it whole."""
    ids = _left(len(call.inputs[1]))
    counted = bool(call.arguments.get("scale_grad_by_freq"))
    marks = {"v": "!" if counted else "~"}
    if counted:
        marks |= {n[0]: "!" for n in ids}
    factors = make_factors([[("v",), ("e",)], ids], [[*ids, ("e",)]], call, marks)
    return Recipe(tuple(Factor(f.name, f.size, f.inputs, f.outputs, f.lowering and "embedding") for f in factors))


def attention(call: Call) -> Recipe:
    """scaled_dot_product_attention: batch, heads and queries split; keys and the head size are whole.

    With ``enable_gqa`` a key head serves several query heads: ``(g r)`` query heads, ``g`` key heads.
    """
    q, k, v = call.inputs[:3]
    lead = [(f"b{i}",) for i in reversed(range(len(q) - 2))]
    heads = list(lead)
    if call.arguments.get("enable_gqa") and lead and q[-3] != k[-3]:
        heads[-1] = (lead[-1][0], "r")
    marks = {"d": "!", "s": "!"}
    if call.arguments.get("is_causal"):
        marks["q"] = "!"
    if call.arguments.get("dropout_p"):
        marks |= {n[0]: "!" for n in [*lead, ("q",)]}
    ins: list[Names] = [[*heads, ("q",), ("d",)], [*lead, ("s",), ("d",)], [*lead, ("s",), ("e",)]]
    for mask in call.inputs[3:]:
        ins.append([*heads, ("q",), ("s",)][len(heads) + 2 - len(mask) :])
    return Recipe(make_factors(ins, [[*heads, ("q",), ("e",)]], call, marks))


def index_select(call: Call) -> Recipe:
    """index_select(x, dim, index): the dim becomes the index's dim."""
    ndim = len(call.inputs[0])
    if len(call.inputs[1]) != 1 or not ndim:
        return Recipe()
    dim = call.dim("dim", ndim)
    names = _left(ndim)
    out = [("i",) if i == dim else n for i, n in enumerate(names)]
    return Recipe(make_factors([names, [("i",)]], [out], call, _whole(names, (dim,))))


def gather(call: Call) -> Recipe:
    """gather(x, dim, index): the gathered dim of x is whole; other dims follow where both have the same size."""
    ndim = len(call.inputs[0])
    if call.arguments.get("dim") is None or any(len(s) != ndim for s in call.inputs):
        return Recipe()
    dim = call.dim("dim", ndim)
    names = _left(ndim)
    index = [("i",) if i == dim else n for i, n in enumerate(names)]
    unequal = [i for i in range(ndim) if i != dim and call.inputs[0][i] != call.inputs[1][i]]
    marks = _whole(names, [dim, *unequal])
    return Recipe(make_factors([names, index], [index], call, marks))


def cross_entropy(call: Call) -> Recipe:
    """cross_entropy_loss, nll_loss: with reduction none, every dim but the classes; summed, they sum."""
    logits, target = call.inputs[:2]
    reduction = call.arguments.get("reduction", 1)
    if len(logits) != len(target) + 1 or len(logits) < 2 or reduction == 1:
        return Recipe()
    rows: Names = [("n",)] + [(f"s{i}",) for i in range(len(target) - 1)]
    ins: list[Names] = [[rows[0], ("v",), *rows[1:]], rows] + [[("v",)]] * (len(call.inputs) - 2)
    marks = {"v": "!"}
    if reduction == 2:
        marks |= {n[0]: "+" for n in rows}
    return Recipe(make_factors(ins, [rows if reduction == 0 else []], call, marks))


def elementwise_loss(call: Call) -> Recipe:
    """mse_loss and the like: pointwise with reduction none, a sum with reduction sum, a mean with mean."""
    reduction = call.arguments.get("reduction", 1)
    if any(s != call.inputs[0] for s in call.inputs[:2]):
        return Recipe()
    ins = [_right(len(s)) for s in call.inputs]
    names = _right(len(call.inputs[0]))
    if reduction == 0:
        return Recipe(make_factors(ins, [names], call, {}))
    factors = make_factors(ins, [[]], call, {n[0]: "+" for n in names})
    lowering = "mean" if reduction == 1 else None
    return Recipe(tuple(Factor(f.name, f.size, f.inputs, f.outputs, lowering) for f in factors))


def first_only(call: Call) -> Recipe:
    """bucketize: pointwise in its first operand, the borders are whole."""
    names = _left(len(call.inputs[0]))
    if len(call.inputs) != 2 or len(call.inputs[1]) != 1:
        return Recipe()
    return Recipe(make_factors([names, [("1",)]], [names], call, {}))


__all__ = ["At", "Operand"]

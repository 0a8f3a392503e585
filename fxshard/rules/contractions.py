"""Rules of operators that multiply and sum: products, convolutions, attention, embeddings."""

from __future__ import annotations

from dataclasses import replace

from fxshard.rules.names import ONE, Names, left, lowered, resized
from fxshard.rules.notation import make_factors
from fxshard.rules.recipe import At, Call, Dim, Factor, Recipe


def linear(call: Call) -> Recipe:
    """linear(x, w, b): ``normalize`` splits the bias off; where it is still there, the contraction is whole."""
    rows = left(len(call.inputs[0]) - 1)
    bias: list[Names] = [[("o",)]] * (len(call.inputs) - 2)
    if len(call.inputs[1]) != 2:
        return Recipe()
    ins: list[Names] = [[*rows, ("i",)], [("o",), ("i",)], *bias]
    return Recipe(make_factors(ins, [[*rows, ("o",)]], call, {"i": "!" if bias else "+"}), _products(call, 2))


def _products(call: Call, count: int) -> tuple[frozenset[int], ...]:
    """Each of the ``count`` operands alone, where no other is added."""
    return tuple(frozenset({i}) for i in range(count)) if len(call.inputs) == count else ()


def addmm(call: Call) -> Recipe:
    """addmm, baddbmm: every rank adds its share of the first operand where the contraction is split."""
    batch: Names = [("b",)] if len(call.outputs[0]) == 3 else []
    out: Names = [*batch, ("m",), ("n",)]
    if any(len(s) != len(out) for s in call.inputs[1:]) or len(call.inputs) != 3:
        return Recipe()
    ins: list[Names] = [out[len(out) - len(call.inputs[0]) :], [*batch, ("m",), ("k",)], [*batch, ("k",), ("n",)]]
    dtype = call.dtype("self")
    shared = dtype is None or dtype.is_floating_point or dtype.is_complex  # a share of an integer is none
    return Recipe(lowered(make_factors(ins, [out], call, {"k": "+" if shared else "!"}), "share", ("k",)))


def matmul(call: Call) -> Recipe:
    """matmul: batched, or with vectors."""
    a, b = (len(s) for s in call.inputs)
    batch = [("b" + str(i),) for i in reversed(range(max(a, b, 2) - 2))]
    one: Names = [("k",)] if a == 1 else [*batch[len(batch) - (a - 2) :], ("m",), ("k",)]
    two: Names = [("k",)] if b == 1 else [*batch[len(batch) - (b - 2) :], ("k",), ("n",)]
    out: Names = [*batch, *([("m",)] if a > 1 else []), *([("n",)] if b > 1 else [])]
    return Recipe(make_factors([one, two], [out], call, {"k": "+"}), _products(call, 2))


def einsum(call: Call) -> Recipe:
    """einsum: the factors are its letters; ``...`` stands for dims aligned from the right."""
    equation = str(call.arguments["equation"]).replace(" ", "")
    left_side, arrow, right = equation.partition("->")
    terms = left_side.split(",")
    if not arrow:
        letters = sorted({c for c in left_side if c.isalpha()})
        right = "..." * ("..." in left_side) + "".join(c for c in letters if left_side.count(c) == 1)
    if len(terms) != len(call.inputs):
        return Recipe()
    ins = [_letters(term, len(shape)) for term, shape in zip(terms, call.inputs, strict=True)]
    out = _letters(right, len(call.outputs[0]))
    if any(len(set(names)) != len(names) for names in (*ins, out)):
        return Recipe(linear=_products(call, len(ins)))  # a diagonal
    marks = {n[0]: "+" for names in ins for n in names if n not in out}
    if any(name.startswith(".") for name in marks):
        return Recipe(linear=_products(call, len(ins)))
    return Recipe(make_factors(ins, [out], call, marks), _products(call, len(ins)))


def _letters(term: str, ndim: int) -> Names:
    before, dots, after = term.partition("...")
    count = ndim - len(before) - len(after) if dots else 0
    return [*((c,) for c in before), *((f".{i}",) for i in reversed(range(count))), *((c,) for c in after)]


def grouped_mm(call: Call) -> Recipe:
    """grouped_mm(x, w, offsets): each group of rows of x with its own matrix of w, as experts compute; the groups
    split, and their rows with them. Both of 3 dims, or groups of columns, as well: there the groups are whole.
    """
    x, w = call.inputs[:2]
    rule = _GROUPED.get((len(x), len(w), len(call.inputs)))
    if rule is None:
        return Recipe()
    ins, out = rule
    factors = make_factors(ins, [out], call, {"k": "+", "s": "!", "g": "!"})
    dtype = call.dtype("self")
    if call.name == "aten._grouped_mm" and dtype is not None:  # its kernel takes rows of whole 16 bytes only
        step = max(1, 16 // dtype.itemsize)
        factors = tuple(
            replace(f, size=f.size // step) if f.name in "kmn" else f for f in factors if isinstance(f.size, int)
        )
    if (len(x), len(w), len(call.inputs)) == (2, 3, 3) and isinstance(x[0], int) and w[0] == call.inputs[2][0]:
        rows = At(0, groups=2)
        factors += (Factor("g", w[0], (rows, At(0), None), (rows,), "experts", plain=True),)
    return Recipe(factors)


_GROUPED: dict[tuple[int, int, int], tuple[list[Names], Names]] = {
    (2, 3, 3): ([[("s",), ("k",)], [("g",), ("k",), ("n",)], [("g",)]], [("s",), ("n",)]),
    (3, 2, 3): ([[("g",), ("m",), ("k",)], [("k",), ("s",)], [("g",)]], [("m",), ("s",)]),
    (2, 2, 3): ([[("m",), ("s",)], [("s",), ("n",)], [("g",)]], [("g",), ("m",), ("n",)]),
    (3, 3, 2): ([[("b",), ("m",), ("k",)], [("b",), ("k",), ("n",)]], [("b",), ("m",), ("n",)]),
}
"""The dims of x and w, and the number of operands -> how they are named; ``s`` is cut in groups by the offsets."""


def embedding(call: Call) -> Recipe:
    """embedding(weight, ids): the vocabulary splits by offset and mask, over one axis; where gradients are scaled by
    counts, every rank needs all ids.
    """
    if call.arguments.get("sparse"):
        return Recipe()
    ids = left(len(call.inputs[1]))
    counted = bool(call.arguments.get("scale_grad_by_freq"))
    cut = bool(call.whole_inputs) and call.whole_inputs[0][0] != call.inputs[0][0]
    marks = {"v": "!" if counted or cut else "~"} | ({n[0]: "!" for n in ids} if counted else {})
    factors = make_factors([[("v",), ("e",)], ids], [[*ids, ("e",)]], call, marks)
    return Recipe(lowered(factors, "embedding", ("v",), plain=("v",)), (frozenset({0}),))


def conv(call: Call) -> Recipe:
    """conv1d/2d/3d: the batch and the output channels; the input channels sum, every rank adding its share of the bias.

    With groups, the groups: ``groups`` becomes this rank's.
    """
    return _conv(call, transposed=False)


def conv_transpose(call: Call) -> Recipe:
    """conv_transpose1d/2d/3d: as ``conv``; the weight has the input channels first."""
    return _conv(call, transposed=True)


def _conv(call: Call, transposed: bool) -> Recipe:
    ndim = len(call.inputs[1])
    if len(call.inputs[0]) not in (ndim - 1, ndim):
        return Recipe()
    space: Names = [ONE] * (ndim - 2)
    batch: Names = [("b",)] * (len(call.inputs[0]) - ndim + 1)
    bias = len(call.inputs) > 2
    if call.arguments.get("groups", 1) != 1:
        weight = [("g", "w"), ONE, *space]
        ins: list[Names] = [[*batch, ("g", "c"), *space], weight] + [[("g", "o")]] * bias
        factors = make_factors(ins, [[*batch, ("g", "o"), *space]], call, {})
        groups = _groups(call, transposed)
        if not isinstance(groups, int):
            return Recipe()
        return Recipe(resized(factors, "g", groups, "groups"), _products(call, 2))
    weight = [("c",), ("o",), *space] if transposed else [("o",), ("c",), *space]
    ins = [[*batch, ("c",), *space], weight] + [[("o",)]] * bias
    factors = make_factors(ins, [[*batch, ("o",), *space]], call, {"c": "+"})
    return Recipe(lowered(factors, "share", ("c",)) if bias else factors, _products(call, 2))


def _groups(call: Call, transposed: bool) -> Dim | None:
    """How many groups are left to split: an outer axis may have split some."""
    channels = len(call.inputs[0]) - len(call.inputs[1]) + 1
    sizes = (call.outputs[0] if transposed else call.inputs[0])[channels], call.inputs[1][1]
    return sizes[0] // sizes[1] if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None


def attention(call: Call) -> Recipe:
    """scaled_dot_product_attention: batch, heads and queries split; keys and the head size are whole. Queries and keys
    split together where the plan asks for a ring, in which the keys go round the ranks.

    With ``enable_gqa`` a key head serves several query heads: the key heads split, or query heads ``h``, whose rank
    takes the key heads that it needs. Causal, a rank's mask says where its queries stand.
    """
    q, k, v = call.inputs[:3]
    if not len(q) == len(k) == len(v) >= 2:
        return Recipe()
    lead = [(f"b{i}",) for i in reversed(range(len(q) - 2))]
    heads: Names = list(lead)
    if call.arguments.get("enable_gqa") and lead and not q[-3] == k[-3] == v[-3]:
        heads[-1] = (lead[-1][0], "r")
        if k[-3] != v[-3]:
            return Recipe()
    marks = {"d": "!", "s": "!"}
    if call.arguments.get("dropout_p") and len(heads) and len(heads[-1]) > 1 and k[-3] == 1:
        marks[heads[-1][0]] = "!"  # the lowering repeats key heads by the global ratio
    ins: list[Names] = [[*heads, ("q",), ("d",)], [*lead, ("s",), ("d",)], [*lead, ("s",), ("e",)]]
    for mask in call.inputs[3:]:
        if len(mask) > len(q):
            return Recipe()
        ins.append([*heads, ("q",), ("s",)][len(q) - len(mask) :])
    if call.arguments.get("enable_gqa") and lead and call.whole_inputs:
        of_all, keys_of_all = call.whole_inputs[0][-3], call.whole_inputs[1][-3]
        if q[-3] * keys_of_all != k[-3] * of_all:
            marks[lead[-1][0]] = "!"  # an outer axis splits the query heads alone
    causal = bool(call.arguments.get("is_causal"))
    cut = bool(call.whole_inputs) and call.whole_inputs[0][-2] != q[-2]
    if causal and (cut or call.arguments.get("dropout_p")):
        marks["q"] = "!"
    factors = make_factors(ins, [[*heads, ("q",), ("e",)]], call, marks)
    if causal:
        factors = lowered(factors, "causal", ("q",), plain=("q",))
    if len(heads[-1:]) and len(heads[-1]) > 1:
        factors += _query_heads(call, len(q) - 3)
    if call.arguments.get("dropout_p"):
        return Recipe(lowered(factors, "attention", plain=("h",)))  # a rank drops its part of the one mask
    return Recipe(factors + _ring(call), (frozenset({2}),))


def _ring(call: Call) -> tuple[Factor, ...]:
    """The sequence of queries, keys and values, which one axis alone may split; a mask speaks of all keys."""
    q, k, v = call.inputs[:3]
    whole = not call.whole_inputs or all(a[-2] == b[-2] for a, b in zip(call.whole_inputs[:3], (q, k, v), strict=True))
    shared = bool(call.arguments.get("enable_gqa")) and len(q) > 2
    heads = -3 if shared else -2
    alike = q[:heads] == k[:heads] == v[:heads] and k[:-2] == v[:-2] and q[-2] == k[-2] == v[-2]
    if not whole or not alike or any(len(mask) < 2 for mask in call.inputs[3:]):
        return ()
    masks = (At(len(mask) - 2) if mask[-2] != 1 else None for mask in call.inputs[3:])
    at = At(len(q) - 2)
    return (Factor("ring", q[-2], (at, at, at, *masks), (at,), "ring", plain=True),)


def _query_heads(call: Call, dim: int) -> tuple[Factor, ...]:
    """Query heads that share key heads, split without these; over one axis."""
    count = call.inputs[0][dim]
    if call.whole_inputs and call.whole_inputs[0][dim] != count:
        return ()
    masks = [dim - (len(call.inputs[0]) - len(mask)) for mask in call.inputs[3:]]
    at = [At(d) if d >= 0 and mask[d] != 1 else None for d, mask in zip(masks, call.inputs[3:], strict=True)]
    return (Factor("h", count, (At(dim), None, None, *at), (At(dim),), "heads", plain=True),)


def flash_attention(call: Call) -> Recipe:
    """_scaled_dot_product_flash_attention_for_cpu: as ``attention``; of its second result the dims go likewise."""
    recipe = attention(replace(call, outputs=call.outputs[:1]))
    if call.arguments.get("dropout_p"):
        return Recipe()
    return Recipe(tuple(replace(f, outputs=f.outputs * 2) for f in recipe.factors if _rows_only(f)))


def _rows_only(factor: Factor) -> bool:
    """Whether a factor is not the size of the values, which the log-sums lack; nor one that needs a lowering."""
    return factor.inputs[0] is not None and factor.outputs[0] is not None and factor.lowering is None


def convolution(call: Call) -> Recipe:
    """convolution: as ``conv``, or ``conv_transpose`` where it says so."""
    return _conv(call, transposed=bool(call.arguments["transposed"]))


def tensordot(call: Call) -> Recipe:
    """tensordot(x, y, dims of x, dims of y): the named dims sum, pair by pair."""
    a, b = (len(s) for s in call.inputs)
    ins = [[(f"x{i}",) for i in range(a)], [(f"y{i}",) for i in range(b)]]
    for k, (i, j) in enumerate(zip(call.dims("dims_self", a), call.dims("dims_other", b), strict=True)):
        ins[0][i] = ins[1][j] = (f"k{k}",)
    if call.arguments["dims_self"] == ():
        return Recipe()
    out = [n for names in ins for n in names if n[0][0] != "k"]
    marks = {n[0]: "+" for n in ins[0] if n[0][0] == "k"}
    return Recipe(make_factors(ins, [out], call, marks), _products(call, 2))


def vecdot(call: Call) -> Recipe:
    """linalg_vecdot(x, y, dim): the dim sums, the others follow."""
    ndim = len(call.inputs[0])
    if len(call.inputs[1]) != ndim or not ndim:
        return Recipe()
    names, dim = left(ndim), call.dim("dim", ndim)
    return Recipe(make_factors([names, names], [names[:dim] + names[dim + 1 :]], call, {names[dim][0]: "+"}))


def bilinear(call: Call) -> Recipe:
    """bilinear(x, y, w, b): each output feature has a matrix of its own; without a bias, either of its dims sums."""
    rows = left(len(call.inputs[0]) - 1)
    bias: list[Names] = [[("o",)]] * (len(call.inputs) - 3)
    ins: list[Names] = [[*rows, ("i",)], [*rows, ("j",)], [("o",), ("i",), ("j",)], *bias]
    mark = "!" if bias else "+"
    return Recipe(make_factors(ins, [[*rows, ("o",)]], call, {"i": mark, "j": mark}), _products(call, 3))


def solve(call: Call) -> Recipe:
    """linalg_solve, linalg_solve_triangular(A, B): batches, and the columns of B; its rows where A is on the right."""
    if len(call.inputs[0]) != len(call.inputs[1]) or call.inputs[0][:-2] != call.inputs[1][:-2]:
        return Recipe()  # B may be a batch of vectors
    lead = left(len(call.inputs[0]) - 2)
    sides: Names = [*lead, ("m",), ("k",)] if call.arguments.get("left", True) else [*lead, ("k",), ("m",)]
    if len(call.outputs) > 1:
        matrix: Names = [*lead, ONE, ONE]
        return Recipe(make_factors([matrix, matrix], [matrix, lead], call, {}))
    return Recipe(make_factors([[*lead, ("m",), ("n",)], sides], [sides], call, {"m": "!", "n": "!"}))


def fused_layer(call: Call) -> Recipe:
    """_transformer_encoder_layer_fwd, _native_multi_head_attention: a whole layer as one operator, of which the batch
    may be split; all weights are whole.
    """
    count = sum(name in call.arguments for name in ("src", "query", "key", "value"))
    ins: list[Names] = [[("b",), ONE, ONE]] * count + [[ONE] * len(s) for s in call.inputs[count:]]
    mask = call.operand("mask")
    if mask is not None and (call.arguments.get("mask_type") == 1 or len(call.inputs[mask]) > 2):
        ins[mask] = [("b",), *[ONE] * (len(call.inputs[mask]) - 1)]
    outs: list[Names] = [[("b",), *[ONE] * (len(s) - 1)] for s in call.outputs]
    return Recipe(make_factors(ins, outs, call, {})) if all(call.outputs) else Recipe()


def recurrent(call: Call) -> Recipe:
    """lstm, gru, rnn: the batch; the time runs, and every gate of a step needs the whole state of the one before."""
    if call.operand("input") is None or len(call.inputs[0]) != 3:
        return Recipe()
    states = 2 if "lstm" in call.name else 1
    state: Names = [ONE, ("b",), ONE]
    first: Names = [("b",), ONE, ONE] if call.arguments["batch_first"] else state
    ins: list[Names] = [first, *[state] * states, *([ONE] * len(s) for s in call.inputs[1 + states :])]
    return Recipe(make_factors(ins, [first, *[state] * states], call, {}))


def recurrent_cell(call: Call) -> Recipe:
    """lstm_cell, gru_cell, rnn_cell: one step; the batch."""
    states = 2 if "lstm" in call.name else 1
    if any(len(s) != 2 for s in call.inputs[: 1 + states]):
        return Recipe()
    row: Names = [("b",), ONE]
    ins: list[Names] = [row, *[row] * states, *([ONE] * len(s) for s in call.inputs[1 + states :])]
    return Recipe(make_factors(ins, [row] * len(call.outputs), call, {}))

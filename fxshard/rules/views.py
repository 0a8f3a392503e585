"""Rules of operators that only rename, regroup, cut or join dims.

A view regroups the elements of neighbouring dims: ``[b, (h d)] -> [b, h, d]``. Walking both shapes from the left,
the common factors of the two are found by division; each sits in one dim of either side, below a *prefix* of more
major factors. Splitting it cuts every one of the prefix's blocks alike (``At.blocks``).

    [b, 3 h d] -> [b, 3, h, d]      factor h: input At(1, blocks=(1, 1, 1)), output At(2)
    [6, 4] -> [8, 3]                factor of size gcd(6, 8): both At(0), and no other
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
from torch import fx

from fxshard.placement import normalize_blocks
from fxshard.rules.notation import make_factors
from fxshard.rules.recipe import At, Call, Dim, Factor, Recipe, Shape, bind, operands_of, shape_of
from fxshard.torch_internals import OpOverload

LINEAR = (frozenset({0}),)
MAX_PREFIX = 1024
Names = list[tuple[str, ...]]


def view(call: Call) -> Recipe:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: dims regrouped in order."""
    return Recipe(regroup(call.inputs[0], call.outputs[0]), LINEAR)


def regroup(source: Shape, target: Shape) -> tuple[Factor, ...]:
    """The factors of a view from ``source`` to ``target``.

    >>> for factor in regroup((2, 12), (2, 3, 4))[1:]:
    ...     print(factor.size, factor.inputs[0], factor.outputs[0])
    3 At(dim=1, blocks=(1,), shares=(), groups=None) At(dim=1, blocks=(1,), shares=(), groups=None)
    4 At(dim=1, blocks=(1, 1, 1), shares=(), groups=None) At(dim=2, blocks=(1,), shares=(), groups=None)
    """
    if 0 in source or 0 in target:
        return ()
    ins = [(i, s) for i, s in enumerate(source) if s != 1]
    outs = [(i, s) for i, s in enumerate(target) if s != 1]
    factors: list[Factor] = []
    i = j = 0
    prefix_in: Dim = 1
    prefix_out: Dim = 1
    while i < len(ins) and j < len(outs):
        left, right = ins[i][1], outs[j][1]
        size = left if left == right or _divides(left, right) else right if _divides(right, left) else None
        if size is None:
            if not isinstance(left, int) or not isinstance(right, int):
                break
            _add(factors, math.gcd(left, right), ins[i][0], prefix_in, outs[j][0], prefix_out)
            i, j = _skip(ins, outs, i, j)
            if i < 0:
                break
            prefix_in = prefix_out = 1
            continue
        _add(factors, size, ins[i][0], prefix_in, outs[j][0], prefix_out)
        rest_in, rest_out = _quotient(left, size), _quotient(right, size)
        ins[i], prefix_in = (ins[i][0], rest_in), prefix_in * size
        outs[j], prefix_out = (outs[j][0], rest_out), prefix_out * size
        if rest_in == 1:
            i, prefix_in = i + 1, 1
        if rest_out == 1:
            j, prefix_out = j + 1, 1
    return tuple(factors)


def _add(factors: list[Factor], size: Dim, dim_in: int, before_in: Dim, dim_out: int, before_out: Dim) -> None:
    if not isinstance(before_in, int) or not isinstance(before_out, int) or size == 1:
        return
    if max(before_in, before_out) > MAX_PREFIX:
        return
    at_in, at_out = At(dim_in, (1,) * before_in), At(dim_out, (1,) * before_out)
    factors.append(Factor(f"f{len(factors)}", size, (at_in,), (at_out,)))


def _divides(small: Dim, large: Dim) -> bool:
    if isinstance(small, int) and isinstance(large, int):
        return large % small == 0
    return (large / small).is_integer is True


def _quotient(size: Dim, by: Dim) -> Dim:
    if isinstance(size, int) and isinstance(by, int):
        return size // by
    ratio = sympy.sympify(size) / by
    return int(ratio) if ratio.is_number else ratio


def _skip(ins: list[tuple[int, Dim]], outs: list[tuple[int, Dim]], i: int, j: int) -> tuple[int, int]:
    """Past the dims that regroup together without a common factor; (-1, -1) where a size is symbolic."""
    left, right = ins[i][1], outs[j][1]
    i, j = i + 1, j + 1
    while left != right:
        if not isinstance(left, int) or not isinstance(right, int):
            return -1, -1
        if left < right and i < len(ins):
            left, i = left * ins[i][1], i + 1
        elif j < len(outs):
            right, j = right * outs[j][1], j + 1
        else:
            return -1, -1
    return i, j


def renamed(call: Call, order: Sequence[int]) -> Recipe:
    """A permutation: output dim ``i`` is input dim ``order[i]``."""
    names: Names = [(f"d{i}",) for i in range(len(call.inputs[0]))]
    return Recipe(make_factors([names], [[names[i] for i in order]], call, {}), LINEAR)


def transpose(call: Call) -> Recipe:
    """transpose(x, dim0, dim1)."""
    ndim = len(call.inputs[0])
    order = list(range(ndim))
    if ndim:
        first, second = ("axis0", "axis1") if "axis0" in call.arguments else ("dim0", "dim1")
        a, b = call.dim(first, ndim), call.dim(second, ndim)
        order[a], order[b] = order[b], order[a]
    return renamed(call, order)


def reverse(call: Call) -> Recipe:
    """t, numpy_T: the dims in the opposite order."""
    return renamed(call, range(len(call.inputs[0]))[::-1])


def matrix_transpose(call: Call) -> Recipe:
    """mT: the last two dims swapped."""
    ndim = len(call.inputs[0])
    return renamed(call, [*range(ndim - 2), ndim - 1, ndim - 2]) if ndim else Recipe()


def permute(call: Call) -> Recipe:
    """permute(x, dims)."""
    return renamed(call, call.dims("dims", len(call.inputs[0])))


def movedim(call: Call) -> Recipe:
    """movedim(x, source, destination)."""
    ndim = len(call.inputs[0])
    source, target = call.dims("source", ndim), call.dims("destination", ndim)
    order: list[int] = [-1] * ndim
    for a, b in zip(source, target, strict=True):
        order[b] = a
    rest = iter(d for d in range(ndim) if d not in source)
    return renamed(call, [next(rest) if d < 0 else d for d in order])


def expand(call: Call) -> Recipe:
    """expand, broadcast_to: dims aligned from the right; an expanded dim is new, and whole."""
    return Recipe(make_factors(*_aligned(call), call, {}), LINEAR)


def _aligned(call: Call) -> tuple[list[Names], list[Names]]:
    shape, result = call.inputs[0], call.outputs[0]
    offset = len(result) - len(shape)
    names: Names = [(f"d{i + offset}",) for i in range(len(shape))]
    kept = [i >= offset and shape[i - offset] == result[i] for i in range(len(result))]
    return [names], [[(f"d{i}",) if keep else ("1",) for i, keep in enumerate(kept)]]


def repeat(call: Call) -> Recipe:
    """repeat, tile: ``d -> (r d)``, a repeated dim is a row of blocks that are each cut alike."""
    ins, outs = _aligned(call)
    factors = make_factors(ins, outs, call, {})
    shape, result = call.inputs[0], call.outputs[0]
    for dim, size in enumerate(shape):
        at = dim + len(result) - len(shape)
        whole = result[at]
        if not isinstance(size, int) or not isinstance(whole, int) or size in (0, 1, whole):
            continue
        if whole and whole // size <= MAX_PREFIX:
            factors += (Factor(f"r{dim}", size, (At(dim),), (At(at, (1,) * (whole // size)),)),)
    return Recipe(factors, LINEAR)


def repeat_interleave(call: Call) -> Recipe:
    """repeat_interleave(x, repeats: int, dim): ``d -> (d r)``; without a dim, of all elements in a row."""
    ndim = len(call.inputs[0])
    given = call.arguments.get("output_size") is not None
    names: Names = [(f"d{i}",) for i in range(ndim)]
    if call.arguments.get("dim") is None:
        if not ndim or given:
            return Recipe(linear=LINEAR)
        return Recipe(make_factors([names], [[("d0", "r")]], call, {n[0]: "!" for n in names[1:]}), LINEAR)
    if not ndim:
        return Recipe(linear=LINEAR)
    dim = call.dim("dim", ndim)
    outs: Names = [(*n, "r") if i == dim else n for i, n in enumerate(names)]
    return Recipe(make_factors([names], [outs], call, {f"d{dim}": "!"} if given else {}), LINEAR)


def meshgrid(call: Call) -> Recipe:
    """meshgrid(tensors): every tensor's dim is one of each result's; ``xy`` exchanges the first two."""
    names: Names = [("1",) if not shape else (f"d{i}",) for i, shape in enumerate(call.inputs)]
    ins = [[name] if shape else [] for name, shape in zip(names, call.inputs, strict=True)]
    if call.arguments.get("indexing") == "xy" and len(names) > 1:
        names[:2] = names[1::-1]
    return Recipe(make_factors(ins, [names] * len(call.outputs), call, {}))


def diagonal(call: Call) -> Recipe:
    """diagonal(x, offset, dim1, dim2): two dims become a last one; the others follow."""
    ndim = len(call.inputs[0])
    names: Names = [(f"d{i}",) for i in range(ndim)]
    gone = (call.dim("dim1", ndim, 0), call.dim("dim2", ndim, 1))
    rest = [n for i, n in enumerate(names) if i not in gone]
    return Recipe(make_factors([names], [[*rest, ("1",)]], call, {f"d{i}": "!" for i in gone}), LINEAR)


def triangle(call: Call) -> Recipe:
    """tril, triu: the last two dims are whole."""
    names: Names = [(f"d{i}",) for i in range(len(call.inputs[0]))]
    return Recipe(make_factors([names], [names], call, {n[0]: "!" for n in names[-2:]}), LINEAR)


def pad(call: Call) -> Recipe:
    """pad: dims that are not padded follow; linear unless it pads with a number."""
    ndim = len(call.inputs[0])
    amounts = list(call.arguments["pad"])
    constant = call.arguments.get("mode", "constant") == "constant"
    if not constant:
        padded = set(range(ndim - len(amounts) // 2, ndim))
    else:
        padded = {ndim - 1 - i // 2 for i, a in enumerate(amounts) if not isinstance(a, int) or a != 0}
    names: Names = [(f"d{i}",) for i in range(ndim)]
    linear = not constant or call.arguments.get("value") in (None, 0, 0.0)
    factors = make_factors([names], [names], call, {f"d{d}": "!" for d in padded})
    return Recipe(factors, LINEAR if linear else ())


def select(call: Call) -> Recipe:
    """select(x, dim, index): the dim goes, and must be whole."""
    ndim = len(call.inputs[0])
    dim = call.dim("dim", ndim)
    names: Names = [(f"d{i}",) for i in range(ndim)]
    return Recipe(make_factors([names], [names[:dim] + names[dim + 1 :]], call, {}), LINEAR)


def unbind(call: Call) -> Recipe:
    """unbind(x, dim): as select, one result an index."""
    ndim = len(call.inputs[0])
    dim = call.dim("dim", ndim, 0)
    names: Names = [(f"d{i}",) for i in range(ndim)]
    rest = names[:dim] + names[dim + 1 :]
    return Recipe(make_factors([names], [rest] * len(call.outputs), call, {}), LINEAR)


def cut(call: Call) -> Recipe:
    """split, chunk, slice, narrow: the cut dim is whole, or every block of it is cut alike by the axis.

    The second needs an operand that is already split in blocks whose borders the cut respects: a packed QKV.
    """
    ndim = len(call.inputs[0])
    if len(call.inputs) != 1:
        return Recipe()  # cut at positions that a tensor holds
    dim = call.dim("dim", ndim, 0)
    names: Names = [(f"d{i}",) for i in range(ndim)]
    outs = [list(names) for _ in call.outputs]
    marks = {names[dim][0]: "!"}
    if all(shape[dim] == call.inputs[0][dim] for shape in call.outputs):
        marks = {}
    factors = make_factors([names], outs, call, marks)
    return Recipe(factors + tuple(_block_cut(call, dim)) + _every_nth(call, dim), LINEAR)


def segments(call: Call, dim: int) -> list[tuple[int, int]] | None:
    """The [start, end) of each result along ``dim``; None where that is not known."""
    size, whole = call.inputs[0][dim], call.whole_inputs[0][dim]
    if not isinstance(size, int) or size != whole or not all(isinstance(s[dim], int) for s in call.outputs):
        return None
    if call.name in ("aten.slice", "aten.narrow"):
        start = call.arguments.get("start")
        start = 0 if start is None else start
        if call.arguments.get("step", 1) != 1 or not isinstance(start, int):
            return None
        start = max(0, min(start + size if start < 0 else start, size))
        return [(start, start + int(call.outputs[0][dim]))]
    out, start = [], 0
    for shape in call.outputs:
        out.append((start, start + int(shape[dim])))
        start = out[-1][1]
    return out


def segments_of(node: fx.Node, dim: int) -> list[tuple[int, int]] | None:
    """``segments`` of a cut in a graph, along the dim that it cuts; None where it cuts another one."""
    value = node.meta["val"]
    inputs = tuple(shape_of(o.meta["val"]) for o in operands_of(node))
    outputs = tuple(map(shape_of, value)) if isinstance(value, (list, tuple)) else (shape_of(value),)
    assert isinstance(node.target, OpOverload)
    arguments = bind(node)
    if not isinstance(arguments.get("dim", 0), int) or arguments.get("dim", 0) % len(inputs[0]) != dim:
        return None
    name = "aten." + node.target._schema.name.split("::")[1]
    return segments(Call(name, inputs, outputs, arguments, inputs), dim)


def _every_nth(call: Call, dim: int) -> tuple[Factor, ...]:
    """``x[..., 1::2]`` of interleaved pairs: ``(f step) -> f``, every rank takes its own ones."""
    step, size, kept = call.arguments.get("step", 1), call.inputs[0][dim], call.outputs[0][dim]
    start = call.arguments.get("start") or 0
    if call.name != "aten.slice" or step == 1 or not isinstance(step, int) or not isinstance(start, int):
        return ()
    if not isinstance(size, int) or not 0 <= start < step or kept * step != size:
        return ()
    return (Factor("nth", kept, (At(dim),), (At(dim),)),)


def _block_cut(call: Call, dim: int) -> list[Factor]:
    carried = call.carried[0] if call.carried else None
    parts = segments(call, dim)
    size = call.inputs[0][dim]
    if carried is None or carried.dim != dim or parts is None or not isinstance(size, int):
        return []
    unit, borders = size // sum(carried.blocks), [0]
    for block in carried.blocks:
        borders.append(borders[-1] + block * unit)
    outs: list[At | None] = []
    for start, end in parts:
        if start not in borders or end not in borders or start == end:
            return []
        inside = carried.blocks[borders.index(start) : borders.index(end)]
        outs.append(At(dim, normalize_blocks(inside)))
    if len(carried.blocks) == len(parts) == 1:
        return []
    return [Factor("block", unit, (carried,), tuple(outs))]


def cat(call: Call) -> Recipe:
    """cat, concat: the joined dim is whole, or each operand's part of it is cut alike."""
    shapes = call.inputs
    ndim = len(call.outputs[0])
    joins = [len(shape) == ndim for shape in shapes]  # cat passes over empty tensors of one dim, as caches begin
    linear = (frozenset(range(len(shapes))),)
    if not all(fits or shape == (0,) for fits, shape in zip(joins, shapes, strict=True)):
        return Recipe(linear=linear)
    dim = call.dim("dim", ndim, 0)
    names: Names = [(f"d{i}",) for i in range(ndim)]
    factors = make_factors([names if fits else [("1",)] for fits in joins], [names], call, {f"d{dim}": "!"})
    if all(joins) and any(at is not None and at.dim == dim for at in call.carried):
        factors += tuple(_block_cat(call, dim))
    return Recipe(factors, linear)


def _block_cat(call: Call, dim: int) -> list[Factor]:
    sizes = [shape[dim] for shape in call.inputs]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return []
    ats = [at if at is not None and at.dim == dim else At(dim) for at in call.carried]
    total = math.lcm(*(sum(at.blocks) for at in ats))
    blocks = [b * size * total // sum(at.blocks) for at, size in zip(ats, sizes, strict=True) for b in at.blocks]
    smallest = math.gcd(*(s // sum(at.blocks) for at, s in zip(ats, sizes, strict=True)))
    return [Factor("block", smallest, tuple(ats), (At(dim, normalize_blocks(blocks)),))]


def stack(call: Call) -> Recipe:
    """stack: a new dim, which is whole."""
    ndim = len(call.outputs[0])
    dim = call.dim("dim", ndim, 0)
    names: Names = [(f"d{i}",) for i in range(ndim - 1)]
    outs: Names = [*names[:dim], ("1",), *names[dim:]]
    count = len(call.inputs)
    return Recipe(make_factors([names] * count, [outs], call, {}), (frozenset(range(count)),))


def joined(call: Call) -> Recipe:
    """hstack, vstack, dstack, column_stack: the joined dim is whole; every other one follows, where none is new."""
    ndim = len(call.outputs[0])
    dim = {"vstack": 0, "row_stack": 0, "dstack": 2}.get(call.name.split(".")[-1], 1)
    if any(len(shape) != ndim for shape in call.inputs) or dim >= ndim:
        return Recipe()
    names: Names = [(f"d{i}",) for i in range(ndim)]
    return Recipe(make_factors([names] * len(call.inputs), [names], call, {f"d{dim}": "!"}))


def diag_embed(call: Call) -> Recipe:
    """diag_embed(x, offset, dim1, dim2): the last dim becomes two; the others follow."""
    ndim = len(call.outputs[0])
    gone = {call.dim("dim1", ndim, -2), call.dim("dim2", ndim, -1)}
    rest = iter([(f"d{i}",) for i in range(ndim - 2)])
    out: Names = [("1",) if i in gone else next(rest) for i in range(ndim)]
    return Recipe(make_factors([[*[(f"d{i}",) for i in range(ndim - 2)], ("1",)]], [out], call, {}))

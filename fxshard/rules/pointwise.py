"""Rules of operators that treat every element alike: pointwise ones, and what only looks so."""

from __future__ import annotations

import torch

from fxshard.rules.names import ONE, Names, left, lowered, right
from fxshard.rules.notation import make_factors
from fxshard.rules.recipe import At, Call, Factor, Recipe

LINEAR = (frozenset({0}),)


def pointwise(call: Call) -> Recipe:
    """Every dim is a factor; operands broadcast."""
    if any(len(s) != len(call.outputs[0]) for s in call.outputs):
        return Recipe()
    return Recipe(make_factors([right(len(s)) for s in call.inputs], [right(len(s)) for s in call.outputs], call, {}))


def where(call: Call) -> Recipe:
    """where(condition, a, b): pointwise; where(condition) alone asks for positions, and is whole."""
    return pointwise(call) if "self" in call.arguments else Recipe()


def cast(call: Call) -> Recipe:
    """to, _to_copy: pointwise, and linear where no value is rounded. Of another tensor only the type is read."""
    names = left(len(call.inputs[0]))
    others: list[Names] = [[ONE] * len(s) for s in call.inputs[1:]]
    factors = make_factors([names, *others], [names], call, {})
    source = call.dtype("self")
    target = call.dtype("other") or call.arguments.get("dtype") or source
    exact = source is not None and target is not None and _holds(target, source)
    linear = exact and (target == source or bool(target and (target.is_floating_point or target.is_complex)))
    return Recipe(factors, LINEAR if linear else (), unread=frozenset(range(1, len(call.inputs))))


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of one dtype is one of another, too."""
    if wide == narrow:
        return True
    if narrow.itemsize == 1 and narrow.is_floating_point:  # float8, which torch does not promote
        return wide.itemsize > 1 and (wide.is_floating_point or wide.is_complex)
    return not (wide.itemsize == 1 and wide.is_floating_point) and torch.promote_types(narrow, wide) == wide


def masked_fill(call: Call) -> Recipe:
    """masked_fill(x, mask, value): pointwise; linear where it fills with zeros."""
    zero = call.arguments.get("value") in (0, 0.0, False) and call.operand("value") is None
    return Recipe(pointwise(call).factors, LINEAR if zero else ())


def dropout(call: Call) -> Recipe:
    """dropout: every rank draws the mask of the whole tensor, and keeps its part."""
    if not call.arguments.get("train"):
        return pointwise(call)
    return Recipe(lowered(pointwise(call).factors, "dropout"))


def prelu(call: Call) -> Recipe:
    """prelu(x, weight): one slope for all, or one a channel (dim 1)."""
    names = left(len(call.inputs[0]))
    shared = len(call.inputs[1]) != 1 or call.inputs[1][0] == 1 or len(names) < 2
    return Recipe(make_factors([names, [ONE] * len(call.inputs[1]) if shared else [names[1]]], [names], call, {}))


def shape_only(call: Call) -> Recipe:
    """new_ones and the like: the operand gives dtype and device, and is not read."""
    return Recipe(unread=frozenset(range(len(call.inputs))))


def never(call: Call) -> Recipe:
    """An operator that is never split."""
    return Recipe()


def glu(call: Call) -> Recipe:
    """glu(x, dim): two halves of a dim, multiplied: pointwise where both halves are cut alike."""
    ndim = len(call.inputs[0])
    names, dim = left(ndim), call.dim("dim", ndim, -1)
    factors = make_factors([names], [names], call, {names[dim][0]: "!"})
    half = Factor("half", call.outputs[0][dim], (At(dim, (1, 1)),), (At(dim),))
    return Recipe((*factors, half))


def elementwise_loss(call: Call) -> Recipe:
    """mse_loss and the like: pointwise with reduction none, a sum with reduction sum, a mean with mean."""
    reduction = call.arguments.get("reduction", 1)
    if any(s != call.inputs[0] for s in call.inputs[:2]):
        return Recipe()
    ins = [right(len(s)) for s in call.inputs]
    names = right(len(call.inputs[0]))
    if reduction == 0:
        return Recipe(make_factors(ins, [names], call, {}))
    factors = make_factors(ins, [[]], call, {n[0]: "+" for n in names})
    return Recipe(lowered(factors, "mean" if reduction == 1 else None))


def cosine_similarity(call: Call) -> Recipe:
    """cosine_similarity, cross: operands broadcast, the dim they contract is whole."""
    ins = [right(len(s)) for s in call.inputs]
    ndim = max(len(s) for s in call.inputs)
    names = right(ndim)
    if call.arguments.get("dim") is None or not ndim:
        return Recipe()
    dim = call.dim("dim", ndim)
    out = names if len(call.outputs[0]) == ndim else names[:dim] + names[dim + 1 :]
    return Recipe(make_factors(ins, [out], call, {names[dim][0]: "!"}))

"""Looking ahead from a call: whether what it would leave split is needed whole soon after.

A norm over a split dim keeps its result split, for two small exchanges. Where a reader gathers that result all the
same, such as a column weight, nothing is gained, and what is split goes on to split what it is added to: then the
operand is gathered once, in front.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxshard.ir.facts import Facts, recipe_of
from fxshard.placement import REPLICATE, Cut, is_shard, same
from fxshard.rules.recipe import At, Factor

LOOK_AHEAD = 6
"""How many calls ahead are looked at."""


def read_whole(fact: Facts, at: At, size: int, sizes: Sequence[int]) -> bool:
    """Whether a reader, or one behind it, cannot use the result of ``fact`` split ``at``, or has a weight split else.

    ``size`` and ``sizes`` are those of the axis at hand and of the outer ones.
    """
    seen, latest = {fact}, [(fact, at)]
    for _ in range(LOOK_AHEAD):
        further = []
        for value, where in latest:
            for reader in value.readers:
                if reader in seen or reader.node.op != "call_function" or reader.given is not None:
                    continue  # a constraint is no call: whatever it asks for is asked for either way
                seen.add(reader)
                usable, out = _use(reader, value, where, size, sizes)
                if not usable:
                    return True
                further += [(reader, out)] if out is not None and not reader.is_list else []
        latest = further
    return False


def _use(reader: Facts, value: Facts, at: At, size: int, sizes: Sequence[int]) -> tuple[bool, At | None]:
    """Whether a reader can use ``value`` split ``at``, and how its own result is then split, if it is."""
    if any(o.is_list for o in reader.operands):
        return False, None
    current = [o.current[0] if o.current else REPLICATE for o in reader.operands]
    recipe = recipe_of(reader, sizes, current)
    position = reader.operands.index(value)
    if recipe is None or position in recipe.unread:
        return recipe is not None, None
    for factor in recipe.factors:
        cut = factor.cut_for(factor.inputs[position], at, size)
        if cut is not None:
            out = factor.outputs[0]
            return not _moves_weight(reader, factor, cut), None if out is None else out.cut(cut)
    return False, None


def _moves_weight(reader: Facts, factor: Factor, cut: Cut) -> bool:
    """Whether splitting ``factor`` would gather or move a weight that is stored split."""
    for operand, at in zip(reader.operands, factor.inputs, strict=True):
        stored = operand.current[0] if operand.stored and operand.current else REPLICATE
        if is_shard(stored) and not same(stored, REPLICATE if at is None else at.placement(cut)):
            return True
    return False

"""What propagation knows of a node while it runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import fx

from fxshard.ir.conversions import CONVERSIONS
from fxshard.ir.info import Choice, has_info, info_of, is_float, values_of
from fxshard.placement import (
    PARTIAL,
    REPLICATE,
    VARYING,
    Cut,
    Groups,
    Placement,
    is_grouped,
    is_shard,
    is_uneven,
    local_shape,
)
from fxshard.rules.lookup import recipe_for
from fxshard.rules.recipe import At, Factor, Recipe, Shape, is_list, operands_of, shape_of


@dataclass(eq=False)
class Facts:
    """One node: its operands and readers, and how it is placed on the axes decided so far.

    Attributes:
        is_list: whether it gives a list of tensors, of which others take one.
        given: the placements that the plan fixes; None leaves an axis open.
        differentiable: whether a gradient may flow through it.
        stored: whether it is a weight, or a view of one.
        current: the placement of each result on the latest axis.
    """

    node: fx.Node
    shapes: tuple[Shape, ...]
    is_list: bool
    num_bytes: int
    is_float: bool
    given: tuple[Placement | None, ...] | None
    operands: list[Facts] = field(default_factory=list)
    readers: list[Facts] = field(default_factory=list)
    differentiable: bool = False
    stored: bool = False
    current: tuple[Placement, ...] = ()
    per_axis: list[tuple[Placement, ...]] = field(default_factory=list)
    choices: list[Choice | None] = field(default_factory=list)

    @staticmethod
    def of(node: fx.Node) -> Facts:
        """Reads a node; what needs other nodes is filled in by ``propagate``."""
        values = values_of(node)
        shapes = tuple(shape_of(v) for v in values)
        size = 1
        for dim in shapes[0] if shapes else ():
            size *= dim if isinstance(dim, int) else 64  # a symbolic size weighs as a typical one in comparisons
        itemsize = values[0].element_size() if values and isinstance(values[0], torch.Tensor) else 1
        given = info_of(node).given if has_info(node) else None
        return Facts(node, shapes, is_list(node), size * itemsize, any(map(is_float, values)), given)

    def close(self, choice: Choice | None) -> None:
        """Records the decision of one axis."""
        self.choices.append(choice)
        self.per_axis.append(())
        self._set_current()

    def replace(self, choice: Choice) -> None:
        """Changes the decision of the latest axis."""
        self.choices[-1] = choice
        self._set_current()

    def _set_current(self) -> None:
        choice = self.choices[-1]
        self.current = choice.outputs if choice else (REPLICATE,) * len(self.shapes)
        self.per_axis[-1] = self.current


def recipe_of(fact: Facts, sizes: Sequence[int], current: Sequence[Placement]) -> Recipe | None:
    """What the rule says of a call on the parts that the outer axes, of ``sizes``, leave; None where there is none."""
    if not any(fact.choices[: len(sizes)]):
        recipe = recipe_for(fact.node, tuple(o.shapes[0] for o in fact.operands), fact.shapes, current)
        return _named(recipe, fact.node)
    choices = fact.choices[: len(sizes)]
    operands = [
        (operand.shapes[0], tuple((c.inputs[i] if c else None) or REPLICATE for c in choices))
        for i, operand in enumerate(fact.operands)
    ]
    results = [(s, tuple(axis[k] for axis in fact.per_axis[: len(sizes)])) for k, s in enumerate(fact.shapes)]
    return recipe_on_parts(fact.node, operands, results, sizes, current)


Placed: TypeAlias = tuple[Shape, tuple[Placement, ...]]


def recipe_on_parts(
    node: fx.Node,
    operands: Sequence[Placed],
    results: Sequence[Placed],
    sizes: Sequence[int],
    current: Sequence[Placement],
) -> Recipe | None:
    """What a rule says of a call whose operands and results the outer axes, of ``sizes``, cut.

    Where they cut unevenly the ranks' parts have different shapes: only what the rule says of all of them is said.
    """
    if not sizes:
        return _named(recipe_for(node, tuple(s for s, _ in operands), tuple(s for s, _ in results), current), node)

    def at(position: Sequence[int]) -> Recipe | None:
        inputs = tuple(local_shape(shape, placed, sizes, position) for shape, placed in operands)
        outputs = tuple(local_shape(shape, placed, sizes, position) for shape, placed in results)
        if any(position) and any(0 in shape for shape in (*inputs, *outputs)):
            return first  # an empty part: whatever is done with it is right
        return recipe_for(node, inputs, outputs, current)

    first = _named(at((0,) * len(sizes)), node)
    if first is not None:
        placed = [placements for _, placements in (*operands, *results)]
        first = replace(first, factors=tuple(f for f in first.factors if _beside(f, placed)))
    uneven = [any(is_uneven(placed[a : a + 1]) for _, placed in (*operands, *results)) for a in range(len(sizes))]
    if first is None or not any(uneven):
        return first
    factors = first.factors
    for position in itertools.product(*(range(n if u else 1) for n, u in zip(sizes, uneven, strict=True))):
        other = _named(at(position), node)
        assert other is not None
        factors = tuple(common for f in factors if (common := _common(f, other.factors)) is not None)
    return replace(first, factors=factors)


def value_name(node: fx.Node) -> str:
    """The name of the value that a node holds in one form or another: conversions give it others."""
    while node.target in CONVERSIONS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.name


def _named(recipe: Recipe | None, node: fx.Node) -> Recipe | None:
    """The recipe of a call whose groups of rows are named: by the operand that says where they end."""
    if recipe is None or all(f.lowering != "experts" for f in recipe.factors):
        return recipe
    operands = operands_of(node)

    def named(at: At | None, rows: int) -> At | None:
        if at is None or not isinstance(at.groups, int):
            return at
        return at._replace(groups=Groups(value_name(operands[at.groups]), rows))

    factors = []
    for factor in recipe.factors:
        at = factor.inputs[0]
        if factor.lowering == "experts" and at is not None:
            rows = shape_of(values_of(operands[0])[0])[at.dim]
            assert isinstance(rows, int)
            inputs, outputs = (tuple(named(a, rows) for a in side) for side in (factor.inputs, factor.outputs))
            factor = replace(factor, inputs=inputs, outputs=outputs)
        factors.append(factor)
    return replace(recipe, factors=tuple(factors))


def _beside(factor: Factor, placed: Sequence[tuple[Placement, ...]]) -> bool:
    """Whether a factor goes with how the outer axes cut: one axis alone cuts rows that lie in groups."""
    for at, placements in zip((*factor.inputs, *factor.outputs), placed, strict=True):
        outer = [p for p in placements if at is not None and is_shard(p) and p.dim == at.dim]
        if any(map(is_grouped, outer)) or (outer and at is not None and at.groups is not None):
            return False
    return True


def _common(factor: Factor, others: Sequence[Factor]) -> Factor | None:
    for other in others:
        alike = replace(factor, size=0) == replace(other, size=0)
        if alike and isinstance(factor.size, int) and isinstance(other.size, int):
            return replace(factor, size=math.gcd(factor.size, other.size))
        if alike and factor.size == other.size:
            return factor
    return None


def may_lower(choices: Sequence[Choice | None], factor: Factor) -> bool:
    """Whether the lowering of a factor goes with those that the outer axes chose: a call has one kind of them."""
    earlier = {c.lowering for c in choices if c is not None and c.lowering}
    if factor.lowering in ("embedding", "experts", "picked", "added"):
        return not earlier
    return not earlier or factor.lowering in earlier or (factor.lowering is None and earlier != {"attention"})


def split_choice(
    factor: Factor, cut: Cut, differentiable: Sequence[bool], unread: frozenset[int], leader: int
) -> Choice:
    """The choice of splitting ``factor`` as ``cut`` says."""
    inputs: list[Placement | None] = []
    for i, at in enumerate(factor.inputs):
        if i in unread and at is None:
            inputs.append(None)
        elif at is not None:
            inputs.append(at.placement(cut))
        else:
            inputs.append(VARYING if differentiable[i] else REPLICATE)
    lacking = REPLICATE if factor.reduced else PARTIAL
    outputs = tuple(lacking if at is None else at.placement(cut) for at in factor.outputs)
    return Choice("split", tuple(inputs), outputs, factor.name, factor.lowering, f"operand {leader}")

"""What propagation knows of a node while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxshard.passes.typing import Choice, has_info, info_of, is_float, values_of
from fxshard.placement import PARTIAL, REPLICATE, VARYING, Placement, local_shape
from fxshard.rules.recipe import Factor, Shape, shape_of


@dataclass(eq=False)
class Facts:
    """One node: its operands and readers, and how it is placed on the axes decided so far.

    Attributes:
        given: the placements that the plan fixes; None leaves an axis open.
        differentiable: whether a gradient may flow through it.
        stored: whether it is a weight, or a view of one.
        current: the placement of each result on the latest axis.
    """

    node: fx.Node
    shapes: tuple[Shape, ...]
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
        return Facts(node, shapes, size * itemsize, any(map(is_float, values)), given)

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
        self.current = choice.outputs if choice else (REPLICATE,) * max(len(self.shapes), 1)
        self.per_axis[-1] = self.current


def input_shapes(fact: Facts, sizes: Sequence[int]) -> tuple[Shape, ...]:
    """The operands' shapes after the axes of ``sizes`` cut them."""
    if not any(fact.choices[: len(sizes)]):
        return tuple(o.shapes[0] for o in fact.operands)
    out = []
    for i, operand in enumerate(fact.operands):
        placements = [(c.inputs[i] if c else None) or REPLICATE for c in fact.choices[: len(sizes)]]
        out.append(local_shape(operand.shapes[0], tuple(placements), sizes))
    return tuple(out)


def output_shapes(fact: Facts, sizes: Sequence[int]) -> tuple[Shape, ...]:
    """The results' shapes after the axes of ``sizes`` cut them."""
    if not any(fact.choices[: len(sizes)]):
        return fact.shapes
    return tuple(
        local_shape(shape, tuple(axis[k] for axis in fact.per_axis[: len(sizes)]), sizes)
        for k, shape in enumerate(fact.shapes)
    )


def may_lower(choices: Sequence[Choice | None], factor: Factor) -> bool:
    """Whether the lowering of a factor goes with those that the outer axes chose: a call has one kind of them."""
    earlier = {c.lowering for c in choices if c is not None and c.lowering}
    if factor.lowering == "embedding":
        return not earlier
    return not earlier or factor.lowering in earlier or (factor.lowering is None and earlier != {"attention"})


def split_choice(
    factor: Factor, blocks: tuple[int, ...], differentiable: Sequence[bool], unread: frozenset[int], leader: int
) -> Choice:
    """The choice of splitting ``factor`` in ``blocks``."""
    inputs: list[Placement | None] = []
    for i, at in enumerate(factor.inputs):
        if i in unread and at is None:
            inputs.append(None)
        elif at is not None:
            inputs.append(at.placement(blocks))
        else:
            inputs.append(VARYING if differentiable[i] else REPLICATE)
    lacking = REPLICATE if factor.reduced else PARTIAL
    outputs = tuple(lacking if at is None else at.placement(blocks) for at in factor.outputs)
    return Choice("split", tuple(inputs), outputs, factor.name, factor.lowering, f"operand {leader}")

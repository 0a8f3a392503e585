"""Views, cuts and joins: where their factors sit."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from fxshard.rules.recipe import At, Call, Recipe, Shape
from fxshard.rules.table import find_rule
from fxshard.rules.views import MAX_PREFIX, regroup

aten = torch.ops.aten


def where(source: Shape, target: Shape) -> list[tuple[Any, Any, Any]]:
    """For every factor its size, and where it sits in operand and result."""
    return [(f.size, f.inputs[0], f.outputs[0]) for f in regroup(source, target)]


def recipe(operator: Any, inputs: tuple[Shape, ...], outputs: tuple[Shape, ...], at: Any = (), **named: Any) -> Recipe:
    rule = find_rule(operator)
    assert rule is not None
    return rule.function(Call(rule.name, inputs, outputs, named, inputs, at))


def test_split_heads() -> None:
    assert where((2, 12), (2, 3, 4)) == [(2, At(0), At(0)), (3, At(1), At(1)), (4, At(1, (1, 1, 1)), At(2))]


def test_merge_heads() -> None:
    assert where((2, 3, 4), (2, 12)) == [(2, At(0), At(0)), (3, At(1), At(1)), (4, At(2), At(1, (1, 1, 1)))]


def test_packed_projection() -> None:
    """The heads of ``(3 h)`` repeat thrice along the packed dim."""
    assert (8, At(1, (1, 1, 1)), At(2)) in where((2, 24), (2, 3, 8))


def test_no_common_factor() -> None:
    assert where((6, 4), (8, 3)) == [(2, At(0), At(0))]
    assert where((4, 9), (9, 4)) == []


def test_ones_come_and_go() -> None:
    assert where((1, 6, 1), (6,)) == [(6, At(1), At(0))]
    assert where((), (1, 1)) == []


def test_empty() -> None:
    assert where((0, 4), (4, 0)) == []


def test_long_prefixes_are_left_out() -> None:
    assert where((MAX_PREFIX * 2, 4), (MAX_PREFIX * 8,)) == [(MAX_PREFIX * 2, At(0), At(0))]


def test_symbolic_batch() -> None:
    batch = sympy.Symbol("s0", positive=True, integer=True)
    assert where((batch, 12), (batch, 3, 4))[0] == (batch, At(0), At(0))
    assert where((4, batch, 8), (4 * batch, 8))[0] == (4, At(0), At(0))


@pytest.mark.parametrize(
    ("operator", "shape", "order"),
    [
        (aten.mT.default, (2, 4, 3), (0, 2, 1)),
        (aten.mH.default, (2, 4, 3), (0, 2, 1)),
        (aten.adjoint.default, (2, 4, 3), (0, 2, 1)),
        (aten.numpy_T.default, (4, 3, 2), (2, 1, 0)),
    ],
)
def test_transposes(operator: Any, shape: Shape, order: tuple[int, ...]) -> None:
    factors = recipe(operator, ((2, 3, 4),), (shape,)).factors
    assert [f.inputs for f in factors] == [(At(0),), (At(1),), (At(2),)]
    assert [f.outputs for f in factors] == [(At(order.index(i)),) for i in range(3)]


def test_an_expanded_dim_is_whole() -> None:
    assert [f.outputs for f in recipe(aten.expand.default, ((4, 1),), ((2, 4, 6),)).factors] == [(At(1),)]


@pytest.mark.parametrize("blocks", [(1, 1), (2, 1), (1, 1, 2)])
def test_a_cut_at_the_borders_of_blocks(blocks: tuple[int, ...]) -> None:
    """Each block is a result, cut by the axis: its units are those of the smallest block."""
    shapes = tuple((2, 4 * b) for b in blocks)
    whole = ((2, 4 * sum(blocks)),)
    named = {"split_sizes": [s[1] for s in shapes], "dim": 1}
    found = recipe(aten.split_with_sizes.default, whole, shapes, (At(1, blocks),), **named)
    (factor,) = (f for f in found.factors if f.name == "block")
    assert (factor.size, factor.inputs, factor.outputs) == (4, (At(1, blocks),), tuple(At(1) for _ in blocks))
    plain = recipe(aten.split_with_sizes.default, whole, shapes, (At(1),), **named)
    assert [f.name for f in plain.factors] == ["d0"]


def test_a_join_of_parts_that_are_cut_alike() -> None:
    found = recipe(aten.cat.default, ((2, 8), (2, 4)), ((2, 12),), (At(1), At(1)), dim=1)
    assert found.factors[-1].inputs == (At(1), At(1))
    assert found.factors[-1].outputs == (At(1, (2, 1)),)
    assert [f.name for f in recipe(aten.cat.default, ((2, 8), (2, 4)), ((2, 12),), (), dim=1).factors] == ["d0"]

"""Views: random regroupings of random shapes, proven by splitting them."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxshard.inspect.prove import check_rule
from fxshard.rules.recipe import At
from fxshard.rules.views import regroup
from tests.rules.samples import aten, r


@st.composite
def regroupings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of one number of elements: products of the same primes, grouped in two ways."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 2, 3, 3]), min_size=1, max_size=6))

    def group() -> list[int]:
        borders = sorted(draw(st.lists(st.integers(0, len(primes)), max_size=4)))
        edges = [0, *borders, len(primes)]
        return [math.prod(primes[a:b]) for a, b in itertools.pairwise(edges)]

    return group(), group()


@settings(max_examples=150)
@given(regroupings())
def test_a_random_view(shapes: tuple[list[int], list[int]]) -> None:
    source, target = shapes
    check_rule(aten.view.default, [(r(*source), target)], meshes=[(2,), (3,), (2, 2), (2, 3)])


@settings(max_examples=60)
@given(st.permutations([2, 3, 4, 6]), st.permutations([2, 3, 4, 6]))
def test_a_view_of_permuted_sizes(source: list[int], target: list[int]) -> None:
    """Sizes that do not nest: only what both sides cut at the same place may be split."""
    check_rule(aten.reshape.default, [(r(*source), target)], meshes=[(2,), (3,), (2, 2)])


def test_the_factors_of_a_packed_dim() -> None:
    third, heads, size = regroup((3 * 4 * 8,), (3, 4, 8))
    assert (third.inputs, third.outputs) == ((At(0),), (At(0),))
    assert (heads.inputs, heads.outputs) == ((At(0, (1,) * 3),), (At(1),))
    assert (size.inputs, size.outputs) == ((At(0, (1,) * 12),), (At(2),))


def test_sizes_without_a_common_factor_split_nothing() -> None:
    assert regroup((4, 9), (9, 4)) == ()
    assert regroup((0, 4), (4, 0)) == ()
    assert torch.zeros(0, 4).view(4, 0).shape == (4, 0)

"""Calls bound in plain Python: the leaves that ``Captured.flatten_inputs`` gives, or None where it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import fxshard
from fxshard.capture.binding import Binding
from fxshard.capture.capture import capture
from fxshard.capture.captured import Captured
from fxshard.errors import InputError


class Model(nn.Module):
    def forward(self, x: Any, y: Any = None, /, mask: Any = None, *, flag: bool = True, **rest: Any) -> Any:
        out = x["a"] * (2 if flag else 3)
        for value in (y, mask, *rest.values()):
            out = out if value is None else out + value
        return out


A, B = torch.ones(4, 3), torch.zeros(4, 3)

CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (({"a": A},), {}),
    (({"a": A}, None), {"mask": None}),
    (({"a": A}, B, B), {}),
    (({"a": A}, B), {"mask": B}),
    (({"a": A}, B), {"mask": B, "flag": True}),
    (({"a": A}, B), {"mask": B, "flag": False}),
    (({"a": A},), {"z": B, "w": B}),
    (({"a": A},), {"w": B, "z": B}),
    (({"a": A},), {"mask": B[:2]}),
    (({"a": A.double()},), {}),
    (({"a": A, "b": B},), {}),
    (([A],), {}),
    (({"a": A}, B, B, B), {}),
    (({"a": A}, None, None), {"mask": B}),
]


def bound(captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    try:
        return captured.flatten_inputs(args, kwargs)
    except InputError:
        return None


@pytest.mark.parametrize("example", range(8))
def test_it_binds_what_the_capture_binds(example: int) -> None:
    captured = capture(Model(), *CALLS[example])
    binding = Binding(captured, {})
    served = 0
    for args, kwargs in CALLS:
        want, found = bound(captured, args, kwargs), binding.leaves_of(args, dict(kwargs))
        assert (want is None) == (found is None), (args, kwargs)
        if want is not None and found is not None:
            served += 1
            assert all(a is b for a, b in zip(want, found, strict=True)), (args, kwargs)
    assert 1 <= served < len(CALLS)


class Sized(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y[: x.shape[0]] if x.shape[0] % 3 != 1 else x * 2


def test_dynamic_sizes_are_those_of_the_capture() -> None:
    rows = Dim("rows", min=2, max=20)
    captured = capture(Sized(), (torch.ones(6, 3), torch.ones(12, 3)), dynamic_shapes=({0: Dim.AUTO}, {0: Dim.AUTO}))
    derived = capture(Pair(), (torch.ones(6, 3), torch.ones(12, 3)), dynamic_shapes=({0: rows}, {0: 2 * rows}))
    for each in (captured, derived):
        binding = Binding(each, {})
        kinds = set()
        for n, m in itertools.product(range(1, 24), (1, 2, 6, 12, 16, 24, 48)):
            args = torch.ones(n, 3), torch.ones(m, 3)
            kinds.add(bound(each, args, {}) is None)
            assert (bound(each, args, {}) is None) == (binding.leaves_of(args, {}) is None), (n, m)
        assert kinds == {True, False}


class Pair(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y.view(2, -1, 3).sum(0)


def test_sizes_that_are_cut_must_divide() -> None:
    shapes = {"input": {0: Dim("rows", min=2, max=64)}}
    program = fxshard.parallelize(nn.Linear(3, 4), fxshard.data_parallel(4), (torch.ones(8, 3),), dynamic_shapes=shapes)
    compiled = program.compiled
    binding = Binding(compiled.captured, compiled.multiples)
    for rows in range(2, 40):
        assert (binding.leaves_of((torch.ones(rows, 3),), {}) is not None) == (rows % 4 == 0)


def test_arguments_by_star_are_not_bound() -> None:
    class Starred(nn.Module):
        def forward(self, *xs: torch.Tensor) -> torch.Tensor:
            return xs[0] + xs[1]

    assert Binding(capture(Starred(), (A, B)), {}).starred

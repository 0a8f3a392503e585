"""Kinds of containers that users make, as results; and what keeps tensors where later calls would find them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard.errors import CaptureError

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Named(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Row(list[Any]):
    pass


class Pair(tuple[Any, ...]):
    pass


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


class Returns(nn.Module):
    def __init__(self, what: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.up, self.what = nn.Linear(8, 8).double(), what

    def forward(self, x: torch.Tensor) -> Any:
        return self.what(self.up(x))


@dataclasses.dataclass
class Result:
    logits: Any


def with_more(y: torch.Tensor) -> Result:
    result = Result(y)
    result.hidden, result.count = y * 2, 3  # type: ignore[attr-defined]
    return result


def test_a_dataclass_may_have_more_than_its_fields() -> None:
    model = Returns(with_more)
    (want, got) = model(X), fxshard.simulate(program_of(model), X).outputs[1]
    assert type(got) is Result
    assert got.count == 3
    torch.testing.assert_close((got.logits, got.hidden), (want.logits, want.hidden))


def program_of(model: nn.Module) -> fxshard.ParallelModule:
    return fxshard.parallelize(model, fxshard.tensor_parallel(2))


def test_dicts_lists_and_tuples_of_the_users() -> None:
    model = Returns(lambda y: Named(logits=y, more=Row([y * 2, Pair((y, 3))])))
    (want, got) = model(X), fxshard.simulate(program_of(model), X).outputs[1]
    assert (type(got), type(got.more), type(got.more[1])) == (Named, Row, Pair)
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.more[0], want.more[0])
    assert got.more[1][1] == 3


HIDDEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "a user dict": lambda y: collections.UserDict(a=y),
    "a namespace": lambda y: types.SimpleNamespace(a={"b": [y]}),
    "an object in a list": lambda y: [Holder({"y": y})],
    "an iterator": lambda y: zip([y], [y], strict=True),
    "a generator": lambda y: (z for z in [y]),
    "a partial": lambda y: functools.partial(torch.add, y),
    "a closure": lambda y: lambda: y,
    "a view of a dict": lambda y: {"a": y}.items(),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_tensors_that_cannot_be_found_are_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="whose tensors cannot be found"):
        fxshard.simulate(program_of(Returns(HIDDEN[name])), X)


LOG: list[torch.Tensor] = []
TABLES: dict[int, torch.Tensor] = {}
COUNTS = {"calls": 0}


@functools.lru_cache
def table(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float64)


def logged(y: torch.Tensor) -> torch.Tensor:
    LOG.append(y)
    return y


def looked_up(y: torch.Tensor) -> torch.Tensor:
    if y.shape[-1] not in TABLES:
        TABLES[y.shape[-1]] = torch.arange(y.shape[-1], dtype=torch.float64)
    return y * TABLES[y.shape[-1]]


def counting(y: torch.Tensor) -> torch.Tensor:
    COUNTS["calls"] += 1
    return y


def test_a_cached_function_is_the_users_afterwards() -> None:
    model = Returns(lambda y: y * table(8))
    got = fxshard.simulate(program_of(model), X).outputs[1]
    torch.testing.assert_close(got, model(X))
    assert type(table(8)) is torch.Tensor


@pytest.mark.parametrize("what", [logged, looked_up])
def test_tensors_kept_outside_of_the_model_are_refused_and_taken_out(what: Callable[[torch.Tensor], Any]) -> None:
    LOG.clear()
    TABLES.clear()
    model = Returns(what)
    with pytest.raises(CaptureError, match="forward keeps tensors in"):
        fxshard.simulate(program_of(model), X)
    assert all(type(each) is torch.Tensor for each in (*LOG, *TABLES.values()))
    assert type(model(X)) is torch.Tensor


def test_what_forward_counts_outside_of_the_model_is_refused() -> None:
    with pytest.raises(CaptureError, match="forward changes what it reads outside of the model's modules"):
        fxshard.simulate(program_of(Returns(counting)), X)

"""masks: what a mask allows is found as it is, and attention that says so computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import fxshard
from fxshard.capture.capture import capture
from fxshard.normal import masks
from fxshard.normal.normalize import normalize
from tests.helpers import assert_equivalent
from tests.presets import preset

aten = torch.ops.aten
COMPARISONS = (torch.le, torch.lt, torch.gt, torch.ge, torch.eq)
Mask = Callable[[int, int], torch.Tensor]


class Masked(nn.Module):
    """Attention with a mask that is made of literals; ``repeats``: each key head serves so many query heads."""

    def __init__(self, mask: Mask, repeats: int = 1) -> None:
        super().__init__()
        self.mask, self.repeats = mask, repeats
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16 // repeats)
        self.v, self.o = nn.Linear(16, 16 // repeats), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        shape = (*k.shape[:2], self.repeats, *k.shape[2:])
        k, v = (y[:, :, None].expand(shape).reshape(shape[0], -1, *shape[3:]) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x.shape[1], x.shape[1]))
        return self.o(y.transpose(1, 2).flatten(2))


def attention_of(module: nn.Module, x: torch.Tensor) -> fx.Node:
    graph = normalize(capture(module, (x,)).root).graph
    (node,) = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    return node


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.arange(keys) <= torch.arange(queries)[:, None]


def tril(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril()


def everything(queries: int, keys: int) -> torch.Tensor:
    return (torch.arange(queries) >= 0)[:, None].expand(2, 1, queries, keys)


def wide_window(queries: int, keys: int) -> torch.Tensor:
    at, of = torch.arange(keys), torch.arange(queries)[:, None]
    return (at <= of) & (at > of - keys) & torch.ones((), dtype=torch.bool)


def packed(queries: int, keys: int) -> torch.Tensor:
    """As transformers finds sequences that lie end to end: there is one."""
    at = torch.arange(keys).expand(2, keys)
    of = (at.diff(prepend=at[:, :1] - 1) != 1).cumsum(-1)
    return (of[:, None, :, None] == of[:, None, None, :]) & causal(queries, keys)


def window(queries: int, keys: int) -> torch.Tensor:
    at, of = torch.arange(keys), torch.arange(queries)[:, None]
    return (at <= of) & (at > of - 3)


def shifted(queries: int, keys: int) -> torch.Tensor:
    return torch.arange(keys) <= torch.arange(queries)[:, None] + 1


def reverse(queries: int, keys: int) -> torch.Tensor:
    return torch.arange(keys).flip(0) <= torch.arange(queries)[:, None]


def of_one_row(queries: int, keys: int) -> torch.Tensor:
    rows = torch.arange(queries)[:, None].expand(2, 1, queries, 1)
    return torch.arange(keys) <= torch.cat([rows[:1], rows[1:] + 1])


KNOWN = {causal: True, tril: True, wide_window: True, packed: True, everything: False}
KEPT = (window, shifted, reverse, of_one_row)


@pytest.mark.parametrize("small", [0, masks.SMALL])
@pytest.mark.parametrize("mask", KNOWN)
def test_a_mask_that_is_known_goes(monkeypatch: Any, mask: Mask, small: int) -> None:
    monkeypatch.setattr(masks, "SMALL", small)
    node = attention_of(Masked(mask), torch.randn(2, 8, 16))
    assert node.kwargs == ({"is_causal": True} if KNOWN[mask] else {})
    assert len(node.args) == 3


@pytest.mark.parametrize("small", [0, masks.SMALL])
@pytest.mark.parametrize("mask", KEPT)
def test_a_mask_that_hides_something_else_stays(monkeypatch: Any, mask: Mask, small: int) -> None:
    monkeypatch.setattr(masks, "SMALL", small)
    node = attention_of(Masked(mask, repeats=2), torch.randn(2, 8, 16))
    assert isinstance(node.args[3], fx.Node)
    assert node.args[1].target is aten.reshape.default


def test_a_long_sequence_is_not_looked_at_place_by_place() -> None:
    """Its mask would take 4 GiB."""
    with torch.device("meta"):
        node = attention_of(Masked(packed, repeats=2), torch.randn(2, 2**16, 16))
    assert node.kwargs == {"is_causal": True, "enable_gqa": True}


def test_what_is_not_of_literals_stays() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Buffer(torch.ones(8, 8, dtype=torch.bool).tril())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)

    assert len(attention_of(Given(), torch.randn(2, 8, 16)).args) == 4


def test_a_mask_that_the_model_computes_may_come_from_far() -> None:
    class Deep(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(1200):
                x = x.sin()
            return F.scaled_dot_product_attention(x, x, x, attn_mask=x @ x.mT > 0)

    assert len(attention_of(Deep(), torch.randn(2, 8, 16)).args) == 4


@pytest.mark.parametrize("queries", [7, 9])
def test_not_as_many_queries_as_keys(queries: int) -> None:
    class Cross(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x[:, :queries], x[:, :8], x[:, :8], attn_mask=causal(queries, 8))

    assert len(attention_of(Cross(), torch.randn(2, 9, 16)).args) == 4


@pytest.mark.thin(3)
@pytest.mark.parametrize("plan", ["tp2", "tp4", "sp2", "dp2", "cp2", "dp2_tp2"])
@pytest.mark.parametrize("repeats", [1, 2, 4])
@pytest.mark.parametrize("mask", [causal, packed, everything, window])
def test_as_the_original(mask: Mask, repeats: int, plan: str) -> None:
    x = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    assert_equivalent(Masked(mask, repeats).double(), preset(plan), (x,))


def test_a_ring_is_told() -> None:
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    program = assert_equivalent(Masked(causal, 2).double(), fxshard.context_parallel(4, method="ring"), (x,))
    assert "is_causal=True" in program.code()


# --- any mask ------------------------------------------------------------------------------------------------------


@st.composite
def expressions(draw: Any) -> tuple[list[Any], int, int]:
    """Comparisons of positions, joined by ``and``: ``(function, keys, queries, whether keys come first)`` each."""
    queries, keys = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    numbers = st.integers(-1, 5)
    terms = []
    for _ in range(draw(st.integers(1, 3))):
        of_keys = draw(st.lists(numbers, min_size=keys, max_size=keys))
        of_queries = draw(st.lists(numbers, min_size=queries, max_size=queries))
        of_keys = sorted(of_keys) if draw(st.booleans()) else of_keys
        terms.append((draw(st.sampled_from(COMPARISONS)), of_keys, of_queries, draw(st.booleans())))
    return terms, queries, keys


@given(expressions())
def test_what_any_mask_allows(drawn: tuple[list[Any], int, int]) -> None:
    terms, queries, keys = drawn
    intervals, wholes = [], []
    for function, of_keys, of_queries, keys_first in terms:
        a, b = torch.tensor(of_keys), torch.tensor(of_queries)[:, None]
        args = [a, b] if keys_first else [b, a]
        wholes.append(function(*args))
        rule = masks.RULES[getattr(aten, function.__name__).Tensor]
        intervals.append(rule(keys, args))
        exact = masks.as_interval(wholes[-1], keys)
        if of_keys == sorted(of_keys):
            assert intervals[-1] is not None
            assert exact is not None
        if intervals[-1] is not None:
            assert torch.equal(allowed(intervals[-1], queries), wholes[-1])
        if exact is not None:
            assert torch.equal(allowed(exact, queries), wholes[-1])
    whole = torch.stack(wholes).all(0)
    found = masks.as_interval(intervals[0], keys)
    for each in intervals[1:]:
        found = masks.RULES[aten.logical_and.default](keys, [found, each]) if found is not None else None
    if found is not None:
        assert torch.equal(allowed(found, queries), whole)
        assert found.is_all == bool(whole.all())
        assert found.is_causal(queries) == (queries == keys and torch.equal(whole, causal(queries, keys)))


def allowed(interval: masks.Interval, queries: int) -> torch.Tensor:
    at = torch.arange(interval.keys)
    rows = (at >= interval.start.unsqueeze(-1)) & (at < interval.stop.unsqueeze(-1))
    return rows.expand(queries, interval.keys)

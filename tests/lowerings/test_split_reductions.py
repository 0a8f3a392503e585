"""Reductions over a split dim: the ranks share the results of their parts; values and gradients are one device's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard import Plan, Shard
from fxshard.lowerings import split_reductions, statistics
from fxshard.passes import localize
from tests.helpers import assert_equivalent

aten = torch.ops.aten
D = torch.float64
SHAPE = (8, 4, 16)
LARGE = 8 * 4 * 8
"""Bytes of a number for each row of the longest reduction: what may be shared; the operand has 16 times as many."""


class Reduce(nn.Module):
    def __init__(self, reduce: Callable[[torch.Tensor], Any], dtype: torch.dtype = D) -> None:
        super().__init__()
        self.scale, self.reduce = nn.Parameter(torch.ones(SHAPE, dtype=dtype)), reduce

    def forward(self, x: torch.Tensor) -> Any:
        return self.reduce(x * self.scale)


def randn(dtype: torch.dtype = D) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=D, generator=torch.Generator().manual_seed(5)).to(dtype)


def ties() -> torch.Tensor:
    """Few values, each many times: relu's zeros."""
    return randn().mul(1.5).round().clamp(-1, 1)


def masked() -> torch.Tensor:
    """Whole ranks of -inf."""
    return randn().masked_fill(torch.arange(16) >= 4, float("-inf"))


def vector_norm(order: float, dim: Any = -1) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda h: torch.linalg.vector_norm(h, order, dim)


REDUCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "variance": lambda h: h.var(-1),
    "biased variance": lambda h: h.var(-1, unbiased=False, keepdim=True) * h,
    "variance, corrected": lambda h: torch.var(h, (0, -1), correction=3),
    "variance of all": lambda h: h.var(),
    "deviation": lambda h: h.std(-1),
    "deviation of all": lambda h: torch.std_mean(h),
    "deviation and mean": lambda h: torch.std_mean(h, -1, keepdim=True),
    "variance and mean": lambda h: torch.var_mean(h, (0, 2)),
    "variance alone": lambda h: torch.var_mean(h, -1)[0],
    "norm": vector_norm(2),
    "norm of all": lambda h: h.norm(),
    "sum of magnitudes": vector_norm(1, (0, 2)),
    "cubic norm": vector_norm(3),
    "largest magnitude": vector_norm(float("inf")),
    "smallest magnitude": vector_norm(-float("inf"), (0, 2)),
    "old norm": lambda h: torch.norm(h, 2, -1),
    "logsumexp": lambda h: h.logsumexp(-1),
    "logsumexp of two dims": lambda h: h.logsumexp((0, 2), keepdim=True) - h,
    "maximum": lambda h: h.amax(-1),
    "maximum that is compared": lambda h: (h == h.amax(-1, keepdim=True)) * h,
    "minimum of all": lambda h: h.min(),
    "extremes": lambda h: torch.aminmax(h, dim=-1),
    "maximum and where": lambda h: h.max(-1),
    "minimum and where": lambda h: h.min(-1, keepdim=True),
    "where the maximum is": lambda h: h.argmax(-1) * h.sum(-1),
    "where the minimum is": lambda h: h.argmin(2, keepdim=True) * h,
    "product": lambda h: h.prod(-1),
    "any": lambda h: (h > 1).any(-1) * h.mean(-1),
    "all": lambda h: (h > -1).all() * h.mean(-1),
    "cumulative sum": lambda h: h.cumsum(-1) * h,
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_of_a_split_dim(name: str, ranks: int) -> None:
    for make in (randn, ties):
        plan = Plan({"tp": ranks}, inputs={"*": Shard(2)})
        program = assert_equivalent(Reduce(REDUCTIONS[name]), plan, (make(),))
        shared = [c for c in program.collectives() if c.phase == "forward"]
        operands = [c for c in shared if not c.reason.endswith("the output of the model")]
        assert operands
        assert all(c.num_bytes <= LARGE * ranks for c in operands), operands
        assert fxshard.verify(program, make()).ok


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_two_axes(name: str) -> None:
    for first, second in ((0, 2), (2, 0), (2, 2), (1, 2)):
        plan = Plan({"a": 2, "b": 2}, inputs={"*": {"a": Shard(first), "b": Shard(second)}})
        for make in (randn, ties):
            assert_equivalent(Reduce(REDUCTIONS[name]), plan, (make(),))


@pytest.mark.parametrize("name", ["logsumexp", "maximum", "extremes", "maximum and where", "cumulative sum"])
def test_ranks_that_hold_nothing_but_infinities(name: str) -> None:
    plan = Plan({"tp": 4}, inputs={"*": Shard(2)})
    program = fxshard.parallelize(Reduce(REDUCTIONS[name]), plan, (masked(),))
    x, y = masked().requires_grad_(), masked().requires_grad_()
    whole, parts = REDUCTIONS[name](x), fxshard.simulate(program, y).outputs[0]
    for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (whole, parts)), strict=True):
        torch.testing.assert_close(b, a)


def test_logsumexp_of_masked_ranks_has_the_gradient_of_one_device() -> None:
    program = fxshard.parallelize(
        Reduce(lambda h: h.logsumexp(-1)), Plan({"tp": 4}, inputs={"*": Shard(2)}), (masked(),)
    )
    x, y = masked().requires_grad_(), masked().requires_grad_()
    x.logsumexp(-1).square().sum().backward()
    fxshard.simulate(program, y).backward(lambda out: out.square().sum())
    torch.testing.assert_close(y.grad, x.grad)


@pytest.mark.thin(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [n for n in REDUCTIONS if n not in ("where the maximum is", "where the minimum is")])
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    plan, x = Plan({"tp": 2}, inputs={"*": Shard(2)}), randn(dtype)
    model = Reduce(REDUCTIONS[name], dtype)
    found = fxshard.simulate(fxshard.parallelize(model, plan, (x,)), x).outputs[0]
    eps = 4 * torch.finfo(dtype).eps
    for a, b in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (model(x), found)), strict=True):
        torch.testing.assert_close(b, a, rtol=eps, atol=eps)


def test_integers() -> None:
    """No gradient asks for how many elements attain a maximum."""

    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.amax(1), x.prod(1), x.max(1), x.cumsum(1), x.bool().all(1), x.min()

    x = torch.randint(-3, 9, (4, 8), generator=torch.Generator().manual_seed(0))
    program = fxshard.parallelize(Counts(), Plan({"tp": 4}, inputs={"*": Shard(1)}), (x,))
    for out in fxshard.simulate(program, x).outputs:
        for a, b in zip(
            torch.utils._pytree.tree_leaves(Counts()(x)), torch.utils._pytree.tree_leaves(out), strict=True
        ):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_a_dim_of_dynamic_size_is_counted_at_the_call() -> None:
    class Spread(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.var(0), x.std(), x.amax(0), x.logsumexp(0), x.cumsum(0)

    rows = torch.export.Dim("rows", min=2, max=64)
    x = torch.randn(4, 6, dtype=D)
    program = fxshard.parallelize(Spread(), Plan({"dp": 2}, inputs={"*": Shard(0)}), (x,), dynamic_shapes=({0: rows},))
    for size in (4, 8, 6):
        x = torch.randn(size, 6, dtype=D)
        for a, b in zip(Spread()(x), fxshard.simulate(program, x).outputs[0], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_shared_is_gathered() -> None:
    """A median of medians is none, and neither is a position over two axes."""
    for reduce in (lambda h: h.median(-1).values, lambda h: vector_norm(-1)(h)):
        program = assert_equivalent(Reduce(reduce), Plan({"tp": 2}, inputs={"*": Shard(2)}), (randn(),))
        assert any(c.kind == "all_gather" and c.num_bytes == 8 * 4 * 16 * 8 for c in program.collectives())


def test_columns_stay_split() -> None:
    """What a column layer gives is normed by hand, and goes into a row layer: nothing of its size is gathered."""

    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.up(x)
            h = (h - h.mean(-1, keepdim=True)) * (h.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
            return self.down(h * h.argmax(-1, keepdim=True))  # type: ignore[no-any-return]

    params = {"up.*": Shard(0), "down.weight": Shard(1)}
    program = assert_equivalent(Hand().double(), Plan({"tp": 2}, params=params), (torch.randn(6, 8, dtype=D),))
    assert all(c.num_bytes <= 6 * 8 * 8 for c in program.collectives())


@pytest.mark.parametrize("name", ["variance", "deviation of all", "cumulative sum"])
def test_without_vary_the_gradients_are_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics.Statistics, "varied", lambda self, x, axes=None: x)
    with pytest.raises(AssertionError, match="gradient of"):
        assert_equivalent(Reduce(REDUCTIONS[name]), Plan({"tp": 2}, inputs={"*": Shard(2)}), (randn(),))


@pytest.mark.parametrize("lowering", ["reduction", "extreme", "position", "cumsum"])
def test_without_the_lowering_it_is_wrong(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"reduction": "variance", "extreme": "maximum", "position": "maximum and where", "cumsum": "cumulative sum"}
    model, plan = Reduce(REDUCTIONS[names[lowering]]), Plan({"tp": 2}, inputs={"*": Shard(2)})
    assert_equivalent(model, plan, (randn(),))
    monkeypatch.setitem(localize.LOWERINGS, lowering, lambda new, node, *rest: node)
    with pytest.raises(AssertionError, match="output"):
        assert_equivalent(model, plan, (randn(),))


def test_the_gradient_of_a_maximum_is_shared_by_all_that_attain_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all elements alike, not by the ranks: 3 of one rank and 1 of another get a quarter each."""
    plan = Plan({"tp": 2}, inputs={"*": Shard(2)})
    assert_equivalent(Reduce(REDUCTIONS["maximum"]), plan, (ties(),))
    best = split_reductions._best
    monkeypatch.setattr(
        split_reductions,
        "_best",
        lambda write, parts, shares, f: best(write, parts, write(aten.ones_like.default, shares), f),
    )
    with pytest.raises(AssertionError, match="gradient of"):
        assert_equivalent(Reduce(REDUCTIONS["maximum"]), plan, (ties(),))

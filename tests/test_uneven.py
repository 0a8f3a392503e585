"""Uneven shards where assumptions end: dynamic sizes beside them, ranks with nothing, modules with several names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxshard
from fxshard import Plan, Shard, data_parallel, tensor_parallel
from fxshard.errors import DivisibilityError
from fxshard.placement import BlockShard
from tests.helpers import assert_equivalent, problems_of, run_original, run_simulated

FLOAT = torch.float64
AUTO = torch.export.Dim.AUTO


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=FLOAT)


class Scaled(nn.Module):
    """A function of an input that a weight scales."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], size: int = 3) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x * self.weight)


def check_dynamic(model: nn.Module, plan: Plan, x: torch.Tensor, others: list[torch.Tensor], shapes: Any) -> None:
    """One capture serves inputs of other sizes."""
    program = assert_equivalent(model, plan, (x,), dynamic_shapes=shapes)
    for other in others:
        expected, actual = run_original(model, (other,)), run_simulated(program, (other,))
        assert not problems_of(actual, expected)
    assert len(program._captures.all) == 1


OVER_DYNAMIC: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": lambda x: x.flatten(0, 1).relu(),
    "softmax": lambda x: x.flatten(0, 1).softmax(0),
    "var": lambda x: x.flatten(0, 1).var(0),
    "cumsum": lambda x: x.flatten(0, 1).cumsum(0),
    "dropout": lambda x: F.dropout(x.flatten(0, 1), 0.5),
    "mean": lambda x: x.flatten(0, 1).mean(0),
    "numel": lambda x: x.sum(0) / x.numel(),
}


@pytest.mark.parametrize("name", OVER_DYNAMIC)
@pytest.mark.parametrize("size", [2, 4])
def test_an_uneven_dim_merged_with_a_dynamic_one_is_whole(name: str, size: int) -> None:
    """``5 * s`` elements are cut in shares of 5 only where every part's size is a number."""
    plan = Plan({"tp": size}, inputs={"x": Shard(0)})
    check_dynamic(Scaled(OVER_DYNAMIC[name]), plan, randn(5, 4, 3), [randn(5, 6, 3)], ({1: AUTO},))


@pytest.mark.parametrize(
    "function",
    [lambda x: x.view(6, 2, -1, 8).relu(), lambda x: x.flatten(1, 2).relu(), lambda x: x.unflatten(1, (-1, 2))],
    ids=["half of it", "a multiple of it", "a pair"],
)
def test_views_of_an_empty_part_know_their_dynamic_sizes(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    plan = Plan({"tp": 4}, inputs={"x": Shard(0)})  # 6 rows: the last rank has none, and -1 says nothing to it
    check_dynamic(Scaled(function, 8), plan, randn(6, 8, 8), [randn(6, 12, 8)], ({1: AUTO},))


def test_shares_of_a_dynamic_size_are_refused() -> None:
    plan = Plan({"tp": 2}, inputs={"x": BlockShard(0, shares=(2, 1))})
    with pytest.raises(DivisibilityError, match="give no shares: a dynamic size is split evenly"):
        fxshard.parallelize(Scaled(torch.relu, 8), plan, (randn(6, 8),), dynamic_shapes=({0: AUTO},))


class Averaging(nn.Module):
    """Keeps a running mean of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5, dtype=FLOAT)
        self.register_buffer("mean", torch.zeros(5, dtype=FLOAT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        self.mean.mul_(0.9).add_(y.detach().mean(0) * 0.1)
        return y - self.mean


@pytest.mark.parametrize("split", [{}, {"mean": {"tp": Shard(0)}}], ids=["whole", "split"])
def test_a_rank_with_nothing_detaches_what_others_detach(split: dict[str, Any]) -> None:
    """Its zeros hang on their operands only where gradients flow: a buffer would keep the whole graph alive."""
    plan = data_parallel(4) | Plan({"tp": 2}, params=split)
    program = assert_equivalent(Averaging(), plan, (randn(3, 5),))
    assert not any(b.requires_grad for r in range(8) for b in program.rank_module(r).buffers())
    for _ in range(2):
        run_simulated(program, (randn(3, 5),))


class Shared(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5, dtype=FLOAT), nn.Linear(5, 6, dtype=FLOAT)
        self.again = self.up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(self.up(x).relu())
        out: torch.Tensor = self.down(self.again(x).tanh())
        return out


def test_verify_leaves_a_module_with_two_names_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = Shared(), randn(3, 6)
    before = copy.deepcopy(model.state_dict())
    assert fxshard.verify(assert_equivalent(model, tensor_parallel(2), (x,)), x).ok
    assert isinstance(model.again.weight, nn.Parameter)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Rows(nn.Module):
    """A layer, and a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16, dtype=FLOAT)
        self.unread = nn.Parameter(randn(5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))


TWO_AXES: dict[str, dict[str, Shard]] = {
    "uneven outside": {"a": BlockShard(0, shares=(1, 3)), "b": Shard(0)},
    "uneven inside": {"a": Shard(0), "b": BlockShard(0, shares=(1, 3))},
    "uneven inside, named first": {"b": BlockShard(0, shares=(1, 3)), "a": Shard(0)},
    "uneven both": {"a": BlockShard(0, shares=(3, 1)), "b": BlockShard(0, shares=(1, 3))},
    "uneven blocks": {"a": BlockShard(0, (1, 1), shares=(3, 1)), "b": BlockShard(0, (1, 1))},
}


@pytest.mark.parametrize("name", TWO_AXES)
def test_two_axes_cut_one_dim_one_of_them_unevenly(name: str) -> None:
    plan = Plan({"a": 2, "b": 2}, params={"layer.*": TWO_AXES[name]})
    assert_equivalent(Rows(), plan, (randn(4, 8),))


@pytest.mark.parametrize(
    "entries",
    [
        {"params": {"layer.weight": {"a": BlockShard(0, shares=(1, 15)), "b": Shard(0)}}},
        {"params": {"unread": {"a": Shard(0), "b": Shard(0)}}},
        {"outputs": {"0": {"a": Shard(0), "b": Shard(0)}}},
    ],
    ids=["shares", "unread", "outputs"],
)
def test_what_an_outer_axis_leaves_must_divide(entries: dict[str, Any]) -> None:
    with pytest.raises(DivisibilityError, match=r"cannot be split over mesh axis 'b' \(size 2\) beside axes"):
        fxshard.parallelize(Rows(), Plan({"a": 2, "b": 2}, **entries), (randn(5, 8),))


class Table(nn.Module):
    """A table of weights that every row of the batch is compared with, twice, from its end."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Parameter(randn(4, 6)), nn.Linear(6, 8, dtype=FLOAT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(self.table)
        return x @ mixed.relu().flip(-1).T + torch.exp(x) @ mixed.tanh().flip(-1).T


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_varied_on_one_axis_is_gathered_on_another(size: int) -> None:
    """The table is varied along ``dp`` where it is smallest; what is made of it is then split along ``tp``."""
    plan = data_parallel(2) | Plan({"tp": size}, params={"mix.*": {"tp": Shard(0)}})
    program = assert_equivalent(Table(), plan, (randn(3, 8),))
    assert any("dp: Varying, tp: Shard(1" in line for line in program.code().splitlines())


PRODUCTS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (2, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 2), (1, 6, 8)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 2), (2, 6, 5, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(6, 4, 2), (1, 6, 8)),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("outer", [None, 0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_without_a_part_of_a_product(name: str, outer: int | None, dim: int) -> None:
    """Along one axis, while another cuts the same weight: the bias is still added once."""
    make, shape = PRODUCTS[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    entry: dict[str, Any] = {"b": BlockShard(dim, shares=(1, 0, model.weight.shape[dim] - 1))}
    if outer is not None and outer != dim:
        entry["a"] = Shard(outer)
    assert_equivalent(model, Plan({"a": 2, "b": 3}, params={"weight": entry}), (x,))

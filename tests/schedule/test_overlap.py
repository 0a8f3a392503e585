"""Which products are computed beside a collective, and that the graph they leave is equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxshard
from fxshard import Plan, Shard
from fxshard.errors import PlanError

X = torch.randn(4, 6, 8)


class Pair(nn.Module):
    """Two columns that read one value, and a row."""

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, features, bias=False), nn.Linear(8, features)
        self.down = nn.Linear(features, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate(x).sigmoid()  # read before the other product is made
        out: torch.Tensor = self.down(gate * self.up(x))
        return out


class Normed(Pair):
    """With a norm and a residual, which are split along the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() + super().forward(self.norm(x.sin()))


class Beside(Pair):
    """A value that a product reads that is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.up(x) * (x @ self.other))
        return out


def calls(model: nn.Module, plan: Plan, **options: object) -> list[str]:
    program = fxshard.parallelize(model, plan, (X,), overlap=options.pop("overlap", 2), **options)  # type: ignore[arg-type]
    assert fxshard.verify(program, X), "the program differs from the model"
    edges = program.compiled.graph_for(0, "schedule").nodes
    return [
        n.target.__name__ for n in edges if getattr(n.target, "__module__", "") == "fxshard.runtime.collective_matmul"
    ]


def test_products_are_written_beside_their_collectives() -> None:
    column, row = {"gate.*": Shard(0), "up.*": Shard(0)}, {"down.weight": Shard(1)}
    whole = Plan({"tp": 2}, params={**column, **row})
    assert calls(Pair(), whole) == ["vary_linears", "linear_all_reduce"]
    made = calls(nn.Sequential(Normed(), Normed()), fxshard.sequence_parallel(2))
    assert made[-2:] == ["gather_linears", "linear_reduce_scatter"]
    assert calls(Pair(), whole, overlap=0) == []


def test_products_stay_as_they_are_where_something_comes_between() -> None:
    plan = fxshard.tensor_parallel(2)
    assert calls(Beside(), plan | Plan({"tp": 2}, params={"other": Shard(1)})) == ["linear_all_reduce"]
    assert calls(Pair(17), plan) == []  # the ranks' programs differ
    assert calls(nn.Sequential(Pair()), plan, checkpoint="0.up") == ["linear_all_reduce"]
    pairs = nn.Sequential(nn.Sequential(Pair(), Pair()))  # computed anew, the last sum would be made twice
    assert calls(pairs, plan, checkpoint="0") == ["vary_linears", "linear_all_reduce", "vary_linears"]


class ParallelBlock(nn.Module):
    """Two calls that read one norm, and a norm between the weights that are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.between = nn.LayerNorm(8), nn.LayerNorm(16)
        self.query, self.key, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        query = self.between(self.query(h))
        return x + self.out(query * self.key(h)) + self.mlp(h)


def test_checkpointed_calls_stay_whole() -> None:
    plan = fxshard.tensor_parallel(2)
    for checkpoint in ("0.mlp", "1.mlp", "0.query", "0"):
        model = nn.Sequential(ParallelBlock(), ParallelBlock())
        plain = fxshard.parallelize(model, plan, (X,), checkpoint=checkpoint)
        beside = fxshard.parallelize(model, plan, (X,), checkpoint=checkpoint, overlap=1)
        assert plain.code().count("checkpoint(") == beside.code().count("checkpoint(") == 1, checkpoint
        assert fxshard.verify(beside, X)


def test_the_ranks_gather_in_one_order_where_parts_differ() -> None:
    plan = fxshard.zero(2) | fxshard.tensor_parallel(2)
    for rows in (4, 5):
        x = torch.randn(rows, 6, 8)
        program = fxshard.parallelize(nn.Sequential(ParallelBlock(), nn.Linear(8, 7)), plan, (x,), overlap=2)
        assert fxshard.verify(program, x)
        gathers = [
            [str(n.target) for n in program.compiled.graph_for(r, "schedule").nodes if "gather" in n.name]
            for r in range(4)
        ]
        assert all(each == gathers[0] for each in gathers)


def test_a_product_with_a_bias_of_rows_is_left_as_it_is() -> None:
    class Rows(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down(nn.functional.linear(x, self.up.weight, self.bias))
            return out

    assert calls(Rows(), fxshard.tensor_parallel(2)) == ["linear_all_reduce"]


def test_the_report_counts_pieces() -> None:
    def bytes_of(overlap: int) -> list[int]:
        x = X.clone().requires_grad_()
        program = fxshard.parallelize(Pair(), fxshard.tensor_parallel(2), (x,), overlap=overlap)
        return [c.num_bytes for c in program.collectives()]

    assert bytes_of(0) == bytes_of(1) == [768, 768]
    assert bytes_of(5) == 2 * [128, 160, 160, 160, 160]
    assert bytes_of(100) == 48 * [32]


def test_a_number_of_pieces_below_zero_is_refused() -> None:
    with pytest.raises(PlanError, match="overlap is -1"):
        fxshard.parallelize(Pair(), fxshard.tensor_parallel(2), (X,), overlap=-1)

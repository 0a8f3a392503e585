"""Attention as models call it: fewer key heads than ranks, causal queries split, heads that no rank count divides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxshard import Plan, Shard, data_parallel, sequence_parallel, tensor_parallel
from tests.helpers import assert_equivalent

X = torch.randn(4, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Grouped-query attention that leaves the groups to the operator."""

    def __init__(self, heads: int, keys: int, dropout: float = 0.0, causal: bool = True) -> None:
        super().__init__()
        self.sizes = heads, keys, 8
        self.dropout, self.causal = dropout, causal
        self.q, self.o = nn.Linear(32, heads * 8), nn.Linear(heads * 8, 32)
        self.k, self.v = nn.Linear(32, keys * 8), nn.Linear(32, keys * 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, keys, size = self.sizes
        q = self.q(x).unflatten(-1, (heads, size)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (keys, size)).transpose(1, 2) for f in (self.k, self.v))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True, dropout_p=p)
        return self.o(y.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


def model(heads: int, keys: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention(heads, keys, dropout), Attention(heads, keys, dropout)).double().train()


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", [tensor_parallel(4), sequence_parallel(3), data_parallel(2) | tensor_parallel(2)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("heads", "keys"), [(8, 1), (8, 2), (6, 3), (12, 3), (5, 5), (6, 2)])
def test_every_weight_splits_whatever_the_heads(heads: int, keys: int, dropout: float, plan: Plan) -> None:
    """Where key heads do not go round, the ranks take those that their query heads need."""
    program = assert_equivalent(model(heads, keys, dropout), plan, (X,))
    weights = {name for name in program.plan.params if name.endswith("weight")}
    assert weights == {f"{layer}.{name}.weight" for layer in (0, 1) for name in "qkvo"}
    sums = [c for c in program.collectives() if c.phase == "forward" and c.kind in ("all_reduce", "reduce_scatter")]
    assert len(sums) == 2


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(("heads", "keys"), [(8, 1), (4, 4)])
def test_causal_queries_split_along_the_sequence(heads: int, keys: int, ranks: int) -> None:
    """The queries keep to their part; keys and values are gathered, for each layer."""
    plan = Plan({"sp": ranks}, inputs={"*": Shard(1)})
    program = assert_equivalent(model(heads, keys), plan, (X,))
    gathers = [c for c in program.collectives() if c.phase == "forward"]
    assert {c.kind for c in gathers} == {"all_gather"}
    assert len(gathers) == 2 * 2 + 1, "keys and values of two layers, and the output"
    mask = "_folded_" if program.compiled.is_uneven else "arange("  # where each rank has a code of its own, a constant
    assert mask in program.code(1)


def test_two_axes_do_not_both_split_the_queries() -> None:
    plan = Plan({"a": 2, "b": 2}, inputs={"*": {"a": Shard(1), "b": Shard(1)}})
    assert_equivalent(model(4, 2), plan, (X,))
    assert_equivalent(model(4, 2), Plan({"a": 2, "b": 2}, inputs={"*": {"a": Shard(1), "b": Shard(0)}}), (X,))
    both = Plan({"sp": 2, "tp": 2}, inputs={"*": {"sp": Shard(1)}})
    assert_equivalent(model(4, 1), both | tensor_parallel(2), (X,))

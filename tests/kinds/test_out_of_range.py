"""Ids and targets that no rank holds raise, as on one device, also where the dim that they count is split."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxshard
from fxshard import Shard


class Model(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(size, 8), nn.Linear(8, size)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.table(ids)).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("size", [16, 15, 3])  # over four ranks: even, uneven, and one with nothing
@pytest.mark.parametrize("wrong", [-1, 0, 1, 1000])
def test_an_index_out_of_range(size: int, wrong: int) -> None:
    torch.manual_seed(0)
    model, ids = Model(size), torch.randint(size, (2, 4))
    plan = {"table.weight": Shard(0), "head.weight": Shard(0), "head.bias": Shard(0)}
    program = fxshard.parallelize(model, plan, (ids, ids), mesh={"tp": 4})
    ignored = ids.clone()
    ignored[0, 1] = -100
    for out in fxshard.simulate(program, ids, ignored).outputs:
        torch.testing.assert_close(out, model(ids, ignored))
    bad = ids.clone()
    bad[0, 0] = wrong if wrong < 0 else size + wrong
    for call in ((bad, ids), (ids, bad)):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(*call)
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            fxshard.simulate(program, *call)


def test_index_select_counts_nothing_from_the_end() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 4))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table.index_select(0, ids)

    model, ids = Picks(), torch.tensor([0, 9, 15])
    program = fxshard.parallelize(model, fxshard.Plan({"tp": 2}, params={"table": fxshard.Shard(0)}), (ids,))
    torch.testing.assert_close(fxshard.simulate(program, ids).outputs[1], model(ids))
    for wrong in (-1, -16, -17, 16):
        with pytest.raises(IndexError):
            model(torch.tensor([0, wrong, 15]))
        with pytest.raises(IndexError):
            fxshard.simulate(program, torch.tensor([0, wrong, 15]))

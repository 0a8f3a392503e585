"""A list of tensors is a list whatever its length: of one piece, of none, of many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxshard
from fxshard import Plan, Replicate, Shard
from fxshard.errors import SoundnessError
from fxshard.ir.info import copy_graph, info_of, set_info
from fxshard.passes.check import check
from tests.helpers import assert_equivalent
from tests.presets import preset

FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "split, one piece": lambda h: torch.cat([c.tanh() for c in h.split(4, 0)]),
    "split, a loss of chunks": lambda h: torch.stack([c.square().sum() for c in h.split(64, 0)]).sum(),
    "split, the last": lambda h: h.split(4, 0)[-1],
    "split, sizes": lambda h: h.split([4], 0)[0].sum(),
    "split, features": lambda h: h.split(8, -1)[0],
    "chunk, one": lambda h: h.chunk(1, -1)[0],
    "chunk, more than there is": lambda h: torch.cat([c * 2 for c in h.chunk(8, 0)]),
    "tensor_split, one": lambda h: h.tensor_split(1, 0)[0],
    "tensor_split, no borders": lambda h: torch.cat(h.tensor_split([], 0)),
    "unbind, one": lambda h: h[:, :1].unbind(1)[0],
    "unbind, none": lambda h: sum(h[:0].unbind(0), h),
    "hsplit and vsplit": lambda h: torch.hsplit(h, 1)[0] + torch.vsplit(h, 1)[0],
    "copies": lambda h: torch.split_copy(h, 4)[0] + torch.unbind_copy(h[None])[0],
    "meshgrid of one": lambda h: torch.meshgrid(h.sum(1), indexing="ij")[0],
    "a list operator of one": lambda h: torch._foreach_mul([h], 2.0)[0],
    "a list operator of several": lambda h: torch.stack(torch._foreach_mul(list(h.unbind(0)), 2.0)),
}
PLANS = {name: preset(name) for name in ("dp2", "dp3", "zero2", "tp2")} | {
    "nothing split": Plan({"tp": 2}),
    "columns": Plan({"tp": 2}, params={"m.*": Shard(0)}),
}


class Net(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.m, self.form = nn.Linear(8, 8), form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FORMS[self.form](self.m(x))


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("form", FORMS)
def test_as_the_original(form: str, plan: str) -> None:
    assert_equivalent(Net(form).double(), PLANS[plan], (torch.randn(4, 8, dtype=torch.float64),))


def test_a_piece_that_is_not_placed_as_its_list_is_refused() -> None:
    program = fxshard.parallelize(Net("split, one piece"), preset("dp2"), (torch.randn(4, 8),))
    graph = copy_graph(program.graph_after("insert_collectives"))
    check(graph, program.mesh)
    piece = next(node for node in graph.nodes if node.name == "getitem")
    assert info_of(piece).placements == (Shard(0),)
    set_info(piece, replace(info_of(piece), outputs=((Replicate(),),)))
    with pytest.raises(SoundnessError, match="%getitem is not placed as result 0 of %split"):
        check(graph, program.mesh)

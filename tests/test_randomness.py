"""Independent random streams: each rank draws for its own part, and what is replicated is dropped alike everywhere.

That dropout drops by default what one device drops is tested where models are compared with the original.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxshard
from fxshard import Plan, Shard, data_parallel, sequence_parallel, tensor_parallel
from fxshard.errors import PlanError
from tests.helpers import assert_equivalent
from tests.models.zoo import build

X = torch.ones(8, 16, 12, dtype=torch.float64)


class Dropped(nn.Module):
    """Dropout of a value as it comes, and of one that is split with the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((24, 12), 1 / 12, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole = F.dropout(x * 1, 0.25, self.training)
        return whole, F.dropout(F.linear(x, self.w), 0.25, self.training)


def program_of(plan: Plan, model: nn.Module | None = None, **options: Any) -> fxshard.ParallelModule:
    return fxshard.parallelize(model or Dropped().train(), plan, (X,), randomness="independent", **options)


def run(program: fxshard.ParallelModule, seed: int = 0) -> list[Any]:
    torch.manual_seed(seed)
    return fxshard.simulate(program, X).outputs


@pytest.mark.parametrize("plan", [Plan({"tp": 4}, params={"w": Shard(0)}), Plan({"tp": 5}, params={"w": Shard(0)})])
def test_parts_differ_and_what_is_replicated_does_not(plan: Plan) -> None:
    outputs = run(program_of(plan))
    for whole, joined in outputs[1:]:
        assert torch.equal(whole, outputs[0][0])
        assert torch.equal(joined, outputs[0][1])
    kept = outputs[0][1] != 0
    parts = kept.split([part.shape[0] for part in torch.zeros(24).split(-(-24 // plan.mesh.sizes[0]))], -1)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(parts) if a.shape == b.shape)
    assert abs(kept.double().mean().item() - 0.75) < 0.02
    assert torch.allclose(outputs[0][1][kept], torch.tensor(4 / 3, dtype=torch.float64))


def test_two_axes_have_a_stream_for_each_part() -> None:
    plan = Plan({"dp": 2, "tp": 2}, inputs={"x": {"dp": Shard(0)}}, params={"w": {"tp": Shard(0)}})
    whole, joined = run(program_of(plan))[0]
    quarters = [q != 0 for half in joined.split(4) for q in half.split(12, -1)]
    assert len({tuple(q.flatten().tolist()) for q in quarters}) == 4
    assert not torch.equal(whole[:4] != 0, whole[4:] != 0)


def test_a_seed_repeats_it_and_a_call_goes_on() -> None:
    program = program_of(tensor_parallel(2) | Plan({"tp": 2}, params={"w": Shard(0)}))
    first = run(program)[0][1]
    assert torch.equal(run(program)[0][1], first)
    assert not torch.equal(fxshard.simulate(program, X).outputs[0][1], first)
    state = torch.get_rng_state()
    run(program)
    torch.set_rng_state(state)


@pytest.mark.parametrize("plan", [tensor_parallel(2), data_parallel(2) | sequence_parallel(2)])
def test_models_train_alike_on_all_ranks(plan: Plan) -> None:
    """Attention stays fused; gradients of what is replicated are equal on all ranks; in eval mode nothing changes."""
    model, inputs = build("gpt2", training=True)
    program = fxshard.parallelize(model, plan, (), inputs, randomness="independent")
    code = program.code()
    assert "draw_apart" in code
    assert "dropout_mask" not in code
    assert "scaled_dot_product_attention" in code
    result = fxshard.simulate(program, **inputs)
    result.backward(lambda output: output.logits.square().mean())
    ranks = [dict(program.rank_module(r).named_parameters()) for r in range(program.mesh.world_size)]
    for name in ranks[0]:
        if not any(p.is_shard() for p in program.placements_of(name)):
            assert all(torch.equal(r[name].grad, ranks[0][name].grad) for r in ranks), name
    program.eval()
    expected = model.eval()(**inputs).logits
    torch.testing.assert_close(fxshard.simulate(program, **inputs).outputs[1].logits, expected)
    model.train()


def test_only_these_two_are_offered() -> None:
    with pytest.raises(PlanError, match="randomness is 'cheap'"):
        fxshard.parallelize(Dropped(), tensor_parallel(2), (X,), randomness="cheap")
    with pytest.raises(PlanError, match="compare is 'never'"):
        fxshard.parallelize(Dropped(), tensor_parallel(2), (X,), compare="never")


@pytest.mark.parametrize(("heads", "keys", "size"), [(8, 4, 2), (6, 3, 4), (4, 2, 8), (5, 1, 2)])
def test_query_heads_find_their_key_heads(heads: int, keys: int, size: int) -> None:
    """A chance that never comes true: what is left is the attention, whose key heads serve several query heads."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.rand(4, dtype=torch.float64))

        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q * self.w, k, k, dropout_p=1e-12, enable_gqa=True)

    q, k = (torch.randn(2, count, 5, 4, dtype=torch.float64) for count in (heads, keys))
    assert_equivalent(Attention(), Plan({"tp": size}, inputs={"q": Shard(1)}), (q, k), randomness="independent")

"""Higher-order operators: taken apart where that is the same, else gathered and reported; never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import fxshard
from tests.helpers import assert_equivalent

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's own: these operators are its prototypes
PLANS = {"tp": fxshard.tensor_parallel(2), "dp": fxshard.data_parallel(2)}
PLANS["explicit"] = fxshard.Plan(
    {"tp": 2}, params={"up.weight": fxshard.Shard(0), "up.bias": fxshard.Shard(0), "down.weight": fxshard.Shard(1)}
)


class Middle(nn.Module):
    def __init__(self, fn: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.fn = nn.Linear(8, 16).double(), nn.Linear(16, 8).double(), [fn]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.fn[0](self, torch.relu(self.up(x))))  # type: ignore[no-any-return]


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        return (x * factor).flip(0).flip(0)  # which is not seen to be pointwise

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * 3 + x, None


TAKEN_APART: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "checkpoint": lambda m, h: checkpoint(lambda y: y.sin() * 2, h, use_reentrant=False),
    "vmap": lambda m, h: torch.vmap(lambda row: row.cumsum(0).tanh())(h),
    "vmap within vmap": lambda m, h: torch.vmap(torch.vmap(lambda v: v * v.cos()))(h),
    "associative_scan": lambda m, h: associative_scan(lambda a, b: a * b, h, dim=1, combine_mode="generic"),
}
GATHERED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cond": lambda m, h: torch.cond(h.sum() > 0, lambda y: y * 2, lambda y: y - 1, (h,)),
    "cond with weights": lambda m, h: torch.cond(h.sum() < 0, lambda y: y * 2, lambda y: y * m.down.bias.sum(), (h,)),
    "map": lambda m, h: map_over(lambda y: y * y, h),
    "scan": lambda m, h: scan(lambda c, y: (c + y, c * y), h[:, 0].clone() * 0, h, dim=1)[1].movedim(0, 0),
    "while_loop": lambda m, h: while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.tensor(0), h))[1],
    "autograd function": lambda m, h: Triple.apply(h, 2.0),  # type: ignore[no-any-return, no-untyped-call]
}
X = torch.linspace(-2, 2, 2 * 6 * 8, dtype=torch.float64).sin().reshape(2, 6, 8)


@pytest.mark.thin(3)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", TAKEN_APART)
def test_taken_apart(name: str, plan: str) -> None:
    program = assert_equivalent(Middle(TAKEN_APART[name]), PLANS[plan], (X,))
    assert not program.fallbacks()


@pytest.mark.thin(6)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", GATHERED)
def test_gathered(name: str, plan: str) -> None:
    program = assert_equivalent(Middle(GATHERED[name]), PLANS[plan], (X,))
    (fallback,) = program.fallbacks()
    assert ("tensor parallelism ends at it" in str(fallback)) == (plan == "tp")


def test_a_rule_splits_an_autograd_function() -> None:
    model = Middle(GATHERED["autograd function"])
    fxshard.register_rule("fxshard_function::tests_passes_test_regions_Triple", "@pointwise")
    program = assert_equivalent(model, fxshard.tensor_parallel(2), (X,))
    assert not program.fallbacks()
    assert [c.kind for c in program.collectives()] == ["all_reduce"]


def test_random_numbers_in_a_region_are_shared() -> None:
    def drop(m: Any, h: Tensor) -> Tensor:
        return torch.cond(h.sum() > 0, lambda y: y * torch.rand_like(y), lambda y: y - 1, (h,))  # type: ignore[no-any-return]

    program = fxshard.parallelize(Middle(drop), PLANS["dp"], (X,))
    assert program.compiled.draws


# --- what models return ---------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PRESETS = {
    "tp": fxshard.tensor_parallel(2),
    "sp": fxshard.sequence_parallel(2),
    "dp": fxshard.data_parallel(2),
    "dp_tp": fxshard.data_parallel(2) | fxshard.tensor_parallel(2),
    "dp_sp": fxshard.data_parallel(2) | fxshard.sequence_parallel(2),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", PRESETS)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_within_the_model_and_its_cache(plan: str, masked: bool) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **TOKENS)).double().eval()
    ids = torch.randint(3, 32, (4, 8))
    labels = ids.masked_fill(torch.arange(8) < torch.tensor([[0], [3], [5], [8]]), -100) if masked else ids
    inputs = {"input_ids": ids, "labels": labels}  # use_cache is True by default
    tolerance = 1e-6  # its loss, and the rotary tables, are computed in float32
    program = assert_equivalent(model, PRESETS[plan], (), inputs, tolerance=tolerance)
    out = fxshard.simulate(program, **inputs).outputs[1]
    assert type(out.past_key_values) is transformers.DynamicCache
    assert out.past_key_values.layers[0].keys.shape == (4, 4, 8, 4)

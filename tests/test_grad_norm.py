"""The norm of the whole gradient, and clipping by it: what torch gives for the model on one device.

Real ranks: ``tests/distributed/test_optimizer.py``.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

import fxshard
from fxshard import Plan, Shard, tensor_parallel
from fxshard.errors import FxshardError, GradientError, InputError
from tests.helpers import run_original, run_simulated
from tests.models.uneven import build_case
from tests.models.zoo import build
from tests.presets import preset

ORDERS = (2.0, 1.0, 3.5, math.inf)


def grads_of(program: fxshard.ParallelModule, rank: int) -> dict[str, torch.Tensor]:
    named = program.rank_module(rank).named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def clip_all(program: fxshard.ParallelModule, limit: float, order: float) -> torch.Tensor:
    """Torch's own, over what every simulated rank holds."""
    ranks = range(program.mesh.world_size)
    return clip_grad_norm_([p for r in ranks for p in program.rank_module(r).parameters()], limit, order)


def clip_own(program: fxshard.ParallelModule, limit: float, order: float) -> torch.Tensor:
    """Torch's own, over what the program has for parameters."""
    return clip_grad_norm_(program.parameters(), limit, order)


CLIPS = (
    (fxshard.clip_grad_norm_, 1e9, 2.0),
    (fxshard.clip_grad_norm_, 0.5, math.inf),
    (clip_own, 0.5, 2.0),
    (clip_all, 0.5, 1.0),
)
"""How gradients are clipped, to what share of their norm, and of which order that is."""


def check(
    model: nn.Module, plan: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, rel: float = 1e-12
) -> fxshard.ParallelModule:
    """The norms, and the gradients once clipped, are those of the model on one device."""
    expected = run_original(model, args, kwargs).grads
    program = fxshard.parallelize(model, plan, args, kwargs)
    run_simulated(program, args, kwargs)
    for order in ORDERS:
        want = get_total_norm(list(expected.values()), order)
        norm = fxshard.grad_norm(program, order)
        assert norm.dtype == want.dtype
        assert norm.item() == pytest.approx(want.item(), rel=rel), f"order {order}"
    for clip, share, order in CLIPS:
        limit = share * get_total_norm(list(expected.values()), order).item()
        holders = [nn.Parameter(torch.zeros_like(grad)) for grad in expected.values()]
        for holder, grad in zip(holders, expected.values(), strict=True):
            holder.grad = grad
        want = clip_grad_norm_(holders, limit, order)
        assert clip(program, limit, order).item() == pytest.approx(want.item(), rel=rel)
        for name, grad in program.full_grads().items():
            torch.testing.assert_close(grad, expected[name], rtol=100 * rel, atol=rel)
    return program


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("plan", ["tp2", "sp2", "dp2", "dp2_tp2"])
def test_the_norm_is_one_devices(name: str, plan: str) -> None:
    """GPT-2 has packed weights, and its head is its embedding: tied weights count once."""
    model, inputs = build(name)
    check(model, preset(plan), kwargs=inputs)


@pytest.mark.parametrize("name", ["llama_3_heads", "llama_2_heads"])
def test_ranks_that_hold_less_or_nothing(name: str) -> None:
    model, inputs = build_case(name)
    program = check(model, preset("tp4"), kwargs=inputs)
    assert any(grad.numel() == 0 for grad in grads_of(program, 3).values())


class Adapted(nn.Module):
    """A frozen linear with a low-rank adapter beside it."""

    def __init__(self, inner: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.up(self.down(x))


@pytest.mark.parametrize("plan", ["tp2", "sp2", "dp2", "dp2_tp2"])
def test_adapters_on_frozen_weights(plan: str) -> None:
    model, inputs = copy.deepcopy(build("llama"))
    model.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "o_proj"):
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name)).double())
    program = check(model, preset(plan), kwargs=inputs)
    assert {name.rsplit(".", 2)[1] for name in grads_of(program, 0)} == {"up", "down"}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


X = torch.linspace(-1, 1, 48).reshape(6, 8)


def trained(plan: Any = None, model: nn.Module | None = None, x: torch.Tensor = X) -> fxshard.ParallelModule:
    program = fxshard.parallelize(model or Small(), plan or tensor_parallel(2), (x,))
    run_simulated(program, (x,))
    return program


def test_frozen_and_unused_parameters_are_left_out() -> None:
    model = Small().double()
    model.up.requires_grad_(False)
    program = check(model, tensor_parallel(2), (X.double(),))
    assert grads_of(program, 1).keys() == {"down.weight", "down.bias"}


def test_before_a_backward_pass_the_norm_is_zero() -> None:
    program = fxshard.parallelize(Small(), tensor_parallel(2), (X,))
    assert fxshard.grad_norm(program).item() == 0
    assert fxshard.clip_grad_norm_(program, 1.0).item() == 0


def test_one_rank() -> None:
    check(Small().double(), tensor_parallel(1), (X.double(),))


def test_what_the_ranks_add_up_does_not_overflow() -> None:
    """The square of each gradient's norm is still finite in float32, and their sum is not."""
    program = trained()
    for rank in range(2):
        for grad in grads_of(program, rank).values():
            grad.zero_().flatten()[0] = 1.7e19
    count = 3 * 2 + 1  # the halves of up's weight, up's bias and down's weight; down's bias is whole on both
    assert fxshard.grad_norm(program).item() == pytest.approx(1.7e19 * count**0.5, rel=1e-6)


def test_float32_weights_under_autocast() -> None:
    model, inputs = build("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run_original(model, (), inputs).grads
        program = fxshard.parallelize(model, tensor_parallel(2), (), inputs)
        run_simulated(program, (), inputs)
    norm = fxshard.grad_norm(program)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(get_total_norm(list(program.full_grads().values())).item(), rel=1e-6)
    assert norm.item() == pytest.approx(get_total_norm(list(expected.values())).item(), rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    program = trained(model=Small().to(dtype), x=X.to(dtype))
    whole = [grad.float() for grad in program.full_grads().values()]
    norm = fxshard.grad_norm(program)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(get_total_norm(whole).item(), rel=1e-6)
    for rank in range(2):
        for grad in grads_of(program, rank).values():
            grad.fill_(6e4)
    assert math.isfinite(fxshard.grad_norm(program))
    fxshard.clip_grad_norm_(program, 1.0)
    assert fxshard.grad_norm(program).item() == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_refused_on_request(value: float) -> None:
    program = trained()
    grads_of(program, 1)["up.weight"][0, 0] = value
    before = {name: grad.clone() for name, grad in grads_of(program, 0).items()}
    with pytest.raises(GradientError, match=rf"is {value}: gradients of 1 parameters, first 'up\.weight'") as caught:
        fxshard.clip_grad_norm_(program, 1.0, error_if_nonfinite=True)
    assert isinstance(caught.value, RuntimeError)
    assert all(torch.equal(grad, before[name]) for name, grad in grads_of(program, 0).items())
    assert not math.isfinite(fxshard.clip_grad_norm_(program, 1.0))
    assert not torch.equal(grads_of(program, 0)["down.weight"], before["down.weight"])  # as torch does


def test_another_module_is_torchs_own() -> None:
    model = Small()
    model(X).sum().backward()
    want = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(fxshard.grad_norm(model), want)
    assert torch.equal(fxshard.clip_grad_norm_(model, 1e-3), want)
    assert fxshard.grad_norm(model).item() == pytest.approx(1e-3, rel=1e-3)


def test_what_cannot_be_measured_is_refused() -> None:
    program = trained()
    for order in (0.0, -math.inf, math.nan, -1.0):
        with pytest.raises(InputError, match="only norms of positive order"):
            fxshard.grad_norm(program, order)
    with pytest.raises(InputError, match="of a generator cannot be measured"):
        fxshard.clip_grad_norm_(program.parameters(), 1.0)
    with pytest.raises(FxshardError, match="has not been captured yet"):
        fxshard.grad_norm(fxshard.parallelize(Small(), tensor_parallel(2)))
    with torch.device("meta"):
        meta = fxshard.parallelize(Small(), Plan({"tp": 2}, {"up.weight": Shard(0)}), (torch.zeros(6, 8),))
    for parameter in meta.rank_module(0).parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(GradientError, match="on the meta device"):
        fxshard.grad_norm(meta)


def test_programs_without_weights_are_no_part_of_it() -> None:
    """One that was never called, and one of 4,096 ranks of which one was made: torch's clipping looks at neither."""
    waiting = fxshard.parallelize(Small(), tensor_parallel(2))
    large = fxshard.parallelize(Small(), fxshard.data_parallel(512) | tensor_parallel(8), (X.repeat(512, 1),))
    model = Small()
    model(X).sum().backward()
    want = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(clip_grad_norm_(model.parameters(), 1.0), want)
    assert (list(waiting.ranks_made), list(large.ranks_made)) == ([], [0])

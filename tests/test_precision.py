"""Low precision: a sharded model is as near to the exact result as the same model on one device is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard.errors import PlanError
from tests.helpers import slow_but_for

transformers = pytest.importorskip("transformers")

PLANS = {
    "tp2": fxshard.tensor_parallel(2),
    "tp4": fxshard.tensor_parallel(4),
    "tp8": fxshard.tensor_parallel(8),
    "sp4": fxshard.sequence_parallel(4),
    "dp4": fxshard.data_parallel(4),
    "dp2_tp2": fxshard.data_parallel(2) | fxshard.tensor_parallel(2),
    "dp2_sp2": fxshard.data_parallel(2) | fxshard.sequence_parallel(2),
}
IDS = torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(1))
INPUTS = {"input_ids": IDS, "labels": IDS}


def llama(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, **tokens, num_key_value_heads=8, vocab_size=128, use_cache=False)
    return transformers.LlamaForCausalLM(config).to(dtype)  # type: ignore[no-any-return]


def gpt2(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=8, n_positions=32, vocab_size=128, bos_token_id=1, eos_token_id=2, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config).eval().to(dtype)  # type: ignore[no-any-return]


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def results(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and all gradients, of the model on one device."""
    model = copy.deepcopy(model)
    out = model(**INPUTS)
    out.loss.float().backward()
    return flat([out.logits]), flat(p.grad for p in model.parameters())


def sharded(program: fxshard.ParallelModule, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    run = fxshard.simulate(program, **INPUTS)
    run.backward(lambda out: out.loss.float())
    grads = run.full_grads()
    for name, parameter in model.named_parameters():
        assert grads[name].dtype == parameter.dtype
    return flat([run.outputs[0].logits]), flat(grads[name] for name, _ in model.named_parameters())


def ratios(model: nn.Module, program: fxshard.ParallelModule) -> list[float]:
    """The errors of logits and of gradients, as multiples of those of one device; the reference is in float64."""
    exact = results(copy.deepcopy(model).double())
    single, split = results(model), sharded(program, model)
    pairs = zip(split, single, exact, strict=True)
    return [((a - e).norm() / (b - e).norm()).item() for a, b, e in pairs]


@pytest.mark.thin(2)
@slow_but_for("plan", PLANS, "sp4", "dp2_tp2")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_llama_is_as_near_as_on_one_device(plan: str, dtype: torch.dtype) -> None:
    model = llama(dtype)
    program = fxshard.parallelize(model, PLANS[plan], (), INPUTS)
    assert max(ratios(model, program)) < 1.5


@pytest.mark.parametrize("plan", ["tp4", "sp4", "dp2_tp2"])
def test_gpt2_with_its_biases(plan: str) -> None:
    model = gpt2(torch.bfloat16)
    assert max(ratios(model, fxshard.parallelize(model, PLANS[plan], (), INPUTS))) < 1.5


def test_sums_in_float32_do_not_lose_precision_with_the_number_of_ranks() -> None:
    model = llama(torch.bfloat16)
    own = fxshard.parallelize(model, PLANS["tp8"], (), INPUTS)
    wide = fxshard.parallelize(model, PLANS["tp8"], (), INPUTS, reduce_dtype=torch.float32)
    assert all(a < b for a, b in zip(ratios(model, wide), ratios(model, own), strict=True))
    assert max(ratios(model, wide)) < 1.2
    kinds = {"all_reduce", "reduce_scatter"}
    pairs = zip(own.collectives(), wide.collectives(), strict=True)
    low = [(a, b) for a, b in pairs if a.kind in kinds and a.value.startswith("bf16")]
    assert low
    assert all(b.num_bytes == 2 * a.num_bytes for a, b in low)


def test_reduce_dtype_must_be_one_to_sum_in() -> None:
    with pytest.raises(PlanError, match="reduce_dtype"):
        fxshard.parallelize(nn.Linear(4, 4), PLANS["tp2"], reduce_dtype=torch.int32)


@pytest.mark.parametrize("plan", ["tp2", "sp4", "dp2_tp2"])
def test_norms_in_float32_within_a_low_precision_model(plan: str) -> None:
    class Norm(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner.float()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.to(self.inner.weight.dtype)).to(x.dtype)  # type: ignore[no-any-return]

    model = llama(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Norm(module))
    program = fxshard.parallelize(model, PLANS[plan], (), INPUTS)
    assert max(ratios(model, program)) < 1.5


@pytest.mark.parametrize("plan", ["tp2", "dp4", "sp4"])
def test_autocast_around_a_float32_model(plan: str) -> None:
    model = llama(torch.float32)
    program = fxshard.parallelize(model, PLANS[plan], (), INPUTS)
    exact = results(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        single, split = results(model), sharded(program, model)
    assert not program.fallbacks()
    pairs = zip(split, single, exact, strict=True)
    assert max(((a - e).norm() / (b - e).norm()).item() for a, b, e in pairs) < 1.5
    assert len(program._captures.all) == 2


@slow_but_for("plan", PLANS, "sp4", "dp2_tp2")
def test_verify_of_a_low_precision_model(plan: str) -> None:
    assert fxshard.verify(fxshard.parallelize(llama(torch.bfloat16), PLANS[plan], (), INPUTS), **INPUTS).ok


@pytest.mark.thin(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["tp2", "dp2_sp2"])
def test_a_model_on_the_meta_device_is_cast_as_one_with_values(plan: str, dtype: torch.dtype) -> None:
    """On meta autocast does nothing: captured as it stands, the model would compute in float32, and nobody see it."""
    model = llama(torch.float32)
    with torch.device("meta"):
        empty = llama(torch.float32)
    with torch.autocast("cpu", dtype):
        want = fxshard.parallelize(model, PLANS[plan], (), INPUTS)
        program = fxshard.parallelize(empty, PLANS[plan], (), INPUTS)
        assert program.code() == want.code()
        program.load_state_dict(model.state_dict())
        expected = fxshard.simulate(want, **INPUTS).outputs
        for found, mine in zip(fxshard.simulate(program, **INPUTS).outputs, expected, strict=True):
            assert found.logits.dtype == dtype
            assert torch.equal(found.logits, mine.logits)

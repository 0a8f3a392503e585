"""Unmodified models of ``transformers`` under every preset: outputs and all gradients are the original's."""

from __future__ import annotations

import functools
import io

import pytest
import torch

import fxshard
from fxshard import data_parallel, tensor_parallel
from tests.helpers import (
    SINGLE,
    Result,
    assert_equivalent,
    problems_of,
    run_original,
    run_simulated,
    slow_but_for,
)
from tests.models.zoo import MODELS, build, ids, labels_for, padding, sized
from tests.presets import preset, presets

PLANS = presets(
    "tp2",
    "tp4",
    "sp2",
    "sp4",
    "dp2",
    "dp4",
    "dp2_tp2",
    "tp2_dp2",
    "dp2_sp2",
    "sp2_dp2",
    "zero2",
    "zero2_tp2",
    "tp2_zero2",
    "zero3_sp2",
    "cp2",
    "cp4",
    "cp2_tp2",
    "zero2_cp2",
)
each_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def original(name: str, dtype: torch.dtype, training: bool) -> Result:
    model, inputs = build(name, dtype, training)
    return run_original(model, (), inputs)


def check(name: str, plan: str, dtype: torch.dtype, training: bool = False) -> fxshard.ParallelModule:
    model, inputs = build(name, dtype, training)
    return assert_equivalent(model, PLANS[plan], (), inputs, expected=original(name, dtype, training))


@pytest.mark.thin(2)
@slow_but_for("plan", PLANS, "tp2", "dp2_tp2", "dp2_sp2", "zero3_sp2", "cp2_tp2", "tp2_zero2")
@each_model
def test_float64(name: str, plan: str) -> None:
    program = check(name, plan, torch.float64)
    splits_weights = any(e for e in program.plan.params.values())
    assert splits_weights == any(preset in plan for preset in ("tp", "sp", "zero"))
    assert bool(program.plan.inputs) == any(
        preset in plan for preset in ("dp", "zero", "cp" if name != "vit" else "dp")
    )
    assert bool(program.plan.activations) == ("sp" in plan or "cp" in plan)


@pytest.mark.thin(2)
@slow_but_for("plan", PLANS, "dp2_tp2")
@each_model
def test_float32(name: str, plan: str) -> None:
    check(name, plan, torch.float32)


@pytest.mark.thin(2)
@slow_but_for("plan", ("tp2", "tp4", "sp2", "dp2", "dp2_tp2", "tp2_dp2", "dp2_sp2"), "dp2_sp2")
@each_model
def test_dropout_draws_the_masks_of_one_device(name: str, plan: str) -> None:
    model, inputs = build(name, training=True)
    assert error_between_seeds(name) > 1e-3, "the model has no dropout: this test would show nothing"
    program = check(name, plan, torch.float64, training=True)
    other = run_simulated(program, (), inputs, seed=1)
    assert not problems_of(other, run_original(model, (), inputs, seed=1))


def error_between_seeds(name: str) -> float:
    model, inputs = build(name, training=True)
    one, other = original(name, torch.float64, True), run_original(model, (), inputs, seed=1)
    return max((one.outputs[0][k] - other.outputs[0][k]).abs().max().item() for k in one.outputs[0])


@pytest.mark.parametrize("plan", ["tp2", "dp2_sp2"])
def test_one_program_serves_both_modes(plan: str) -> None:
    model, inputs = build("gpt2", training=False)
    evaluated = original("gpt2", torch.float64, False)
    program = fxshard.parallelize(model, PLANS[plan], (), inputs)
    program.train()
    trained = run_simulated(program, (), inputs, seed=3)
    assert not problems_of(trained, run_original(build("gpt2", training=True)[0], (), inputs, seed=3))
    program.eval()
    assert not problems_of(run_simulated(program, (), inputs), evaluated)
    model.eval()


# --- lazy capture ---------------------------------------------------------------------------------------------------


@pytest.mark.thin(2)
@each_model
def test_lazy_capture(name: str) -> None:
    model, inputs = build(name)
    program = fxshard.parallelize(model, data_parallel(2) | tensor_parallel(2))
    with pytest.raises(fxshard.errors.FxshardError, match="has not been captured"):
        program.collectives()
    actual = run_simulated(program, (), inputs)
    assert not problems_of(actual, original(name, torch.float64, False))
    call = sized(name, 2, 8)  # another signature: captured anew, over the same weights
    assert not problems_of(run_simulated(program, (), call), run_original(model, (), call))
    assert len(program._captures.all) == 2
    assert not problems_of(run_simulated(program, (), inputs), original(name, torch.float64, False))
    assert len(program._captures.all) == 2


# --- what the model computes beside logits --------------------------------------------------------------------------


@pytest.mark.thin(2)
@slow_but_for("plan", ("tp2", "sp2", "dp2", "dp2_tp2"), "dp2_tp2")
@each_model
def test_loss_inside_the_model(name: str, plan: str) -> None:
    """A mean over the labels that count: by global counts, whatever part of them a rank has."""
    model, inputs = build(name)
    inputs["labels"] = labels_for(name, inputs)
    assert_equivalent(model, PLANS[plan], (), inputs, loss=lambda output: output.loss, tolerance=SINGLE)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_cache(name: str, use_cache: bool) -> None:
    model, inputs = build(name)
    program = assert_equivalent(model, data_parallel(2) | tensor_parallel(2), (), {**inputs, "use_cache": use_cache})
    output = fxshard.simulate(program, **inputs, use_cache=use_cache).outputs[3]
    expected = model(**inputs, use_cache=use_cache)
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    if use_cache:
        assert type(output.past_key_values) is type(expected.past_key_values)
        assert output.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_decoding_with_the_cache_that_a_program_returned() -> None:
    model, inputs = build("llama")
    prefill = fxshard.parallelize(model, tensor_parallel(2), (), inputs)
    cache = fxshard.simulate(prefill, **inputs).outputs[0].past_key_values
    step = {"input_ids": ids(length=1, seed=5)}
    with torch.no_grad():
        expected = model(**step, past_key_values=model(**inputs).past_key_values).logits
        decode = fxshard.parallelize(model, tensor_parallel(2), (), {**step, "past_key_values": cache})
        cache = fxshard.simulate(prefill, **inputs).outputs[0].past_key_values
        actual = fxshard.simulate(decode, **step, past_key_values=cache).outputs[1].logits
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.thin(2)
@pytest.mark.parametrize(("heads", "key_heads", "ranks"), [(8, 2, 4), (8, 1, 2), (6, 3, 2), (8, 8, 4), (6, 2, 4)])
def test_few_key_heads(heads: int, key_heads: int, ranks: int) -> None:
    """Fewer key heads than ranks, or heads that do not divide: right all the same, split or not."""
    model, inputs = build("llama", num_attention_heads=heads, num_key_value_heads=key_heads, hidden_size=heads * 8)
    assert_equivalent(model, tensor_parallel(ranks), (), inputs)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions(name: str, attention: str) -> None:
    model, inputs = build(name, attn_implementation=attention)
    inputs["attention_mask"] = padding()
    assert_equivalent(model, data_parallel(2) | tensor_parallel(2), (), inputs)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("plan", ["tp2", "sp2"])
def test_eager_attention_with_dropout(name: str, plan: str) -> None:
    model, inputs = build(name, training=True, attn_implementation="eager")
    assert_equivalent(model, PLANS[plan], (), inputs, seed=4)


def test_bfloat16_is_as_near_as_bfloat16_is() -> None:
    model, inputs = build("llama", torch.bfloat16)
    assert_equivalent(model, tensor_parallel(2), (), inputs, tolerance=0.1)


def test_frozen_weights_get_no_gradient_and_no_backward_collective() -> None:
    model, inputs = build("llama")
    whole = fxshard.parallelize(model, data_parallel(2), (), inputs)
    frozen = [p for name, p in model.named_parameters() if "layers.1" not in name]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        program = assert_equivalent(model, data_parallel(2), (), inputs)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    backward = [c for c in program.collectives() if c.phase == "backward"]
    trained = sum(p.nbytes for name, p in model.named_parameters() if "layers.1" in name)
    assert [c.num_bytes for c in backward if c.kind == "all_reduce"] == [trained]
    everything = [c for c in whole.collectives() if c.phase == "backward"]
    assert sum(c.num_bytes for c in backward) < sum(c.num_bytes for c in everything)


def test_meta_model_compiles_and_shows_its_program() -> None:
    config = build("llama")[0].config
    with torch.device("meta"):
        model = type(build("llama")[0])(config).eval()
    program = fxshard.parallelize(model, tensor_parallel(2), (), {"input_ids": ids()})
    real = fxshard.parallelize(build("llama", torch.float32)[0], tensor_parallel(2), (), {"input_ids": ids()})
    assert program.collectives() == real.collectives()
    assert program.plan == real.plan
    table = io.StringIO()
    program.print_tabular(file=table)
    assert "all_reduce" in table.getvalue()
    assert all(p.is_meta for p in program.parameters())


# --- what a program holds -------------------------------------------------------------------------------------------


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", ["tp2", "dp2_tp2"])
@each_model
def test_weights_come_back_whole(name: str, plan: str) -> None:
    model, inputs = build(name)
    program = fxshard.parallelize(model, PLANS[plan], (), inputs)
    expected, actual = model.state_dict(), program.full_state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert {n for n, _ in program.named_parameters(remove_duplicate=False)} == {
        n for n, _ in model.named_parameters(remove_duplicate=False)
    }
    local = sum(p.numel() for p in program.parameters())
    assert local < 0.7 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_tied_weights_stay_one_parameter(name: str) -> None:
    model, inputs = build(name)
    program = fxshard.parallelize(model, tensor_parallel(2), (), inputs)
    for rank in range(2):
        local = dict(program.rank_module(rank).named_parameters(remove_duplicate=False))
        head, table = local["lm_head.weight"], local["transformer.wte.weight" if name == "gpt2" else "shared.weight"]
        assert head is table
        assert head.shape[0] == model.config.vocab_size // 2


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", ["tp2", "sp2", "zero2", "zero2_tp2", "cp2_tp2", "dp2_sp2"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_explicit_plan_is_the_same_program(name: str, plan: str) -> None:
    model, inputs = build(name)
    program = fxshard.parallelize(model, PLANS.get(plan, preset(plan)), (), inputs)
    again = fxshard.parallelize(model, fxshard.Plan.from_json(program.plan.to_json()), (), inputs)
    assert again.plan == program.plan
    assert again.code() == program.code()

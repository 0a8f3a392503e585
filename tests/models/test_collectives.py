"""What the presets communicate: as many collectives, of as many bytes, as Megatron's hand-written layers."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

import fxshard
from fxshard import data_parallel, sequence_parallel, tensor_parallel
from tests.models.zoo import BATCH, LENGTH, build

HIDDEN = 64
FULL = BATCH * LENGTH * HIDDEN * 4
"""Bytes of a whole f32 activation of the residual stream."""


def program_of(name: str, plan: fxshard.Plan, **changes: object) -> fxshard.ParallelModule:
    model, inputs = build(name, torch.float32, **changes)
    if name in ("llama", "gpt2"):
        inputs["use_cache"] = False
    return fxshard.parallelize(model, plan, (), inputs, bucket_bytes=0)


def layers_of(program: fxshard.ParallelModule) -> dict[str, Counter[tuple[str, str, str, int]]]:
    """Layer -> (phase, kind, axis, bytes) -> count; what is in no layer is under ``""``."""
    found: dict[str, Counter[tuple[str, str, str, int]]] = {}
    for c in program.collectives():
        layer = re.search(r"(layers|\.h|layer|block)\.(\d+)", c.module)
        found.setdefault(layer[2] if layer else "", Counter())[c.phase, c.kind, c.axis, c.num_bytes] += 1
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_layers_have_two_all_reduces_each_way(name: str, ranks: int) -> None:
    layers = layers_of(program_of(name, tensor_parallel(ranks)))
    outside = layers.pop("")
    expected = {("forward", "all_reduce", "tp", FULL): 2, ("backward", "all_reduce", "tp", FULL): 2}
    assert layers == {"0": expected, "1": expected}
    logits = BATCH * LENGTH * 128 * 4
    assert outside == {
        ("forward", "all_reduce", "tp", FULL): 1,  # the embedding, split over the vocabulary
        ("forward", "all_gather", "tp", logits): 1,  # the head's logits, which come back whole
        ("backward", "all_reduce", "tp", FULL): 1,  # what the head asks of the last hidden states
    }


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_tensor_parallel_of_encoders(name: str) -> None:
    layers = layers_of(program_of(name, tensor_parallel(2)))
    outside = layers.pop("", Counter())
    assert all(layer["forward", "all_reduce", "tp", FULL] == 2 for layer in layers.values())
    assert all(kind == "all_reduce" for layer in layers.values() for _, kind, _, _ in layer)
    # BERT normalises behind the sum: what layer 0's attention reads comes from the embeddings, and so on
    backward = ("backward", "all_reduce", "tp", FULL)
    heads = 1 if name == "bert" else 0
    assert sum(layer[backward] for layer in layers.values()) + outside[backward] == 2 * 2 + heads


def test_tensor_parallel_of_t5_has_three_pairs_in_a_decoder_layer() -> None:
    model, inputs = build("t5", torch.float32)
    program = fxshard.parallelize(model, tensor_parallel(2), (), {**inputs, "use_cache": False})
    records = program.collectives()
    # 2 encoder layers of attention and MLP, 2 decoder layers of two attentions and MLP
    assert len([c for c in records if c.phase == "forward" and "block." in c.module]) == 2 * 2 + 2 * 3
    assert {c.kind for c in records if c.phase == "forward" and "block." in c.module} == {"all_reduce"}
    # backward: likewise (both decoder layers read the encoder's result, which is one value), and the head's
    assert len([c for c in records if c.phase == "backward" and c.kind == "all_reduce"]) == 2 * 2 + 2 * 3 + 1 + 1
    # beside them only the gradient of the table of position biases, one an encoder and a decoder: the cut by heads that
    # every layer's attention asks for moves up to the table
    rest = [c for c in records if c.phase == "backward" and c.kind != "all_reduce"]
    assert [c.kind for c in rest] == ["all_gather"] * 2
    assert all(c.module.endswith("block.0.layer.0.SelfAttention.relative_attention_bias") for c in rest)


def test_the_cache_of_keys_and_values_is_gathered_only_to_be_returned() -> None:
    model, inputs = build("llama", torch.float32)
    program = fxshard.parallelize(model, tensor_parallel(2), (), inputs)
    gathers = [c for c in program.collectives() if c.kind == "all_gather" and "layers" in c.module]
    assert len(gathers) == 4  # key and value of two layers
    assert all("constrain" in c.reason or "output" in c.reason for c in gathers)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sequence_parallel_layers_move_megatrons_bytes(ranks: int) -> None:
    layers = layers_of(program_of("llama", sequence_parallel(ranks)))
    outside = layers.pop("")
    expected = {
        ("forward", "reduce_scatter", "tp", FULL): 2,
        ("forward", "all_gather", "tp", FULL): 2,
        ("backward", "reduce_scatter", "tp", FULL): 2,
        ("backward", "all_gather", "tp", FULL): 2,
        ("backward", "all_reduce", "tp", HIDDEN * 4): 2,  # the gradients of the two norms' weights
    }
    assert layers == {"0": expected, "1": expected}
    assert ("forward", "all_reduce", "tp", FULL) not in outside
    assert outside["forward", "reduce_scatter", "tp", FULL] == 1


def test_sequence_parallel_of_gpt2_reduces_every_bias_and_norm_gradient() -> None:
    layers = layers_of(program_of("gpt2", sequence_parallel(2)))
    layers.pop("")
    expected = {
        ("forward", "reduce_scatter", "tp", FULL): 2,
        ("forward", "all_gather", "tp", FULL): 2,
        ("backward", "reduce_scatter", "tp", FULL): 2,
        ("backward", "all_gather", "tp", FULL): 2,
        ("backward", "all_reduce", "tp", HIDDEN * 4): 6,  # two norms' weights and biases, two row biases
    }
    assert layers == {"0": expected, "1": expected}


def test_data_parallel_communicates_gradients_and_outputs_only() -> None:
    program = program_of("llama", data_parallel(2))
    model, _ = build("llama", torch.float32)
    records = program.collectives()
    forward = [(c.kind, c.num_bytes) for c in records if c.phase == "forward"]
    assert forward == [("all_gather", BATCH * LENGTH * 128 * 4)]
    backward = Counter((c.kind, c.num_bytes) for c in records if c.phase == "backward")
    assert backward == Counter(("all_reduce", p.numel() * 4) for p in model.parameters())


def test_data_parallel_with_split_outputs_gathers_nothing() -> None:
    program = program_of("llama", data_parallel(2) | fxshard.Plan({"dp": 2}, outputs={"dp": fxshard.Shard(0)}))
    assert {c.kind for c in program.collectives()} == {"all_reduce"}
    assert {c.phase for c in program.collectives()} == {"backward"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_data_parallel_beside_tensor_parallel_halves_what_tensor_parallel_moves(name: str) -> None:
    layers = layers_of(program_of(name, data_parallel(2) | tensor_parallel(2)))
    for layer in ("0", "1"):
        assert layers[layer]["forward", "all_reduce", "tp", FULL // 2] == 2
        assert layers[layer]["backward", "all_reduce", "tp", FULL // 2] == 2
        assert sum(n for (phase, _, _, _), n in layers[layer].items() if phase == "forward") == 2
        assert not any(kind != "all_reduce" for _, kind, _, _ in layers[layer])
    model, _ = build(name, torch.float32)
    per_layer = sum(1 for n, _ in model.named_parameters() if re.search(r"\.0\.", n))
    assert sum(n for (_, _, axis, _), n in layers["0"].items() if axis == "dp") == per_layer


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_sequence_parallel_beside_data_parallel_keeps_the_batch_split(name: str) -> None:
    program = program_of(name, data_parallel(2) | sequence_parallel(2))
    layers = layers_of(program)
    outside = layers.pop("")
    model, _ = build(name, torch.float32)
    trained = sum(1 for _ in model.parameters())
    everything = sum(layers.values(), outside)
    assert sum(n for (phase, _, axis, _), n in everything.items() if "dp" in axis and phase == "backward") >= trained
    for layer in layers.values():
        assert layer["forward", "reduce_scatter", "tp", FULL // 2] == 2
        assert not any(axis == "dp" and phase == "forward" for phase, _, axis, _ in layer)


@pytest.mark.parametrize("plan", [tensor_parallel(2), sequence_parallel(2), data_parallel(2)])
def test_every_collective_says_where_and_why(plan: fxshard.Plan) -> None:
    program = program_of("llama", plan)
    for record in program.collectives():
        assert record.module, record
        assert record.source.startswith("modeling_llama.py:"), record
        assert record.reason.startswith(("%", "every rank")), record
    text = program.explain()
    assert text.count("\n") >= len(program.collectives())


def test_train_mode_without_dropout_communicates_as_eval_mode() -> None:
    model, inputs = build("llama", torch.float32, training=True, attention_dropout=0.0)
    trained = fxshard.parallelize(model, tensor_parallel(2), (), {**inputs, "use_cache": False})
    assert trained.collectives() == program_of("llama", tensor_parallel(2)).collectives()

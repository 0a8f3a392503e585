"""Sizes that do not divide by the ranks: outputs, all gradients and all weights are one device's, in simulation.

Real ranks: ``tests/distributed/test_uneven.py``.
"""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch

import fxshard
from tests.helpers import SINGLE, Result, assert_equivalent, run_original, slow_but_for
from tests.models.uneven import CASES, PLANS, WORDS, build_case, words

FAST = {
    ("llama", "tp4"), ("llama", "sp4"), ("llama", "dp4"), ("llama", "dp2_tp3"), ("llama_1_key_head", "tp4"),
    ("llama_2_key_heads", "sp4"), ("llama_2_heads", "tp4"), ("llama_few_rows", "dp4"), ("llama_one_row", "sp4"),
    ("gpt2", "sp4"),
}  # fmt: skip
every_case = slow_but_for("name, plan", product(CASES, PLANS), *FAST)


@functools.cache
def original(name: str, training: bool) -> Result:
    model, inputs = build_case(name, training=training)
    return run_original(model, (), inputs, seed=5)


def check(name: str, plan: str, training: bool = False) -> fxshard.ParallelModule:
    model, inputs = build_case(name, training=training)
    return assert_equivalent(model, PLANS[plan], (), inputs, expected=original(name, training), seed=5)


def weight_shares(program: fxshard.ParallelModule) -> list[float]:
    """What each rank holds of all weights."""
    whole = sum(p.numel() for p in program._original.get().parameters())
    ranks = range(program.mesh.world_size)
    return [sum(p.numel() for p in program.rank_module(r).parameters()) / whole for r in ranks]


@pytest.mark.thin(2)
@pytest.mark.in_turn(4)
@every_case
def test_equals_one_device(name: str, plan: str) -> None:
    program = check(name, plan)
    assert not program.fallbacks()
    assert not program.compiled.resolved.notes
    expected, actual = program._original.get().state_dict(), program.full_state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    if "dp4" not in plan:
        ranks = program.mesh.size("tp")
        assert max(weight_shares(program)) < 1 / ranks + 0.25


one_of_four = slow_but_for("plan", ("dp2_tp2", "tp4", "sp4", "dp4"), "dp2_tp2")


@one_of_four
def test_uneven_dropout_draws_the_masks_of_one_device(plan: str) -> None:
    assert original("gpt2", True).loss != original("gpt2", False).loss
    check("gpt2", plan, training=True)


@one_of_four
def test_a_loss_over_uneven_rows_and_words(plan: str) -> None:
    """A mean over the labels that count, wherever they lie; the scores of 1,003 words lie on all ranks."""
    model, inputs = build_case("llama")
    labels = words(5, 17)
    labels[0, :9] = labels[2] = labels[4, 3:] = -100
    program = assert_equivalent(
        model, PLANS[plan], (), {**inputs, "labels": labels, "use_cache": False}, tolerance=SINGLE,
        loss=lambda output: output.loss,
    )  # fmt: skip
    assert not program.fallbacks()


def test_what_the_ranks_hold() -> None:
    """As ``torch.chunk`` cuts, in whole heads: two key heads for the first rank would leave the fourth none."""
    model, inputs = build_case("llama")
    program = fxshard.parallelize(model, PLANS["tp4"], (), inputs)
    shapes = [
        {
            n: tuple(p.shape)
            for n, p in program.rank_module(r).named_parameters()
            if "layers.0." in n or "model" not in n
        }
        for r in range(4)
    ]
    heads = [s["model.layers.0.self_attn.q_proj.weight"][0] // 8 for s in shapes]
    key_heads = [s["model.layers.0.self_attn.k_proj.weight"][0] // 8 for s in shapes]
    assert heads == [2, 2, 2, 0]
    assert key_heads == [1, 1, 1, 0]
    assert [s["model.layers.0.self_attn.o_proj.weight"] for s in shapes] == [(48, 8 * n) for n in heads]
    assert [s["lm_head.weight"][0] for s in shapes] == [251, 251, 251, 250]
    assert sum(s["lm_head.weight"][0] for s in shapes) == WORDS
    assert [s["model.layers.0.mlp.down_proj.weight"] for s in shapes] == [(48, 32)] * 4


@pytest.mark.parametrize("name", ["llama_2_key_heads", "llama_3_heads"])
def test_heads_that_do_not_divide_are_split_all_the_same(name: str) -> None:
    model, inputs = build_case(name)
    program = fxshard.parallelize(model, PLANS["tp4"], (), inputs)
    for projection, dim in (("q_proj", 0), ("o_proj", 1)):
        placement = program.placements_of(f"model.layers.1.self_attn.{projection}.weight")[0]
        assert placement.is_shard(dim), f"{projection} is {placement}"

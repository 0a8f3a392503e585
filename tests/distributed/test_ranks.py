"""The programs on real processes, over gloo: what one device computes, trains, and stores."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fxshard
from fxshard import data_parallel, tensor_parallel
from fxshard.errors import DistributedError, FxshardError
from tests.distributed import ranks
from tests.distributed.launch import launch
from tests.models.zoo import build

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_ranks_equal_one_device(name: str) -> None:
    launch(2, ranks.equal_the_original, [(name, plan) for plan in ("tp2", "sp2", "dp2")], torch.float32)


def test_four_ranks_equal_one_device() -> None:
    launch(4, ranks.equal_the_original, [("llama", "dp2_tp2"), ("gpt2", "dp2_tp2")], torch.float32)


def test_training_follows_one_device() -> None:
    launch(2, ranks.train_gpt2, "tp2")


def test_norms_and_reductions_over_a_split_batch() -> None:
    launch(2, ranks.statistics_of_a_split_batch)


def test_verify_and_what_is_refused() -> None:
    launch(2, ranks.verify_and_refuse)


@pytest.mark.slow
def test_low_precision_rounds_as_in_simulation() -> None:
    launch(2, ranks.low_precision)


def test_ranks_with_different_weights_are_refused() -> None:
    launch(2, ranks.different_weights)


def test_without_a_process_group_nothing_runs() -> None:
    model, inputs = build("llama", torch.float32)
    program = fxshard.parallelize(model, data_parallel(2) | tensor_parallel(2), (), inputs)
    with pytest.raises(DistributedError, match=r"4 processes, but torch\.distributed is not initialised") as caught:
        program(**inputs)
    assert isinstance(caught.value, FxshardError)
    assert isinstance(caught.value, RuntimeError)
    assert "torchrun" in str(caught.value)
    assert "fxshard.simulate" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp4", "sp4", "dp4", "tp2_dp2", "dp2_sp2"])
def test_more_plans_on_four_ranks(plan: str) -> None:
    launch(4, ranks.equal_the_original, [("llama", plan), ("gpt2", plan)], torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_other_models_on_two_ranks(name: str) -> None:
    launch(2, ranks.equal_the_original, [(name, plan) for plan in ("tp2", "sp2", "dp2")], torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_double_precision(name: str) -> None:
    launch(2, ranks.equal_the_original, [(name, plan) for plan in ("tp2", "sp2", "dp2")], torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_draws_the_masks_of_one_device(name: str) -> None:
    launch(2, ranks.equal_the_original, [(name, plan) for plan in ("tp2", "sp2", "dp2")], torch.float64, True)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "plan"), [(2, "sp2"), (2, "dp2"), (4, "dp2_tp2")])
def test_training_under_other_plans(world: int, plan: str) -> None:
    launch(world, ranks.train_gpt2, plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "dtype"),
    [("dp2_tp2", torch.float32), ("dp2_tp2", torch.float64), ("dp2_sp2", torch.float64), ("tp4", torch.float64)],
)
def test_training_with_dropout_follows_one_device(plan: str, dtype: torch.dtype) -> None:
    launch(4, ranks.train_gpt2, plan, 0.1, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_many_sizes(name: str) -> None:
    launch(4, ranks.many_sizes, [(name, plan) for plan in ("tp4", "dp2_tp2", "dp2_sp2")])

"""On GPUs: NCCL where there are two, and gloo between two ranks that share one; simulation there, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxshard
from tests.distributed.launch import launch
from tests.gpu import jobs
from tests.helpers import assert_equivalent
from tests.presets import preset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GLOO, NCCL = "gloo", "nccl"
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU a rank")
BACKENDS = [GLOO, pytest.param(NCCL, marks=TWO_GPUS)]


@pytest.mark.parametrize("plan", ["tp2", "sp2", "dp2", "zero2", "cp2", "dp2_tp2"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5", "mixtral"])
def test_simulation(name: str, plan: str) -> None:
    model, inputs = jobs.on("cuda", jobs.make(name, jobs.DTYPES.get(name, torch.float64), False))
    assert_equivalent(model, preset(plan), (), inputs)


@pytest.mark.parametrize("plan", ["tp2", "sp2", "dp2"])
def test_simulation_drops_what_one_device_drops(plan: str) -> None:
    model, inputs = jobs.on("cuda", jobs.make("gpt2", torch.float64, True))
    assert_equivalent(model, preset(plan), (), inputs, seed=3)


def test_verify() -> None:
    model, inputs = jobs.on("cuda", jobs.make("gpt2", torch.float64, True))
    assert fxshard.verify(fxshard.parallelize(model, preset("sp2"), (), inputs), **inputs).ok


def test_nccl_of_one_rank() -> None:
    launch(1, jobs.collectives, "cuda", backend=NCCL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("job", "args"),
    [
        (jobs.collectives, ()),
        (jobs.draws, ()),
        (jobs.saves_and_loads, ()),
        (jobs.equal_the_original, ([("llama", "tp2"), ("llama", "sp2"), ("t5", "tp2"), ("vit", "dp2")], False)),
        (jobs.equal_the_original, ([("gpt2", "sp2"), ("llama", "zero2"), ("llama", "cp2"), ("mixtral", "tp2")], True)),
        (jobs.trains_as_one_device, ("gpt2", ("tp2", "dp2", "zero2"))),
        (jobs.trains_as_one_device, ("llama", ("sp2", "zero2"), torch.bfloat16)),
        (jobs.trains_as_one_device, ("llama", ("tp2",), torch.float16)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_two_ranks(backend: str, job: Any, args: tuple[Any, ...]) -> None:
    launch(2, job, "cuda", *args, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_beside_collectives(backend: str) -> None:
    launch(2, overlapped, backend=backend)


def overlapped() -> None:
    jobs.equal_the_original("cuda", [("llama", "tp2"), ("llama", "sp2")], True, overlap=2)


@pytest.mark.slow
def test_compiled_on_one_rank() -> None:
    jobs.compiles("cuda", ("tp1",))


@pytest.mark.slow
@TWO_GPUS
def test_compiled() -> None:
    launch(2, jobs.compiles, "cuda", ("tp2", "sp2"), backend=NCCL)

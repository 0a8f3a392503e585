"""What the spawned processes run: activation checkpointing, whose calls communicate again in the backward pass."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fxshard
from fxshard import Plan, Shard
from fxshard.runtime.collectives import ProcessAxisGroup
from fxshard.training.buckets import Buckets
from tests.helpers import run_original, weighted_loss
from tests.models.uneven import build_case
from tests.models.zoo import build
from tests.presets import preset

Log = list[tuple[str, tuple[int, ...]]]


@contextmanager
def communicated() -> Iterator[Log]:
    """Every collective that this rank takes part in."""
    own, bucket = ProcessAxisGroup.raw, Buckets._sum
    log: Log = []

    @functools.wraps(own)
    def raw(self: ProcessAxisGroup, name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if name not in ("identity", "own_part"):
            log.append((name, tuple(dist.get_process_group_ranks(self.group))))
        return own(self, name, x, *args, **kwargs)

    def summed(self: Buckets, part: torch.Tensor) -> Callable[[], None]:
        log.append(("all_reduce", tuple(dist.get_process_group_ranks(self.group.group))))
        return bucket(self, part)

    ProcessAxisGroup.raw, Buckets._sum = raw, summed  # type: ignore[method-assign]
    try:
        yield log
    finally:
        ProcessAxisGroup.raw, Buckets._sum = own, bucket  # type: ignore[method-assign]


def kept_bytes(program: nn.Module, run: Callable[[], Any]) -> tuple[Any, int]:
    """What a forward pass returns, and the bytes that it keeps for the backward pass, beside weights."""
    weights = {p.untyped_storage().data_ptr() for p in program.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = run()
    return out, sum(storage.nbytes() for storage in kept.values())


def step(program: fxshard.ParallelModule, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int, Log, Log]:
    """Whole gradients of one step, the bytes kept, and what was communicated forward and backward."""
    program.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    with communicated() as forward:
        output, num_bytes = kept_bytes(program, lambda: program(**inputs))
    with communicated() as backward:
        weighted_loss(output).backward()
    return program.full_grads(), num_bytes, forward, backward


def compare(
    model: nn.Module, inputs: dict[str, Any], asked: str | Plan, least: float, *others: nn.Module, **options: Any
) -> None:
    """Programs that compute anew give the gradients of one that keeps all, bit for bit, and keep less.

    Args:
        model: the model, which asks for no checkpoints.
        inputs: its inputs.
        asked: the plan, or the name of a preset.
        least: how many times less is kept.
        others: the same model, asking for checkpoints.
        options: those that ask for checkpoints of ``model``.
    """
    plan = preset(asked) if isinstance(asked, str) else asked
    plain = step(fxshard.parallelize(model, plan, (), inputs), inputs)
    for anew, how in [(model, options), *((other, {}) for other in others)]:
        program = fxshard.parallelize(anew, plan, (), inputs, **how)
        assert "checkpoint(" in program.code()
        grads, num_bytes, forward, backward = step(program, inputs)
        assert grads.keys() == plain[0].keys()
        differing = [name for name, grad in grads.items() if not torch.equal(grad, plain[0][name])]
        assert not differing, f"{asked}, rank {dist.get_rank()}: {differing}"
        assert num_bytes * least < plain[1], f"{num_bytes} of {plain[1]} bytes are kept"
        assert forward == plain[2]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, [name for name, _ in backward])
        assert all(each == everywhere[0] for each in everywhere), "the ranks communicate in different orders"
        for phase, log in (("forward", forward), ("backward", backward)):
            said = Counter(c.kind for c in program.collectives() if c.phase == phase)
            assert Counter(name for name, _ in log) == said, f"{asked}, {phase}"


def transformers_models(
    plans: list[str], name: str = "llama", least: float = 2.0, reentrant: tuple[bool, ...] = (False, True)
) -> None:
    """What ``gradient_checkpointing_enable`` asks for, and the same by fxshard's own option, with dropout."""
    model, inputs = build(name, torch.float32, training=True)
    inputs["use_cache"] = False
    others = [copy.deepcopy(model) for _ in reentrant]
    for other, use_reentrant in zip(others, reentrant, strict=True):
        other.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    layers = {"llama": "model.layers.*", "gpt2": "transformer.h.*"}[name]
    for plan in plans:
        compare(model, inputs, plan, least, *others, checkpoint=layers)


def independent_masks(plans: list[str]) -> None:
    """Where each rank draws for itself, it draws the same again."""
    model, inputs = build("gpt2", torch.float32, training=True)
    inputs["use_cache"] = False
    for plan in plans:
        found = []
        for checkpoint in ((), "transformer.h.*"):
            program = fxshard.parallelize(
                model, preset(plan), (), inputs, randomness="independent", checkpoint=checkpoint
            )
            found.append(step(program, inputs)[0])
        assert "draw_apart" in program.code()
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Twice(nn.Module):
    """Two MLPs behind one another, with nothing between them that all ranks compute."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim, bias=False)
        self.up2, self.down2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        return self.down2(torch.relu(self.up2(y)))


def narrow_layers() -> None:
    """The last rank has no feature of the MLPs: it kept nothing that it could ask for.

    All the same it must take part in the sum between the two, once more. Without checkpoints it kept less than now,
    when it keeps the input as the others do.
    """
    model = nn.Sequential(nn.Embedding(32, 8), Twice(8, 3), Twice(8, 3))
    inputs = {"input": torch.arange(32).reshape(2, 16)}
    plan = Plan({"tp": 4}, {"*.up*": Shard(0), "*.down*.weight": Shard(1)})
    assert "nothing" in fxshard.parallelize(model, plan, (), inputs).code(rank=3)
    compare(model, inputs, plan, 0, checkpoint=["1", "2"])


def ranks_that_hold_nothing(cases: list[tuple[str, str]]) -> None:
    """They run other statements, and must communicate in the same order."""
    for name, plan in cases:
        model, inputs = build_case(name, torch.float64, training=True)
        compare(model, inputs | {"use_cache": False}, plan, 1.5, checkpoint="model.layers.*")


def checked_and_trained() -> None:
    """``verify`` runs it for real; AdamW goes where it goes on one device."""
    model, inputs = build("llama", torch.float32)
    inputs["use_cache"] = False
    program = fxshard.parallelize(model, preset("sp2"), (), inputs, checkpoint="model.layers.*")
    with communicated() as log:
        report = fxshard.verify(program, **inputs)
    assert report.ok, str(report)
    assert len([name for name, _ in log]) > len([c for c in program.collectives() if not c.again])
    expected = run_original(model, (), inputs)
    with torch.no_grad():
        output = program(**inputs)
    torch.testing.assert_close(output.logits, expected.outputs[0][".logits"], rtol=1e-4, atol=1e-4)

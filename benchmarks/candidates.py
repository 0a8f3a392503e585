"""The ways to run one model on two ranks, each with this rank's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fxshard
from benchmarks.handwritten import HANDWRITTEN, split_dim
from benchmarks.megatron import Gather, Own, gather_raw
from benchmarks.models import build
from benchmarks.styles import apply_styles, apply_transformers_styles
from fxshard import Plan, Shard

PRESETS = {
    "tp": fxshard.tensor_parallel(2),
    "sp": fxshard.sequence_parallel(2),
    "dp": fxshard.data_parallel(2) | Plan({"dp": 2}, outputs={"dp": Shard(0)}),
    "zero": fxshard.zero(2) | Plan({"dp": 2}, outputs={"dp": Shard(0)}),
}
"""What is measured: tensor parallelism, with the sequence split, data parallelism, with weights stored in parts."""


@dataclass
class Candidate:
    """One way to run a model.

    Attributes:
        name: what tables call it.
        call: this rank's forward pass.
        weights: this rank's parameters.
        grads: the whole gradients of the sum over both ranks' losses, under the model's own names; collective.
        finish: what is left to do after a backward pass.
        counted: its collectives can be counted; compiled code cannot be looked into while it runs.
    """

    name: str
    call: Callable[[torch.Tensor], torch.Tensor]
    weights: list[torch.Tensor]
    grads: Callable[[], dict[str, torch.Tensor]]
    finish: Callable[[], None] = lambda: None
    counted: bool = True


def candidates(
    name: str, dim: int, way: str, train: bool, compiled: bool = False, overlap: Sequence[int] = ()
) -> list[Candidate]:
    """All ways to run a model in parallel, fxshard's first; with ``compiled`` under torch.compile, and as they are.

    With ``overlap`` there is only fxshard, without and with so many pieces.
    """
    if overlap:
        return [generated(name, dim, way, train, overlap=pieces) for pieces in (0, *overlap)]
    if compiled:
        torch.compiler.reset()
        made = [generated(name, dim, way, train, torch.compile), generated(name, dim, way, train)]
        hands = [by_hand(name, dim, way, wrap=torch.compile), by_hand(name, dim, way)]
        return [*made, *hands] if way in ("tp", "sp") else made
    if way in ("tp", "sp"):
        twice = [by_hand(name, dim, way), by_hand(name, dim, way, again=True)]  # how far apart they are is noise
        made = [generated(name, dim, way, train), *twice, dtensor(name, dim, way)]
        return [*made, transformers(name, dim)] if way == "tp" else made
    return [generated(name, dim, way, train), ddp(name, dim) if way == "dp" else fsdp(name, dim)]


def logits(output: Any) -> torch.Tensor:
    """The tensor that a model returns."""
    return output if isinstance(output, torch.Tensor) else output.logits


def example(name: str, dim: int, way: str, train: bool) -> torch.Tensor:
    """An input: that of a layer inside of a model needs a gradient, that of a whole model or a first layer does not."""
    _, x = build(name, dim)
    return x.requires_grad_(train and way in ("tp", "sp") and x.dtype.is_floating_point)


def original(name: str, dim: int) -> Candidate:
    """The model on one device."""
    model, _ = build(name, dim)
    return from_module("one device", model, lambda x: logits(model(x)))


def generated(name: str, dim: int, way: str, train: bool, wrap: Any = None, overlap: int = 0) -> Candidate:
    """What fxshard makes of it; ``wrap`` is torch.compile or nothing."""
    model, _ = build(name, dim)
    program = fxshard.parallelize(model, PRESETS[way], (example(name, dim, way, train),), overlap=overlap)
    run = wrap(program, fullgraph=True) if wrap else program
    title = "fxshard, compiled" if wrap else f"overlap {overlap}" if overlap else "fxshard"
    weights, grads = list(program.parameters()), program.full_grads
    return Candidate(title, lambda x: logits(run(x)), weights, grads, counted=wrap is None)


def by_hand(name: str, dim: int, way: str, again: bool = False, wrap: Any = None) -> Candidate:
    """The hand-written code; ``wrap`` is torch.compile or nothing."""
    made = HANDWRITTEN[name](build(name, dim)[0], way == "sp")
    run = wrap(made.__call__) if wrap else made

    def grads() -> dict[str, torch.Tensor]:
        dims = {name: split_dim(name) for name in made.weights}
        found = _grads_of(made.weights.items())
        return {n: g if dims[n] is None else gather_raw(g, dims[n]) for n, g in found.items()}

    title = "by hand, compiled" if wrap else "by hand again" if again else "by hand"
    return Candidate(title, run, list(made.weights.values()), grads, made.finish, counted=wrap is None)


def dtensor(name: str, dim: int, way: str) -> Candidate:
    """DTensor, by ``parallelize_module``."""
    model = apply_styles(build(name, dim)[0], way == "sp")
    if way == "sp" and name != "llama":
        return from_module("DTensor", model, lambda x: Gather.apply(model(Own.apply(x, 1)), 1, False))
    return from_module("DTensor", model, lambda x: logits(model(x)))


def transformers(name: str, dim: int) -> Candidate:
    """The styles of transformers."""
    model = apply_transformers_styles(build(name, dim)[0])
    return from_module("tp_plan", model, lambda x: logits(model(x)))


def ddp(name: str, dim: int) -> Candidate:
    """``DistributedDataParallel``, without its copies of gradients."""
    model, _ = build(name, dim)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    rank = dist.get_rank()
    return from_module("DDP", model, lambda x: logits(wrapped(x.chunk(2)[rank])), mean=True)


def fsdp(name: str, dim: int) -> Candidate:
    """``fully_shard``: each layer a unit, as is the rest; all is gathered again in the backward pass."""
    model, _ = build(name, dim)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers if name == "llama" else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    rank = dist.get_rank()
    return from_module("fully_shard", model, lambda x: logits(model(x.chunk(2)[rank])), mean=True)


def from_module(
    name: str, model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], mean: bool = False
) -> Candidate:
    """A module that was changed in place; with ``mean`` its gradients are those of the mean over the ranks."""

    def grads() -> dict[str, torch.Tensor]:
        return {n: g * 2 if mean else g for n, g in _grads_of(model.named_parameters()).items()}

    return Candidate(name, call, list(model.parameters()), grads)


def _grads_of(weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The gradients, whole where they are DTensors."""
    found = {name: weight.grad for name, weight in weights if weight.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}

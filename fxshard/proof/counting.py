"""What a rank does in one step, counted and not timed: floating-point operations, and bytes that it communicates.

The code that the rank runs is run once, forward and backward, without the other ranks and on the meta device: it takes
no memory, and the shapes may be those of a model that no machine here could hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxshard.errors import FxshardError
from fxshard.inspect.report import Collective, collectives_of
from fxshard.passes.pipeline import Compiled
from fxshard.program import ParallelModule
from fxshard.runtime.autocast import using
from fxshard.runtime.lone_rank import Moved, alone_axes
from fxshard.runtime.module import RankModule, find, load, place


@dataclass(frozen=True)
class Counts:
    """What one rank does in one step.

    Attributes:
        rank: the rank.
        forward_flops: floating-point operations of products, convolutions and attention, a multiplication and an
            addition each, in the forward pass.
        backward_flops: those of the backward pass; what is computed anew belongs to it.
        collectives: what the program communicates, ``program.collectives()``.
        issued: the collectives that the rank's code issued while it was counted. Gradients of whole weights stand there
            by themselves, not in buckets, and weights that the backward pass gathers again are gathered once.
        sizes: the number of ranks along each axis.
    """

    rank: int
    forward_flops: int
    backward_flops: int
    collectives: tuple[Collective, ...]
    issued: tuple[Moved, ...]
    sizes: Mapping[str, int]

    @property
    def flops(self) -> int:
        """Those of forward and backward pass."""
        return self.forward_flops + self.backward_flops

    def payload(self, kind: str = "", phase: str = "") -> int:
        """The bytes of the full-size tensors that are communicated; of one kind or phase, where named."""
        return sum(c.num_bytes for c in self._those(kind, phase))

    def sent(self, kind: str = "", phase: str = "") -> float:
        """The bytes that this rank sends over its link, where collectives go round in a ring.

        An all-reduce of ``s`` bytes over ``n`` ranks sends ``2 s (n - 1) / n``; an all-gather, a reduce-scatter and an
        all-to-all (of which a rank has ``s / n``) ``s (n - 1) / n``; a rotation sends what it passes on.
        """
        return sum(ring_bytes(c.kind, c.num_bytes, self._ranks(c.axis)) for c in self._those(kind, phase))

    def _those(self, kind: str, phase: str) -> list[Collective]:
        return [c for c in self.collectives if kind in ("", c.kind) and phase in ("", c.phase)]

    def _ranks(self, axis: str) -> int:
        ranks = 1
        for name in axis.split("+"):
            ranks *= self.sizes[name]
        return ranks


def ring_bytes(kind: str, num_bytes: int, ranks: int) -> float:
    """What a rank sends for one collective whose full-size tensor has ``num_bytes``.

    >>> ring_bytes("all_reduce", 800, 4), ring_bytes("all_gather", 800, 4)
    (1200.0, 600.0)

    Reference: Patarasu and Yuan, 2009, Bandwidth optimal all-reduce algorithms.
    """
    if kind == "rotate":
        return float(num_bytes)
    return (2 if kind == "all_reduce" else 1) * num_bytes * (ranks - 1) / ranks


def count(program: ParallelModule, *args: Any, rank: int = 0, **kwargs: Any) -> Counts:
    """Counts what a rank does in one step: forward, and backward from the sum of all outputs.

    Args:
        program: what ``parallelize`` returned; its model may live on the meta device.
        args: the model's inputs, whole.
        rank: which rank.
        kwargs: the model's inputs by name.

    Raises:
        FxshardError: where what the program does depends on values, of which the meta device has none.

    >>> import fxshard
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    >>> program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (torch.randn(4, 8),))
    >>> counts = count(program, torch.randn(4, 8))
    >>> counts.forward_flops == 2 * 4 * 8 * 32 * 2 / 2, counts.payload(), counts.sent()
    (True, 128, 128.0)
    """
    compiled, leaves = program.compile_call(args, kwargs)
    issued: list[Moved] = []
    axes = alone_axes(program.mesh, rank, program.options.reduce_dtype, issued)
    module = _weightless(program, compiled, rank)
    forward = load(program.source(compiled, rank), axes, torch.device("meta"), f"<fxshard count {id(compiled)} {rank}>")
    inputs = [_on_meta(x) if isinstance(x, torch.Tensor) else x for x in leaves]
    try:
        with using(()), torch.enable_grad(), FlopCounterMode(display=False) as first:
            outputs = forward(module, *inputs)
        flowing = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
        with FlopCounterMode(display=False) as second:
            torch.autograd.backward(flowing, [torch.ones_like(x) for x in flowing])
    except (NotImplementedError, RuntimeError) as error:
        raise FxshardError(
            f"what this program does cannot be counted without values: {error}", fix="count a program without that part"
        ) from error
    flops = first.get_total_flops(), second.get_total_flops()
    sizes = dict(zip(program.mesh.names, program.mesh.sizes, strict=True))
    return Counts(rank, *flops, tuple(collectives_of(compiled)), tuple(issued), sizes)


def _on_meta(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, device="meta").requires_grad_(x.requires_grad)


def _weightless(program: ParallelModule, compiled: Compiled, rank: int) -> RankModule:
    """A rank's module, whose tensors have sizes and no memory."""
    program.place_constants(compiled, rank)
    source, out = program.rank_module(rank), RankModule(rank, program.mesh)
    made: dict[int, Any] = {}
    names = dict.fromkeys(n for n, _ in source.named_parameters(remove_duplicate=False))
    names |= dict.fromkeys(n for n, _ in source.named_buffers(remove_duplicate=False))
    names |= dict.fromkeys(compiled.attributes_of(rank))
    for name in names:
        value = find(source, name)
        if isinstance(value, torch.Tensor) and id(value) not in made:
            empty = torch.empty_like(value, device="meta")
            made[id(value)] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
        place(out, name, made.get(id(value), value))
    return out

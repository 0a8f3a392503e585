"""Functions that the ranks of an axis compute together, while tensors go round from rank to rank.

Such a function is written for one rank, as a generator, forward and backward. It yields what goes to the next rank, and
how large is what comes from the one before; it is sent a function that waits for that. Between the two it may compute:

    arrive = yield Rotation([k, v], shapes)      the ring begins to turn
    out = out + f(q, k, v)                       while this block is computed
    k, v = arrive()                              the next block is here

On real ranks each process runs its own generator. In simulation all ranks' generators run side by side, forward and
backward, as one autograd function: so one backward pass goes through all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist


class Rotation(NamedTuple):
    """What a rank sends to the next one, and the shapes of what comes from the one before."""

    tensors: Sequence[torch.Tensor]
    shapes: Sequence[Sequence[int]]


Arrival: TypeAlias = Callable[[], Sequence[torch.Tensor]]
Rounds: TypeAlias = Generator[Rotation, Arrival, tuple[Any, ...]]


class Joint(Protocol):
    """A function that the ranks compute together."""

    def forward(self, index: int, size: int, *inputs: torch.Tensor) -> Rounds:
        """The result, and behind it what the backward pass needs, of the rank at ``index`` of ``size``."""

    def backward(self, index: int, size: int, saved: Sequence[torch.Tensor], grad: torch.Tensor) -> Rounds:
        """The gradients of the inputs, in their order, of that rank."""


def turn(group: dist.ProcessGroup, rotation: Rotation) -> Arrival:
    """Begins to pass tensors to the next rank of a process group; empty ones are not sent."""
    size, index = dist.get_world_size(group), dist.get_rank(group)
    after, before = (dist.get_global_rank(group, (index + step) % size) for step in (1, -1))
    sent = [x.contiguous() for x in rotation.tensors]
    came = [x.new_empty(shape) for x, shape in zip(sent, rotation.shapes, strict=True)]
    calls = [dist.P2POp(dist.isend, x, after, group) for x in sent if x.numel()]
    calls += [dist.P2POp(dist.irecv, x, before, group) for x in came if x.numel()]
    works = dist.batch_isend_irecv(calls) if calls else []

    def arrive() -> Sequence[torch.Tensor]:
        for work in works:
            work.wait()
        sent.clear()  # kept until it has gone
        return came

    return arrive


def alone(rounds: Rounds, start: Callable[[Rotation], Arrival]) -> tuple[Any, ...]:
    """Runs one rank's rounds; ``start`` begins a rotation."""
    try:
        rotation = next(rounds)
        while True:
            rotation = rounds.send(start(rotation))
    except StopIteration as stop:
        out: tuple[Any, ...] = stop.value
        return out


def side_by_side(ranks: Sequence[Rounds]) -> list[tuple[Any, ...]]:
    """Runs the rounds of all ranks in one thread."""
    arrivals: list[Any] = [None] * len(ranks)
    while True:
        sent: list[Rotation] = []
        done: list[tuple[Any, ...]] = []
        for rounds, arrival in zip(ranks, arrivals, strict=True):
            try:
                sent.append(rounds.send(arrival))
            except StopIteration as stop:
                done.append(stop.value)
        if done:
            assert not sent, "some ranks turn further than others"
            return done
        arrivals = [_arrival(sent[rank - 1], rotation) for rank, rotation in enumerate(sent)]


def _arrival(before: Rotation, mine: Rotation) -> Arrival:
    came = [x.clone() for x in before.tensors]
    shapes = [tuple(x.shape) for x in came]
    assert shapes == [tuple(shape) for shape in mine.shapes], f"{shapes} came, {mine.shapes} was awaited"
    return lambda: came


class OnRank(torch.autograd.Function):
    """A joint function, as one of several processes runs it."""

    @staticmethod
    def forward(ctx: Any, function: Joint, index: int, size: int, start: Any, *inputs: torch.Tensor) -> torch.Tensor:
        """Runs this rank's forward rounds."""
        ctx.where = function, index, size, start
        out: torch.Tensor
        out, *saved = alone(function.forward(index, size, *inputs), start)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Runs this rank's backward rounds."""
        function, index, size, start = ctx.where
        return (None,) * 4 + alone(function.backward(index, size, ctx.saved_tensors, grad), start)


class InLockstep(torch.autograd.Function):
    """A joint function of all ranks at once; the inputs are those of the first rank, of the second, and so on."""

    @staticmethod
    def forward(ctx: Any, function: Joint, size: int, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs all ranks' forward rounds."""
        count = len(inputs) // size
        each = [function.forward(i, size, *inputs[i * count : (i + 1) * count]) for i in range(size)]
        results = side_by_side(each)
        ctx.where = function, size
        ctx.save_for_backward(*(x for _, *saved in results for x in saved))
        return tuple(out for out, *_ in results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Runs all ranks' backward rounds."""
        function, size = ctx.where
        count = len(ctx.saved_tensors) // size
        saved = [ctx.saved_tensors[i * count : (i + 1) * count] for i in range(size)]
        each = [function.backward(i, size, saved[i], grad) for i, grad in enumerate(grads)]
        return (None, None, *(g for found in side_by_side(each) for g in found))

"""The gradients of weights that every rank holds whole, summed over the ranks in buckets during the backward pass.

All these gradients lie end to end in one flat tensor, in the order in which the backward pass gives them, and a bucket
is so many bytes of it. When the backward pass has given all of a bucket, its all-reduce begins, and is waited for at
the end of the backward pass, when the gradients go to ``parameter.grad`` as views of the flat tensor. So a step has
ceil(bytes / bucket) all-reduces, whatever the number of weights.

What else gives a weight a gradient, such as a penalty on its norm outside of the program, comes to ``.grad`` as always:
every rank computes all of it, and it is not summed. ``torch.autograd.grad`` gets its gradients summed one by one.

Reference: PyTorch Distributed (Li et al., 2020), section 3.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fxshard.errors import DistributedError
from fxshard.ranks.faults import guarded
from fxshard.runtime.collectives import Axis, ProcessAxisGroup, sum_dtype
from fxshard.torch_internals import after_backward, backward_id, hooks_of, is_only_reader, record, will_accumulate

MIB = 2**20
BUCKET_BYTES = 25 * MIB
"""The size of a bucket, unless told otherwise: what ``DistributedDataParallel`` takes."""


def cut_in_buckets(sizes: Sequence[int], limit: int) -> list[tuple[int, int, list[int]]]:
    """Cuts gradients that lie end to end in buckets of ``limit`` elements.

    Args:
        sizes: the elements of each gradient.
        limit: the elements of a bucket; the last one may have fewer. With 0 each gradient is a bucket.

    Returns:
        For each bucket where it begins and ends, and which gradients have a part in it.

    >>> cut_in_buckets([3, 2, 4], 4)
    [(0, 4, [0, 1]), (4, 8, [1, 2]), (8, 9, [2])]
    """
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    starts = [0, *ends]
    if not limit:
        return [(starts[i], end, [i]) for i, end in enumerate(ends)]
    total = starts[-1]
    return [
        (at, min(at + limit, total), [i for i, end in enumerate(ends) if starts[i] < at + limit and end > at])
        for at in range(0, total, limit)
    ]


def elements(bucket_bytes: int, dtype: torch.dtype) -> int:
    """How many elements of ``dtype`` are a bucket of so many bytes: at least one, if any."""
    return max(1, bucket_bytes // dtype.itemsize) if bucket_bytes else 0


@dataclass
class Synchronization:
    """Whether the gradients of a program are summed after each backward pass: not within ``no_sync``.

    Attributes:
        held: they wait.
        members: what sums them: those of one dtype over the same axes each.
        calls: how many calls of the program there were.
    """

    held: bool = False
    members: list[Buckets] = field(default_factory=list)
    calls: int = 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keeps gradients to each rank, until a backward pass outside of this context."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before


@dataclass
class _Pass:
    """What a backward pass has brought so far."""

    arrived: set[int] = field(default_factory=set)
    launched: int = 0
    works: list[Callable[[], None]] = field(default_factory=list)
    late: dict[int, torch.Tensor] = field(default_factory=dict)


class Buckets:
    """The gradients of some weights of one dtype, summed over one group.

    Args:
        group: the ranks over which they are summed.
        weights: in the order in which the backward pass gives their gradients.
        bucket_bytes: the size of a bucket.
        synchronization: says when to wait with the sums.
    """

    def __init__(
        self,
        group: ProcessAxisGroup,
        weights: Sequence[nn.Parameter],
        bucket_bytes: int,
        synchronization: Synchronization,
    ) -> None:
        self.group = group
        self.weights = list(weights)
        self.synchronization = synchronization
        sizes = [w.numel() for w in weights]
        self.sizes, self.total = sizes, sum(sizes)
        self.positions = {id(w): i for i, w in enumerate(weights)}
        dtype = weights[0].dtype
        self.wide = sum_dtype("all_reduce", dtype, group.reduce_dtype)
        self.cuts = cut_in_buckets(sizes, elements(bucket_bytes, self.wide))
        self.flat: torch.Tensor | None = None
        self.last: torch.Tensor | None = None  # the flat tensor of the last backward pass, to be used again
        self.slots: list[torch.Tensor] = []  # the gradients, as views of the flat tensor
        self.filled: set[int] = set()
        self.complete: dict[int, torch.Tensor] = {}
        self.now: _Pass | None = None
        self.task = -1
        synchronization.members.append(self)
        for weight in weights:
            weight.register_post_accumulate_grad_hook(self._other_gradient)

    @property
    def unsummed(self) -> bool:
        """Whether gradients of ``no_sync`` wait for their sums."""
        return self.now is None and any(self._waits(i) for i in self.filled)

    def add(self, grads: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Takes gradients that the backward pass at hand gives, each with the number of its weight."""
        now = self._begin()
        launched = {index for cut in self.cuts[: now.launched] for index in cut[2]} & now.arrived
        for index, grad in grads:
            slot = self.slots[index]
            if index in launched:
                now.late[index] = now.late[index] + grad if index in now.late else grad.clone()
            elif index in self.filled:
                slot.add_(grad)
            else:
                slot.copy_(grad)
                self.filled.add(index)
            now.arrived.add(index)
        while not self.synchronization.held and now.launched < len(self.cuts):
            if not now.arrived.issuperset(self.cuts[now.launched][2]):
                break
            self._launch(now)

    def is_watched(self, index: int) -> bool:
        """Whether the user's hooks wait for the gradient of a weight as the backward pass gives it."""
        hooks = hooks_of(self.weights[index])
        return any(getattr(hook, "__func__", None) is not Buckets._other_gradient for hook in hooks)

    def _begin(self) -> _Pass:
        """Prepares for a backward pass, when the first of its gradients comes."""
        if self.now is not None and self.task == backward_id():
            return self.now
        self.task = backward_id()
        if self.now is not None:  # the last backward pass ended in an error
            self.filled.clear()
        self.filled = {i for i in self.filled if self._waits(i)}
        for index in self.filled:
            self.weights[index].grad = self.complete.get(index)
        self.complete.clear()
        if not self.filled:
            self.flat = None
        if self.flat is None:
            self._allocate()
        self.now = _Pass()
        after_backward(self._finish)
        for other in self.synchronization.members if not self.synchronization.held else ():
            if other.unsummed:  # this pass need not bring a gradient to any of them
                other._begin()
        return self.now

    def _waits(self, index: int) -> bool:
        """Whether a gradient of ``no_sync`` is still the weight's: ``zero_grad`` may have dropped it."""
        grad = self.weights[index].grad
        return grad is not None and self.flat is not None and grad.data_ptr() == self.slots[index].data_ptr()

    def _allocate(self) -> None:
        with torch.no_grad():
            like, flat, self.last = self.weights[0], self.last, None
            if flat is None or (flat.dtype, flat.device) != (like.dtype, like.device) or not is_only_reader(flat):
                flat = torch.empty(self.total, dtype=like.dtype, device=like.device)
            self.flat, parts = flat, flat.split_with_sizes(self.sizes)
            self.slots = [part.view(w.shape) for part, w in zip(parts, self.weights, strict=True)]

    def _launch(self, now: _Pass) -> None:
        assert self.flat is not None
        start, end, _ = self.cuts[now.launched]
        now.launched += 1
        now.works.append(self._sum(self.flat[start:end]))

    def _sum(self, part: torch.Tensor) -> Callable[[], None]:
        """Begins to sum ``part`` over the ranks; what it returns waits for that."""
        wide = part.to(self.wide)
        work = dist.all_reduce(wide, group=self.group.group, async_op=True)

        def wait() -> None:
            with guarded(self.group, "all_reduce", wide):
                work.wait()
            if wide is not part:
                part.copy_(wide)

        return wait

    def _finish(self) -> None:
        """Ends a backward pass: the sums are complete, and are the weights' gradients."""
        now, self.now = self.now, None
        assert now is not None
        if self.synchronization.held:
            for index in self.filled:
                weight = self.weights[index]
                if weight.grad is not None:
                    self.complete[index] = weight.grad
                weight.grad = self.slots[index]
            return
        for index in set(range(len(self.weights))) - self.filled:
            self.slots[index].zero_()
        while now.launched < len(self.cuts):
            self._launch(now)
        now.works += [self._sum(late) for late in now.late.values()]
        for wait in now.works:
            wait()
        for index in sorted(self.filled):
            slot, weight = self.slots[index], self.weights[index]
            if index in now.late:
                slot.add_(now.late[index])
            weight.grad = slot if weight.grad is None else weight.grad.add_(slot)
        if self.flat is not None and self.flat.device.type == "cpu":  # elsewhere the allocator keeps what is freed
            self.last = self.flat
        self.filled, self.flat, self.slots = set(), None, []

    def _other_gradient(self, weight: torch.Tensor) -> None:
        """A gradient came to a weight from elsewhere: it cannot be told from one that waits to be summed."""
        index = self.positions[id(weight)]
        if self.now is None and index in self.filled and self._waits(index):
            raise DistributedError(
                "a weight whose gradient of no_sync waits to be summed got one not summed with it, from outside "
                "the program or from a call that sums over other axes",
                fix="leave no_sync first: run a backward pass outside of it, or drop the gradients with zero_grad",
            )


def defer(
    weights: Sequence[tuple[nn.Parameter, tuple[str, ...]]],
    groups: Mapping[tuple[str, ...], ProcessAxisGroup],
    axes: Mapping[str, Axis],
    bucket_bytes: int,
    synchronization: Synchronization,
) -> list[Buckets]:
    """Makes the gradients of weights wait for each other, those that are summed over the same axes in one dtype.

    Args:
        weights: each with the axes over which its gradient is summed, in the order of the backward pass.
        groups: the ranks along these axes together.
        axes: the axes, whose ``deferred`` is told.
        bucket_bytes: the size of a bucket.
        synchronization: says when to wait with the sums.
    """
    alike: dict[tuple[tuple[str, ...], torch.dtype], list[nn.Parameter]] = {}
    for weight, names in weights:
        if weight.requires_grad and (id(weight), names) not in axes[names[0]].group.deferred:
            alike.setdefault((names, weight.dtype), []).append(weight)
    made = []
    for (names, _), members in alike.items():
        made.append(Buckets(groups[names], members, bucket_bytes, synchronization))
        for run in _runs(members):
            together = _Together(made[-1], run)
            for index in run:
                axes[names[0]].group.deferred[id(members[index]), names] = together.take
    return made


TOGETHER_BYTES = MIB
"""The gradients of so many bytes of weights that are read one after the other come to the buckets at once."""


def _runs(weights: Sequence[nn.Parameter]) -> list[list[int]]:
    out: list[list[int]] = []
    filled = TOGETHER_BYTES
    for index, weight in enumerate(weights):
        size = weight.numel() * weight.element_size()
        if filled + size > TOGETHER_BYTES:
            out.append([])
            filled = 0
        out[-1].append(index)
        filled += size
    return out


class _Together:
    """Small weights that go through one function: for each of its own, autograd would take longer than they are worth.

    When one is read, all become views, and the others wait to be read, in the same call: those of an earlier one may
    know of no gradient. A view that nobody reads does no harm: it gives the function no gradient.
    """

    def __init__(self, buckets: Buckets, run: Sequence[int]) -> None:
        self.buckets, self.run = buckets, list(run)
        self.weights = [buckets.weights[index] for index in run]
        self.waiting: dict[int, torch.Tensor] = {}
        self.call = -1

    def take(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as its readers see it."""
        calls = self.buckets.synchronization.calls
        if id(weight) not in self.waiting or self.call != calls:
            self.call = calls
            views = record(Deferred, self.buckets, self.run, *self.weights)
            self.waiting = {id(each): view for each, view in zip(self.weights, views, strict=True)}
        return self.waiting.pop(id(weight))


class Deferred(torch.autograd.Function):
    """Weights as their readers see them; their gradients go to buckets."""

    @staticmethod
    def forward(ctx: Any, buckets: Buckets, run: Sequence[int], *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The weights themselves."""
        ctx.buckets, ctx.run = buckets, run
        ctx.set_materialize_grads(False)
        return tuple([weight.view_as(weight) for weight in weights])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Nothing goes on to a weight yet, unless something else than ``.grad`` waits for its gradient."""
        if torch.is_grad_enabled():  # create_graph=True: each by itself, so that it can be differentiated once more
            run = ctx.buckets.group.run
            return None, None, *(None if grad is None else run("all_reduce", "identity", grad) for grad in grads)
        return _take(ctx, *grads)


def _take(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    buckets: Buckets = ctx.buckets
    out: list[torch.Tensor | None] = [None] * (2 + len(grads))
    waiting = []
    for place, (index, grad) in enumerate(zip(ctx.run, grads, strict=True)):
        if grad is None:
            continue
        if will_accumulate(ctx, place) and not buckets.is_watched(index):
            waiting.append((index, grad))
        else:
            out[2 + place] = buckets.group.raw("all_reduce", grad)
    if waiting:
        buckets.add(waiting)
    return tuple(out)

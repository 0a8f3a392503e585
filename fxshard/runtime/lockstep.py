"""All ranks of a mesh in one process: each rank is a thread, one runs at a time, and collectives are hand-overs.

A rank runs until it needs the others; then it passes the turn on. When the last rank of a group has come, the
collective is done for all of them at once, by ``cat`` and ``sum`` under one autograd function: one call of ``backward``
then goes through all ranks, as the backward passes of real ranks do together. Every rank has its own random state.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxshard.errors import FxshardError
from fxshard.mesh import Mesh
from fxshard.ranks.devices import random_state, set_random_state
from fxshard.runtime.collectives import Axis, joined, stacked, sum_dtype
from fxshard.runtime.recompute import keeping_all
from fxshard.runtime.regather import Gathering
from fxshard.runtime.rounds import InLockstep, Joint


class _Stopped(Exception):
    """Another rank failed."""


class Turns:
    """Passes the turn round the ranks, always in the same order."""

    def __init__(self, count: int, device: torch.device | None = None) -> None:
        self.count = count
        self.device = device or torch.device("cpu")
        self.turn = 0
        self.condition = threading.Condition()
        self.finished = [False] * count
        self.waiting: list[Callable[[], bool] | None] = [None] * count
        self.failure: BaseException | None = None
        self.random = [random_state(self.device)] * count

    def start(self, rank: int) -> None:
        """Waits for this rank's first turn."""
        with self.condition:
            self._await(rank)

    def wait(self, rank: int, ready: Callable[[], bool]) -> None:
        """Gives the turn away until ``ready()``."""
        with self.condition:
            self.random[rank] = random_state(self.device)
            self.waiting[rank] = ready
            self._pass(rank)
            self._await(rank)
            self.waiting[rank] = None

    def finish(self, rank: int, failure: BaseException | None = None) -> None:
        """Ends a rank."""
        with self.condition:
            self.random[rank] = random_state(self.device)
            self.finished[rank] = True
            if failure is not None and not isinstance(failure, _Stopped) and self.failure is None:
                self.failure = failure
            self._pass(rank)

    def _await(self, rank: int) -> None:
        self.condition.wait_for(lambda: self.turn == rank or self.failure is not None)
        if self.failure is not None:
            raise _Stopped
        set_random_state(self.device, self.random[rank])

    def _pass(self, rank: int) -> None:
        for step in range(1, self.count + 1):
            other = (rank + step) % self.count
            ready = self.waiting[other]
            if not self.finished[other] and (ready is None or ready()):
                self.turn = other
                break
        else:
            if not all(self.finished) and self.failure is None:
                self.failure = FxshardError("the ranks wait for each other: they issued different collectives")
        self.condition.notify_all()


class LockstepGroup:
    """The ranks of one group along one axis: what they brought to the collective at hand."""

    def __init__(self, turns: Turns, ranks: Sequence[int], reduce_dtype: torch.dtype | None = None) -> None:
        self.turns = turns
        self.reduce_dtype = reduce_dtype
        self.ranks = tuple(ranks)
        self.slots: dict[int, tuple[str, str, torch.Tensor]] = {}
        self.joints: dict[int, tuple[Joint, Sequence[torch.Tensor]]] = {}
        self.results: dict[int, torch.Tensor] = {}

    def exchange(self, rank: int, name: str, backward: str, x: torch.Tensor) -> torch.Tensor:
        """Brings ``x`` to a collective; returns this rank's result."""
        self.slots[rank] = (name, backward, x)
        if len(self.slots) == len(self.ranks):
            brought = [self.slots[r] for r in self.ranks]
            if len({(n, b, tuple(t.shape), t.dtype) for n, b, t in brought}) > 1:
                pairs = zip(self.ranks, brought, strict=True)
                what = "; ".join(f"rank {r}: {n} of {list(t.shape)}" for r, (n, _, t) in pairs)
                raise FxshardError(f"the ranks issued different collectives: {what}")
            outs = _Lockstep.apply(name, backward, self.reduce_dtype, *(t for _, _, t in brought))  # type: ignore[no-untyped-call]
            self.results = dict(zip(self.ranks, outs, strict=True))
            self.slots = {}
        else:
            self.turns.wait(rank, lambda: rank in self.results)
        return self.results.pop(rank)

    def joint(self, rank: int, function: Joint, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Brings this rank's inputs to a function that the ranks compute together; returns its result."""
        self.joints[rank] = function, inputs
        if len(self.joints) == len(self.ranks):
            brought = [self.joints.pop(r) for r in self.ranks]
            if len({(f, len(xs)) for f, xs in brought}) > 1:
                raise FxshardError(f"the ranks run different functions: {[f for f, _ in brought]}")
            outs = InLockstep.apply(function, len(brought), *(x for _, xs in brought for x in xs))  # type: ignore[no-untyped-call]
            self.results = dict(zip(self.ranks, outs, strict=True))
        else:
            self.turns.wait(rank, lambda: rank in self.results)
        return self.results.pop(rank)


class LockstepAxisGroup:
    """A lockstep group as one rank sees it."""

    def __init__(self, group: LockstepGroup, rank: int) -> None:
        self.group, self.rank = group, rank
        self.deferred: dict[tuple[int, tuple[str, ...]], Callable[[torch.Tensor], torch.Tensor]] = {}
        self.regather: Gathering | None = None
        self.packed: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def run(self, name: str, backward: str, x: torch.Tensor, inplace: bool = False, dim: int = 0) -> torch.Tensor:
        """See ``collectives.Group.run``; nothing is in place."""
        if name in ("identity", "own_part") and backward not in ("all_reduce", "all_gather"):
            raise FxshardError(f"{name} with gradient {backward} is not a conversion")
        size = len(self.group.ranks)
        if name in ("own_part", "reduce_scatter"):
            x = stacked(x, size, dim)
        out = self.group.exchange(self.rank, name, backward, x)
        return joined(out, size, dim) if name == "all_gather" else out

    def joint(self, function: Joint, *inputs: torch.Tensor) -> torch.Tensor:
        """See ``collectives.Group.joint``."""
        return self.group.joint(self.rank, function, inputs)


class _Lockstep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, backward: str, dtype: Any, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.name, ctx.backward_name, ctx.dtype = name, backward, dtype
        return _communicate(name, xs, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradient of the gradient is the collective itself
            outs = _Lockstep.apply(ctx.backward_name, ctx.name, ctx.dtype, *grads)  # type: ignore[no-untyped-call]
        else:
            outs = _communicate(ctx.backward_name, grads, ctx.dtype)
        return None, None, None, *outs


Tensors = Sequence[torch.Tensor]


def _communicate(name: str, xs: Tensors, reduce_dtype: torch.dtype | None) -> tuple[torch.Tensor, ...]:
    own = xs[0].dtype
    wide = sum_dtype(name, own, reduce_dtype)
    return tuple(out.to(own, copy=True) for out in COLLECTIVES[name]([x.to(wide) for x in xs]))


def _sum(xs: Tensors) -> torch.Tensor:
    """The sum as a ring of real ranks makes it: rounded after every addition."""
    return functools.reduce(torch.add, xs)


def _all_reduce(xs: Tensors) -> list[torch.Tensor]:
    total = _sum(xs)
    return [total for _ in xs]


def _reduce_scatter(xs: Tensors) -> list[torch.Tensor]:
    return list(_sum(xs).chunk(len(xs), 0))


def _all_gather(xs: Tensors) -> list[torch.Tensor]:
    whole = torch.cat(tuple(xs), 0)
    return [whole for _ in xs]


def _all_to_all(xs: Tensors) -> list[torch.Tensor]:
    cut = [x.chunk(len(xs), 0) for x in xs]
    return [torch.cat([c[i] for c in cut], 0) for i in range(len(xs))]


def _own_part(xs: Tensors) -> list[torch.Tensor]:
    return [x.chunk(len(xs), 0)[i] for i, x in enumerate(xs)]


COLLECTIVES: dict[str, Callable[[Tensors], list[torch.Tensor]]] = {
    "identity": list,
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "own_part": _own_part,
}
"""What every collective gives each rank, from what all ranks bring."""


def lockstep_axes(mesh: Mesh, turns: Turns, reduce_dtype: torch.dtype | None = None) -> list[dict[str, Axis]]:
    """For every rank, its axes over lockstep groups, which make sums at least in ``reduce_dtype``."""
    out: list[dict[str, Axis]] = [{} for _ in range(mesh.world_size)]
    for name in mesh.names:
        for ranks in mesh.groups_along(name):
            group = LockstepGroup(turns, ranks, reduce_dtype)
            for position, rank in enumerate(ranks):
                out[rank][name] = Axis(name, len(ranks), position, LockstepAxisGroup(group, rank))
    return out


def run_ranks(count: int, turns: Turns, run: Callable[[int], Any]) -> list[Any]:
    """Runs ``run(rank)`` for every rank, in lockstep; returns the results in rank order.

    The ranks run without autocast, as new threads do: a program has its casts written out.
    """
    results: list[Any] = [None] * count
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def body(rank: int) -> None:
        failure: BaseException | None = None
        try:
            turns.start(rank)
            with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference), keeping_all():
                results[rank] = run(rank)
        except BaseException as error:
            failure = error
        finally:
            turns.finish(rank, failure)

    threads = [threading.Thread(target=body, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if turns.failure is not None:
        raise turns.failure
    set_random_state(turns.device, turns.random[0])
    return results

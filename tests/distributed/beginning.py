"""What ranks run to show that collectives under way give what they give at once, and what runs beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

import fxshard
from fxshard.runtime import async_collectives
from fxshard.runtime.collectives import Axis, ProcessAxisGroup, all_gather, all_reduce, all_to_all, reduce_scatter
from tests.distributed.gradients import counted, run_step
from tests.distributed.ranks import run_rank
from tests.helpers import problems_of, run_original
from tests.models.zoo import build
from tests.presets import preset

CASES: list[tuple[Any, Any, dict[str, Any]]] = [
    (async_collectives.begin_all_reduce, all_reduce, {}),
    (async_collectives.begin_all_reduce, all_reduce, {"inplace": True}),
    *((async_collectives.begin_all_gather, all_gather, {"dim": dim}) for dim in (0, 1, 2)),
    *((async_collectives.begin_all_gather, all_gather, {"dim": dim, "summed": True}) for dim in (0, 1, 2)),
    *((async_collectives.begin_reduce_scatter, reduce_scatter, {"dim": dim}) for dim in (0, 1, 2)),
    *(
        (async_collectives.begin_all_to_all, all_to_all, {"source": i, "target": j})
        for i, j in ((0, 1), (1, 0), (2, 1), (0, 2))
    ),
]


class Mark(torch.autograd.Function):
    """Writes down that it was here, forward and backward."""

    events: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        Mark.events.append("work")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        Mark.events.append("work")
        return grad


class Watched(ProcessAxisGroup):
    """Writes down when a collective begins, and when it is waited for."""

    def begin(self, name: str, x: torch.Tensor) -> Any:
        Mark.events.append("begin")
        arrive = super().begin(name, x)

        def wait() -> torch.Tensor:
            Mark.events.append("wait")
            return arrive()

        return wait


def functions(dtypes: Sequence[torch.dtype]) -> None:
    """Values and gradients, with and without gradient, twice through one graph, and in which order things happen."""
    size, rank = dist.get_world_size(), dist.get_rank()
    for dtype in dtypes:
        for reduce_dtype in (None, torch.float64):
            axis = Axis("tp", size, rank, Watched(dist.group.WORLD, reduce_dtype, "tp"))
            for begin, plain, options in CASES:
                generator = torch.Generator().manual_seed(rank)
                x = torch.randn(2 * size, 3 * size, 2 * size, generator=generator).to(dtype)
                weights = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
                results = []
                for way in ("plain", "begun"):
                    leaf, other = x.clone().requires_grad_(), weights.clone().requires_grad_()
                    Mark.events.clear()
                    source = leaf * 2
                    if way == "plain":
                        beside = Mark.apply(other)
                        y = plain(source, axis, **options)
                    else:
                        begun = begin(source, axis, **options)
                        beside = Mark.apply(other)
                        y = async_collectives.wait(begun)
                    forward = list(Mark.events)
                    Mark.events.clear()
                    loss = (y.sin() * (1 + rank)).sum() + beside.cos().sum()
                    loss.backward(retain_graph=True)
                    backward = list(Mark.events)
                    loss.backward()
                    results.append((y.detach(), leaf.grad, other.grad))
                    with torch.no_grad():
                        quiet = plain(x.clone(), axis, **options)
                        again = async_collectives.wait(begin(x.clone(), axis, **options))
                    assert torch.equal(quiet, again), f"{begin.__name__}, {options}: without a gradient"
                for got, want in zip(results[1], results[0], strict=True):
                    assert got is not None
                    assert want is not None
                    assert torch.equal(got, want), f"{begin.__name__}, {options}, {dtype}, {reduce_dtype}"
                assert forward == ["begin", "work", "wait"], f"{begin.__name__}, {options}: {forward}"
                moves = plain is not all_reduce and (plain is not all_gather or "summed" in options)
                assert backward == (["begin", "work", "wait"] if moves else ["work"]), f"{begin.__name__}: {backward}"


def second_derivatives() -> None:
    """Of a collective that is under way: its gradient is the sum over the ranks."""
    axis = Axis("tp", dist.get_world_size(), dist.get_rank(), ProcessAxisGroup(dist.group.WORLD, axis="tp"))
    x = torch.randn(4, 4, requires_grad=True)
    y = async_collectives.wait(async_collectives.begin_all_gather(x, axis, True, 0))
    assert isinstance(y, torch.Tensor)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, 3 * axis.size * x**2)
    grad.sum().backward()
    torch.testing.assert_close(x.grad, 6 * axis.size * x.detach())


def programs(cases: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
    """A program whose collectives are under way equals the model, and communicates what it says."""
    for name, plan, changes in cases:
        model, inputs = build(name, torch.float64, True, **changes)
        inputs["use_cache"] = False
        program = fxshard.parallelize(model, preset(plan), (), inputs)
        assert "begin_" in program.code(), f"{name}, {plan}: nothing is under way"
        problems = problems_of(run_rank(program, inputs), run_original(model, (), inputs))
        assert not problems, "\n".join([f"{name}, {plan}", *problems])
        with counted() as calls:
            run_step(program, inputs)
        said = Counter((c.kind, c.num_bytes) for c in program.collectives())
        assert calls == said, f"{name}, {plan}: {calls - said}; {said - calls}"

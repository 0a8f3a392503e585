"""What ranks run to show that products beside collectives give what they give one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard.runtime import collective_matmul
from fxshard.runtime.collectives import Axis, ProcessAxisGroup, all_gather, all_reduce, reduce_scatter, vary
from tests.distributed.gradients import counted, loss, run_step
from tests.distributed.ranks import run_rank
from tests.models.zoo import build
from tests.presets import preset


def plain_vary(x: torch.Tensor, weights: Any, axis: Axis, biases: Any, **_: Any) -> Sequence[torch.Tensor]:
    return [F.linear(vary(x, axis), w, b) for w, b in zip(weights, biases, strict=True)]


def plain_gather(x: torch.Tensor, weights: Any, axis: Axis, dim: int, biases: Any, **_: Any) -> Sequence[torch.Tensor]:
    return [F.linear(all_gather(x, axis, True, dim), w, b) for w, b in zip(weights, biases, strict=True)]


def plain_reduce(x: torch.Tensor, weight: torch.Tensor, axis: Axis, **_: Any) -> torch.Tensor:
    return all_reduce(F.linear(x, weight), axis)


def plain_scatter(x: torch.Tensor, weight: torch.Tensor, axis: Axis, dim: int, **_: Any) -> torch.Tensor:
    return reduce_scatter(F.linear(x, weight), axis, dim)


PAIRS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (collective_matmul.vary_linears, plain_vary),
    (collective_matmul.gather_linears, plain_gather),
    (collective_matmul.linear_all_reduce, plain_reduce),
    (collective_matmul.linear_reduce_scatter, plain_scatter),
]


def functions(cases: int) -> None:
    """Any shapes, pieces, weights, biases and frozen ones: the same values, gradients, and places without one."""
    axis = Axis("tp", dist.get_world_size(), dist.get_rank(), ProcessAxisGroup(dist.group.WORLD))
    shared = torch.Generator().manual_seed(0)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=shared))]

    for case in range(cases):
        beside, plain = PAIRS[case % len(PAIRS)]
        torch.manual_seed(100 * case + axis.index)
        dims = pick(1, 2, 3)
        dim = pick(*range(dims))
        size = axis.size if plain is plain_scatter else 1
        shape = [pick(1, 2, 3, 5) * (size if i == dim else 1) for i in range(dims)] + [pick(1, 4)]
        options: dict[str, Any] = {"pieces": pick(1, 2, 3, 7)}
        if plain in (plain_gather, plain_scatter):
            options["dim"] = dim
        count = pick(1, 2, 3) if plain in (plain_vary, plain_gather) else 1
        dtype = pick(torch.float64, torch.float64, torch.complex128)
        tensors = [torch.randn(shape, dtype=dtype)]
        tensors += [torch.randn(pick(2, 3), shape[-1], dtype=dtype) for _ in range(count)]
        if plain in (plain_vary, plain_gather):
            tensors += [torch.randn(w.shape[0], dtype=dtype) for w in tensors[1:]]
        wanted = [pick(True, True, False) for _ in tensors]
        has_bias = pick(True, False)
        unread = pick(-1, 0) if count > 1 else -1
        transposed = pick(True, False)

        def run(function: Any) -> list[torch.Tensor | None]:
            leaves = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]  # noqa: B023
            x, weights, biases = leaves[0], leaves[1 : count + 1], leaves[count + 1 :]  # noqa: B023
            if transposed:  # noqa: B023
                x = x.transpose(0, -1).contiguous().transpose(0, -1)
            if len(weights) == 1 and not biases:
                outs = [function(x, weights[0], axis, **options)]  # noqa: B023
            else:
                outs = list(function(x, weights, axis, biases=biases if has_bias else [None] * count, **options))  # noqa: B023
            read = [out for i, out in enumerate(outs) if i != unread and out.requires_grad]  # noqa: B023
            if read:
                scale = 1 + axis.index * (plain in (plain_vary, plain_gather, plain_scatter))  # noqa: B023
                torch.stack([(scale * out.sin()).abs().sum() for out in read]).sum().backward()
            flows = torch.tensor([out.requires_grad for out in outs])
            for out in outs:
                out.mul_(2)  # what a program gives may be changed in place
            return [flows, *(out.detach() for out in outs), *(leaf.grad for leaf in leaves)]

        for got, want in zip(run(beside), run(plain), strict=True):
            where = f"case {case}: {beside.__name__} of {shape}, {options}, {wanted}"
            assert (got is None) == (want is None), where
            if got is not None and want is not None:
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=where)


def programs(cases: Sequence[tuple[str, str]], checkpoint: str = "") -> None:
    """A program whose products run beside its collectives equals the model, and communicates what it says."""
    asked = (checkpoint,) if checkpoint else ()
    for name, plan in cases:
        for pieces in (1, 3):
            model, inputs = build(name, torch.float32)
            program = fxshard.parallelize(model, preset(plan), (), inputs, overlap=pieces, checkpoint=asked)
            code = program.code(program.rank)
            assert "_linears(" in code or "linear_" in code, f"{name}, {plan}: nothing runs beside"
            run_rank(program, inputs)
            model.zero_grad()
            program.zero_grad()
            run_step(program, inputs)  # the first step compares the ranks
            program.zero_grad()
            run_step(model, inputs)
            with counted() as calls:
                run_step(program, inputs)
            said = Counter((c.kind, c.num_bytes) for c in program.collectives())
            assert calls == said, f"{name}, {plan}, {pieces}: {calls - said}; {said - calls}"
            grads = program.full_grads()
            for at, parameter in model.named_parameters():
                if parameter.grad is not None:
                    torch.testing.assert_close(grads[at], parameter.grad, rtol=1e-4, atol=1e-5)


class Adapted(nn.Module):
    """A frozen matrix with an adapter beside it, and a value that is read by a product and by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.left, self.right = nn.Linear(8, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.norm = nn.LayerNorm(8)
        self.up.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        out: torch.Tensor = self.down((self.up(x) + self.right(self.left(x))).relu()) + x
        return out


def around() -> None:
    """What else users do: adapters, frozen weights, no gradients, autocast, wider sums, checkpoints, other sizes."""
    x = torch.randn(4, 6, 8)
    for plan in ("tp2", "sp2"):
        for options in ({}, {"checkpoint": "*.up"}, {"checkpoint": "1"}, {"reduce_dtype": torch.float64}):
            model = nn.Sequential(Adapted(), Adapted())
            program = fxshard.parallelize(model, preset(plan), (x,), overlap=2, **options)  # type: ignore[arg-type]
            for step in range(2):
                mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
                loss(model, mine).backward()
                loss(program, its).backward()
                torch.testing.assert_close(its.grad, mine.grad, rtol=1e-4, atol=1e-4)
                grads = program.full_grads()
                for name, parameter in model.named_parameters():
                    assert (name in grads) == parameter.requires_grad, f"{name} in step {step}"
                    if parameter.grad is not None:
                        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                torch.testing.assert_close(program(x), model(x))
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(program(x), model(x), rtol=2e-2, atol=2e-2)
                loss(program, x).backward()
        dynamic = ({0: torch.export.Dim("batch", min=2), 1: 2 * torch.export.Dim("half", min=2)},)
        sized = fxshard.parallelize(model, preset(plan), (x,), overlap=2, dynamic_shapes=dynamic)
        for shape in ((4, 6, 8), (3, 10, 8), (2, 4, 8)):
            other = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(sized(other), model(other))

"""What ranks run to show that weights gathered ahead are those of now, and that their gradients are all there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxshard
from fxshard import Plan, Shard
from tests.distributed.gradients import counted


class Net(nn.Module):
    """Matrices, biases, a table, a weight that is read twice, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x).tanh() + x
        return self.left(x), self.right(x) @ self.right.weight


def ids(seed: int) -> torch.Tensor:
    return torch.randint(0, 16, (4, 5), generator=torch.Generator().manual_seed(seed))


def loss(outputs: Any) -> torch.Tensor:
    made: torch.Tensor = sum(x.square().sum() for x in outputs)  # type: ignore[assignment]
    return made


def pair(bucket_bytes: int = 2**20, **options: Any) -> tuple[Net, fxshard.ParallelModule]:
    """The model on one device, and in parts: one pack, or where there are few bytes, several."""
    torch.manual_seed(0)
    model = Net().double()
    every = {name: Shard(0) for name, _ in model.named_parameters()}
    plan = fxshard.zero(2) | Plan({"dp": 2}, params=every, uses=dict.fromkeys(every, fxshard.Replicate()))
    return model, fxshard.parallelize(model, plan, (ids(1),), bucket_bytes=bucket_bytes, **options)


def assert_equal(program: fxshard.ParallelModule, model: nn.Module, times: float = 1) -> None:
    grads = program.full_grads()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], times * parameter.grad, rtol=1e-9, atol=1e-9)
    for name, tensor in program.full_state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-9, atol=1e-9)


def both(model: nn.Module, program: nn.Module, run: Callable[[Any], None]) -> None:
    """Runs the same with the one and with the other, and compares."""
    for trained in (model, program):
        run(trained)
    assert isinstance(program, fxshard.ParallelModule)
    assert_equal(program, model)


def step(module: nn.Module) -> None:
    """An optimizer that writes where no version counts it."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(1e-3 * parameter.grad)
            parameter.grad = None


def whatever_happens(bucket_bytes: int) -> None:
    """Steps between which forward and backward passes end early, come twice, or by halves."""

    def train(module: nn.Module, seed: int) -> None:
        loss(module(ids(seed))).backward()

    def halves(module: nn.Module) -> None:
        left, right = module(ids(3))
        left.sum().backward(retain_graph=True)
        right.sum().backward()

    def one_half(module: nn.Module) -> None:
        module(ids(4))[0].sum().backward()
        step(module)
        train(module, 5)

    def twice(module: nn.Module) -> None:
        out = loss(module(ids(6)))
        out.backward(retain_graph=True)
        out.backward()

    def two_calls(module: nn.Module) -> None:
        first, second = loss(module(ids(7))), loss(module(ids(8)))
        with torch.no_grad():
            module(ids(9))
        first.backward()
        second.backward()

    def failing(module: nn.Module) -> None:
        out = loss(module(ids(10)))
        handle = out.grad_fn.next_functions[0][0].register_prehook(_fail)  # type: ignore[union-attr]
        with pytest.raises(ZeroDivisionError):
            out.backward()
        handle.remove()
        for parameter in module.parameters():
            parameter.grad = None
        step(module)
        train(module, 11)

    def within(module: nn.Module, use_reentrant: bool) -> None:
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        first = loss(checkpoint(lambda s: [s * x for x in module(ids(12))], scale, use_reentrant=use_reentrant))
        (first + loss(module(ids(13)))).backward()

    def evaluated(module: nn.Module) -> None:
        train(module, 14)
        step(module)
        module.eval()
        with torch.no_grad():
            loss(module(ids(15)))
        module.train()
        train(module, 16)

    def stops_early(module: nn.Module) -> None:
        torch.autograd.grad(loss(module(ids(17))), [dict(module.named_parameters())["layers.3.weight"]])
        for parameter in module.parameters():
            parameter.data.mul_(0.9)
        train(module, 18)

    model, program = pair(bucket_bytes)
    for run in (
        lambda m: train(m, 2), halves, one_half, twice, two_calls, failing, lambda m: within(m, False),
        lambda m: within(m, True), evaluated, stops_early,
    ):  # fmt: skip
        both(model, program, run)
        for trained in (model, program):
            step(trained)
        both(model, program, lambda m: train(m, 20))
        for trained in (model, program):
            trained.zero_grad()


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


def gradients_go_elsewhere(bucket_bytes: int) -> None:
    """``autograd.grad`` and hooks get gradients as the backward pass has them; frozen weights have none."""
    model, program = pair(bucket_bytes)
    names = [name for name, _ in model.named_parameters()]
    expected = torch.autograd.grad(loss(model(ids(2))), list(model.parameters()))
    found = torch.autograd.grad(loss(program(ids(2))), list(program.parameters()))
    assert all(parameter.grad is None for parameter in program.parameters())
    half = dist.get_rank()
    for name, want, got in zip(names, expected, found, strict=True):
        torch.testing.assert_close(got, want.chunk(2)[half], rtol=1e-9, atol=1e-9, msg=name)
    seen: list[int] = []
    weight = dict(program.named_parameters())["layers.1.weight"]
    handle = weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.numel()))  # type: ignore[union-attr]
    both(model, program, lambda m: loss(m(ids(3))).backward())
    assert seen == [weight.numel()]
    handle.remove()
    for trained in (model, program):
        trained.zero_grad()
        for name, parameter in trained.named_parameters():
            parameter.requires_grad_("layers" not in name)
    both(model, program, lambda m: loss(m(ids(4))).backward())
    assert all(p.grad is None for n, p in program.named_parameters() if "layers" in n)


def fewer_collectives() -> None:
    """As many as the program says: with buckets a few, without them one for each weight."""
    said = {}
    for bucket_bytes in (2**20, 0):
        _, program = pair(bucket_bytes)
        for _ in range(2):
            with counted() as calls:
                loss(program(ids(2))).backward()
        assert sum(calls.values()) == len(program.collectives()), (calls, program.explain())
        said[bucket_bytes] = sum(c.kind == "all_gather" and c.phase == "forward" for c in program.collectives())
    assert said[0] - said[2**20] >= 10

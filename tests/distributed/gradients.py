"""What ranks run to show how gradients are summed: in buckets, late, and as often as the program says."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxshard
from fxshard.errors import DistributedError, FxshardError
from fxshard.runtime.regather import Regather
from tests.distributed.ranks import run_rank
from tests.models.zoo import build
from tests.presets import preset

Calls = Counter[tuple[str, int]]
COUNTED = {"all_reduce": "all_reduce", "all_gather_single": "all_gather", "reduce_scatter_single": "reduce_scatter"}
COUNTED["all_to_all_single"] = "all_to_all"


@contextlib.contextmanager
def counted() -> Iterator[Calls]:
    """Counts the collectives of this rank, with the bytes of the tensor that is whole along the axis."""
    calls: Calls = Counter()
    kept = {name: getattr(dist, name) for name in COUNTED}

    def counting(name: str) -> Callable[..., Any]:
        def call(*tensors: torch.Tensor, **kwargs: Any) -> Any:
            parts = dist.get_world_size(kwargs.get("group")) if name == "all_to_all_single" else 1
            calls[COUNTED[name], parts * max(t.numel() * t.element_size() for t in tensors)] += 1
            return kept[name](*tensors, **kwargs)

        return call

    try:
        for name in COUNTED:
            setattr(dist, name, counting(name))
        yield calls
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def as_many_collectives_as_it_says(cases: list[tuple[str, str]]) -> None:
    """One step issues the collectives that ``collectives()`` lists, of as many bytes."""
    for name, plan in cases:
        model, inputs = build(name, torch.float32)
        layers = "model.layers.*" if name == "llama" else "transformer.h.*"
        for regather, checkpoint in ((True, ()), (False, ()), (True, layers)) if "zero" in plan else ((True, ()),):
            program = fxshard.parallelize(
                model, preset(plan), (), inputs, bucket_bytes=100_000, regather=regather, checkpoint=checkpoint
            )
            run_rank(program, inputs)  # the first step compares the ranks' weights too
            program.zero_grad()
            with counted() as calls:
                run_step(program, inputs)
            said = Counter((c.kind, c.num_bytes) for c in program.collectives())
            assert calls == said, f"{name}, {plan}, {regather}, {checkpoint}: {calls - said}; {said - calls}"


def run_step(program: Any, inputs: dict[str, Any]) -> None:
    output = program(**inputs)
    sum(t.float().square().mean() for t in output.values() if isinstance(t, torch.Tensor)).backward()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.norm(self.up(x)).relu())
        return out


NUM_BYTES = sum(p.numel() for p in Net().parameters()) * 4


def loss(module: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = module(x).square().sum()
    return out


def penalty(module: nn.Module) -> torch.Tensor:
    return torch.stack([(p**2).sum() for p in module.parameters()]).sum()


def assert_grads(program: fxshard.ParallelModule, model: nn.Module, times: float = 1) -> None:
    grads = program.full_grads()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(grads[name], times * parameter.grad, rtol=1e-5, atol=1e-5)


def buckets() -> None:
    """Whatever comes to the weights in whatever order, their gradients are those of one device."""
    x = torch.randn(4, 8)
    for bucket_bytes in (100, 1000, 10**6):
        model = Net()
        program = fxshard.parallelize(model, fxshard.data_parallel(2), (x,), bucket_bytes=bucket_bytes)
        loss(model, x).backward()
        first = program(x)
        with counted() as calls:
            first.square().sum().backward()
        assert calls.total() == math.ceil(NUM_BYTES / bucket_bytes)
        assert sum(size * count for (_, size), count in calls.items()) == NUM_BYTES
        assert_grads(program, model)
        loss(program, x).backward()  # on top of what is there
        assert_grads(program, model, 2)
        program.zero_grad()
        (loss(program, x) + loss(program, x)).backward()  # two calls, one backward pass
        assert_grads(program, model, 2)
        program.zero_grad()
        grads = torch.autograd.grad(loss(program, x), list(program.parameters()))
        for parameter, grad in zip(program.parameters(), grads, strict=True):
            assert parameter.grad is None
            parameter.grad = grad
        assert_grads(program, model)
        program.zero_grad()
        seen: list[torch.Tensor] = []
        hooks = [p.register_hook(seen.append) for p in program.parameters()]
        loss(program, x).backward()
        assert_grads(program, model)
        assert len(seen) == len(hooks)
        for hook in hooks:
            hook.remove()
        program.zero_grad()
        with pytest.raises(ZeroDivisionError):  # a backward pass that fails leaves nothing behind
            failing(program(x)).square().sum().backward()
        program.zero_grad()
        loss(program, x).backward()
        assert_grads(program, model)
        program.zero_grad()
        model.up.weight.requires_grad_(False)
        frozen = fxshard.parallelize(model, fxshard.data_parallel(2), (x,), bucket_bytes=bucket_bytes)
        loss(frozen, x).backward()
        assert frozen.get_parameter("up.weight").grad is None
        assert set(frozen.full_grads()) == {name for name, p in model.named_parameters() if p.requires_grad}


def memory_of_gradients() -> None:
    """The next step writes its gradients where the last ones were, unless somebody still has them."""
    x = torch.randn(4, 8)
    program = fxshard.parallelize(Net(), fxshard.data_parallel(2), (x,))

    def step() -> int:
        program.zero_grad()
        loss(program, x).backward()
        return min(p.grad.data_ptr() for p in program.parameters() if p.grad is not None)

    # A moment after the wait a thread of gloo may still hold the bucket; then the next step takes other memory.
    assert any(step() == step() for _ in range(5))
    for keep in (lambda g: g[:1], lambda g: g.numpy(), lambda g: g.__dlpack__()):
        grads = [p.grad for p in program.parameters() if p.grad is not None]
        values = [grad.clone() for grad in grads]
        kept = list(map(keep, grads))
        del grads
        x = 2 * x
        step()
        for each, value in zip(kept, values, strict=True):
            now = torch.from_dlpack(each)
            assert torch.equal(now, value[: len(now)])
        del kept, each, now
    storages = [p.grad.untyped_storage() for p in program.parameters() if p.grad is not None]
    values = [torch.frombuffer(bytearray(s.tolist()), dtype=torch.uint8) for s in storages[:1]]
    x = 2 * x
    step()
    assert torch.equal(torch.frombuffer(bytearray(storages[0].tolist()), dtype=torch.uint8), values[0])
    del storages
    last = step()
    loss(program, x).backward()  # on top: the first gradients stay where they are
    assert min(p.grad.data_ptr() for p in program.parameters() if p.grad is not None) == last


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError


def failing(x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _Failing.apply(x)
    return out


def accumulation() -> None:
    """``no_sync``: nothing is communicated for the gradients, and the last step sums what all gave."""
    x = torch.randn(4, 8)
    for plan in ("dp2", "zero2"):
        model = Net()
        program = fxshard.parallelize(model, preset(plan), (x,), bucket_bytes=1000)
        loss(model, x).backward()
        program(x)
        for inner in (1, 3):
            program.zero_grad()
            with program.no_sync():
                for _ in range(inner):
                    output = program(x)
                    with counted() as calls:
                        output.square().sum().backward()
                    assert (calls.total() == 0) == (plan == "dp2")
            loss(program, x).backward()
            assert_grads(program, model, inner + 1)
        with program.no_sync():  # on top of summed gradients, and dropped
            loss(program, x).backward()
        for to_none in (True, False):
            program.zero_grad(set_to_none=to_none)
            loss(program, x).backward()
            assert_grads(program, model)
        with program.no_sync():
            loss(program, x).backward()
        loss(program, x).backward()
        assert_grads(program, model, 3)


def penalties() -> None:
    """Gradients that come from outside of the program are whole on every rank: they are not summed."""
    x, model = torch.randn(4, 8), Net()
    program = fxshard.parallelize(model, fxshard.data_parallel(2), (x,), bucket_bytes=1000)
    (loss(model, x) + penalty(model)).backward()
    (loss(program, x) + penalty(program)).backward()
    assert_grads(program, model)
    program.zero_grad()
    with program.no_sync():
        (loss(program, x) + penalty(program)).backward()
    (loss(program, x) + penalty(program)).backward()
    assert_grads(program, model, 2)
    program.zero_grad()
    with program.no_sync():
        loss(program, x).backward()
    with pytest.raises(DistributedError, match="leave no_sync first"):
        penalty(program).backward()


def regathering() -> None:
    """Gathered weights are let go after use; a step between forward and backward is refused."""
    x = torch.randn(4, 8)
    kept = {}
    for regather in (True, False):
        program = fxshard.parallelize(Net(), fxshard.zero(2), (x,), regather=regather)
        output = program(x)
        kept[regather] = sum(
            saved.numel() for saved in saved_tensors(output.grad_fn) if saved.shape in ((8, 32), (32, 8))
        )
        with torch.no_grad():
            program.get_parameter("down.weight").add_(1)
        if regather:
            with pytest.raises(FxshardError, match="changed in place between the forward and the backward"):
                output.sum().backward()
    assert kept[True] == 0 < kept[False]


def gathering_again_whatever_python_frees() -> None:
    """How long the gathered weights live differs between ranks; what the ranks communicate must not."""
    note, held = Regather.note, []

    def holding(self: Regather, whole: torch.Tensor, *args: Any) -> None:
        held.append(whole)
        note(self, whole, *args)

    if dist.get_rank() == 1:
        Regather.note = holding  # type: ignore[method-assign]
    try:
        as_many_collectives_as_it_says([("llama", "zero2")])
    finally:
        Regather.note = note  # type: ignore[method-assign]
    assert bool(held) == (dist.get_rank() == 1)


def saved_tensors(node: Any) -> Iterator[torch.Tensor]:
    """What autograd holds, below a node, as it holds it."""
    seen, waiting = set(), [node]
    while waiting:
        at = waiting.pop()
        if at is None or at in seen:
            continue
        seen.add(at)
        for name in dir(at):
            raw = getattr(at, name) if name.startswith("_raw_saved") else None
            if raw is not None and isinstance(getattr(raw, "data", None), torch.Tensor):
                yield raw.data
        waiting += [following for following, _ in at.next_functions]

"""What is run on GPUs: each function is one rank's whole job, on ``device``; on ``cpu`` they run as well."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fxshard
from fxshard.runtime.collectives import (
    Axis,
    ProcessAxisGroup,
    all_gather,
    all_reduce,
    all_to_all,
    chunk,
    reduce_scatter,
    vary,
)
from tests.distributed.ranks import run_rank
from tests.helpers import problems_of, run_original
from tests.models.zoo import Built, build, ids, mixtral
from tests.presets import preset


def on(device: str, made: Built) -> Built:
    """The model and its inputs, on a device."""
    model, inputs = made
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return copy.deepcopy(model).to(device), moved


def make(name: str, dtype: torch.dtype, training: bool) -> Built:
    """A model without dropout in its attention: kernels that are fused with it draw on a GPU as nothing else does."""
    if name == "mixtral":
        torch.manual_seed(0)
        model, inputs = mixtral()
        return model.to(dtype).train(training), inputs
    return build(name, dtype, training, **NO_DROPOUT.get(name, {}))


NO_DROPOUT = {"gpt2": {"attn_pdrop": 0.0}, "llama": {"attention_dropout": 0.0}}
DTYPES = {"mixtral": torch.float32}
"""Products in groups take no float64."""


def equal_the_original(device: str, cases: Sequence[tuple[str, str]], training: bool, **options: Any) -> None:
    """Outputs, whole gradients and whole weights; in training every rank has a random state of its own at first."""
    found = []
    for name, plan in cases:
        dtype = DTYPES.get(name, torch.float64)
        model, inputs = on(device, make(name, dtype, training))
        inputs["use_cache"] = False
        program = fxshard.parallelize(model, preset(plan), (), inputs, **options)
        expected = run_original(model, (), inputs, seed=7)
        torch.manual_seed(7 + dist.get_rank())
        problems = problems_of(run_rank(program, inputs), expected)
        whole, state = model.state_dict(), program.full_state_dict()
        if not all(torch.equal(state[key], whole[key]) for key in whole):
            problems.append("the whole state dict differs")
        if {p.device.type for p in program.parameters()} != {device}:
            problems.append("parameters are elsewhere")
        found += [f"{name} under {plan}, rank {dist.get_rank()}: {problem}" for problem in problems]
    assert not found, "\n".join(found)


def train(module: Any, device: str, steps: int, dtype: torch.dtype) -> list[tuple[float, float]]:
    """The loss and the norm of the gradient of every step, under autocast and a scaler where ``dtype`` is lower."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    scaler = fxshard.GradScaler(device, init_scale=2.0**24, enabled=dtype == torch.float16)
    curve = []
    for step in range(steps):
        batch = ids(seed=100 + step).to(device)
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = module(input_ids=batch, labels=batch, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = fxshard.clip_grad_norm_(module, 0.5)
        scaler.step(optimizer)
        scaler.update()
        curve.append((loss.item(), norm.item()))
    return curve


def trains_as_one_device(device: str, name: str, plans: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
    """Losses, norms and final weights; with float16 the first steps overflow, and all ranks skip the same."""
    start, _ = on(device, make(name, torch.float32, True))
    single = copy.deepcopy(start)
    torch.manual_seed(7)
    curve = train(single, device, 10, dtype)
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (3e-2, 2e-2)
    for plan in plans:
        batch = ids(seed=100).to(device)
        inputs = {"input_ids": batch, "labels": batch, "use_cache": False}
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            program = fxshard.parallelize(copy.deepcopy(start), preset(plan), (), inputs)
        torch.manual_seed(7)
        found = train(program, device, 10, dtype)
        for mine, theirs in zip(found, curve, strict=True):
            message = f"{plan}: {mine} for {theirs}"
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=0, equal_nan=True, msg=message)
        state = program.full_state_dict()
        for key, want in single.state_dict().items():
            torch.testing.assert_close(state[key], want, rtol=0, atol=atol, msg=f"{plan}: {key}")


def saves_and_loads(device: str) -> None:
    """A run goes on from its checkpoint under another plan, on the same device."""
    start, _ = on(device, make("gpt2", torch.float32, True))
    batch = ids().to(device)
    inputs = {"input_ids": batch, "labels": batch, "use_cache": False}
    told = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, 0)
    losses = []
    for plan in ("tp2", "zero2"):
        program = fxshard.parallelize(copy.deepcopy(start), preset(plan), (), inputs)
        optimizer = torch.optim.AdamW(program.parameters())
        if plan == "tp2":
            program(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            fxshard.save_checkpoint(str(told[0]), program, optimizer, step=1)
        else:
            assert fxshard.load_checkpoint(str(told[0]), program, optimizer).step == 1
        torch.manual_seed(3)
        program(**inputs).loss.backward()
        optimizer.step()
        torch.manual_seed(3)
        losses.append(program(**inputs).loss.item())
        assert all(p.device.type == device for p in program.parameters())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def compiles(device: str, plans: Sequence[str]) -> None:
    """``torch.compile`` over a program: forward and backward as the model's."""
    for plan in plans:
        torch.compiler.reset()
        model, inputs = on(device, build("llama", torch.float32, False))
        inputs["use_cache"] = False
        program = fxshard.parallelize(model, preset(plan), (), inputs)
        fast = torch.compile(program, fullgraph=True)
        want = model(**inputs).logits
        got = fast(**inputs).logits
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        want.square().mean().backward()
        got.square().mean().backward()
        grads = program.full_grads()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=f"{plan}: {name}")


def collectives(device: str) -> None:
    """Every collective over the default group, forward and backward, and one that is waited for later."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = ProcessAxisGroup(dist.group.WORLD, axis="tp")
    axis = Axis("tp", size, rank, group)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.bfloat16):
        every = torch.randn(size, 4 * size, 6 * size, generator=generator).to(device, dtype)
        x = every[rank].clone().requires_grad_()
        total = every.sum(0)
        joined = {d: torch.cat(list(every), d) for d in (0, 1)}
        wants: list[tuple[Any, torch.Tensor]] = [
            (lambda x: vary(x, axis), every[rank]),
            (lambda x: all_reduce(x, axis), total),
            *((lambda x, d=d: all_gather(x, axis, True, d), joined[d]) for d in (0, 1)),
            *((lambda x, d=d: reduce_scatter(x, axis, d), total.chunk(size, d)[rank]) for d in (0, 1)),
            *((lambda x, d=d: chunk(x, axis, d), every[rank].chunk(size, d)[rank]) for d in (0, 1)),
            (lambda x: all_to_all(x, axis, 0, 1), torch.cat([e.chunk(size, 1)[rank] for e in every], 0)),
        ]
        for run, want in wants:
            y = run(x)
            torch.testing.assert_close(y, want)
            y.sum().backward()
            assert x.grad is not None
            assert torch.isfinite(x.grad).all()
            x.grad = None
        with torch.no_grad():
            waits = [group.begin(name, x.detach().clone()) for name in ("all_reduce", "all_gather", "reduce_scatter")]
            for wait, want in zip(waits, (total, joined[0], total.chunk(size)[rank]), strict=True):
                torch.testing.assert_close(wait(), want)


class Drops(nn.Module):
    """Dropout on what is split, and on what is not, and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.dropout(torch.relu(self.up(x)), 0.3, self.training)
        return nn.functional.dropout(x + self.down(h), 0.2, self.training) + torch.rand_like(x)


def draws(device: str) -> None:
    """Mask for mask as one device; independent draws agree on all ranks where they must. Ranks start differently."""
    model, x = Drops().to(device).train(), torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(device)
    program = fxshard.parallelize(model, preset("tp2"), (x,))
    torch.manual_seed(5)
    want = [model(x) for _ in range(3)]
    torch.manual_seed(5 + dist.get_rank())
    for each in want:
        torch.testing.assert_close(program(x), each)
    program = fxshard.parallelize(model, preset("tp2"), (x,), randomness="independent")
    torch.manual_seed(5 + dist.get_rank())
    for _ in range(3):
        out = program(x).detach()
        every = [torch.empty_like(out) for _ in range(dist.get_world_size())]
        dist.all_gather(every, out)
        for other in every:
            torch.testing.assert_close(other, out, rtol=0, atol=0)

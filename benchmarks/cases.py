"""A case: one model of one size under one kind of parallelism, forward alone or with its backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.candidates import Candidate, candidates, example, original
from benchmarks.measure import Times, timed
from benchmarks.traffic import Traffic


@dataclass(frozen=True)
class Case:
    """What is measured."""

    model: str
    dim: int
    way: str
    train: bool
    compiled: bool = False
    overlap: tuple[int, ...] = ()

    def __str__(self) -> str:
        text = f"{self.model} {self.dim} {self.way} {'forward + backward' if self.train else 'forward'}"
        return f"{text}, compiled" if self.compiled else text


@dataclass(frozen=True)
class Found:
    """What came out for one candidate.

    Attributes:
        name: the candidate.
        times: of a step.
        traffic: what a step communicates.
        error: the largest difference to one device, of the output and of all gradients, relative to the largest value.
    """

    name: str
    times: Times
    traffic: str
    error: float


def run(case: Case, budget_s: float) -> list[Found]:
    """Checks, counts and times all candidates of a case; collective."""
    x = example(case.model, case.dim, case.way, case.train)
    made = candidates(case.model, case.dim, case.way, case.train, case.compiled, case.overlap)
    expected = _results(original(case.model, case.dim), case, x, whole=True)
    steps, found = [], []
    for each in made:
        error = _difference(_results(each, case, x), expected)
        if not error < 1e-3:
            raise AssertionError(f"{case}: {each.name} is off by {error}")
        steps.append(step_of(each, case, x))
        steps[-1]()  # what a step leaves behind is what the next one finds
        traffic = Traffic()
        with traffic if each.counted else nullcontext():
            steps[-1]()
        found.append((each.name, str(traffic), error))
    gc.collect()
    gc.disable()  # a collection would fall on any of them
    times = timed(steps, budget_s)
    gc.enable()
    return [Found(name, each, traffic, error) for (name, traffic, error), each in zip(found, times, strict=True)]


def step_of(each: Candidate, case: Case, x: torch.Tensor) -> Callable[[], None]:
    """One step of a candidate."""
    if not case.train:

        def forward() -> None:
            with torch.no_grad():
                each.call(x)

        return forward
    with torch.no_grad():
        weight = torch.randn(each.call(x).shape, generator=torch.Generator(x.device).manual_seed(1))

    def step() -> None:
        for parameter in each.weights:
            parameter.grad = None
        x.grad = None
        each.call(x).backward(weight)
        each.finish()

    return step


def _results(each: Candidate, case: Case, x: torch.Tensor, whole: bool = False) -> dict[str, torch.Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    x.grad = None
    parts = case.way in ("dp", "zero")
    rank = dist.get_rank()
    if not case.train:
        with torch.no_grad():
            out = each.call(x)
        return {"output": out.chunk(2)[rank] if whole and parts else out}
    out = each.call(x)
    size = (x.shape[0], *out.shape[1:])
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1))
    out.backward(weight.chunk(2)[rank] if parts and not whole else weight)
    each.finish()
    found = {name: grad.clone() for name, grad in each.grads().items()}
    if x.grad is not None:
        found["input"] = x.grad.clone()
    return {"output": out.detach().chunk(2)[rank] if whole and parts else out.detach(), **found}


def _difference(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    errors = [float((got[n] - t).abs().max() / t.abs().max().clamp_min(1e-6)) for n, t in expected.items()]
    return max(errors)

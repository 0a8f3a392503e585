"""What end-to-end tests share: the original model's results, a program's, and how far apart they are.

The reference is always the *original* model, run eagerly on one device; never the captured graph.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard.ruler import TOLERANCE, Row, compare

SINGLE = TOLERANCE[torch.float32]
"""The tolerance where transformers computes a loss, or rotary tables, in float32, whatever the model's dtype."""
Loss = Callable[[Any], torch.Tensor]


def slow_but_for(names: str, values: Iterable[Any], *fast: Any) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize(names, values)``, where only ``fast`` run always."""
    several = "," in names
    marked = [
        value if value in fast else pytest.param(*(value if several else (value,)), marks=pytest.mark.slow)
        for value in values
    ]
    return pytest.mark.parametrize(names, marked)


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model's output, caches included, with where it is."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors_of(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            yield from tensors_of(getattr(value, each.name, None), f"{path}.{each.name}")
    elif type(value).__module__.startswith("transformers.cache_utils"):
        for name, item in sorted(vars(value).items()):
            yield from tensors_of(item, f"{path}.{name}")


def weighted_loss(output: Any) -> torch.Tensor:
    """A scalar that every element of every differentiable output moves by a weight of its own."""
    terms = []
    for index, (_, tensor) in enumerate(tensors_of(output)):
        if tensor.requires_grad:
            weights = torch.linspace(-1 - index, 1, tensor.numel(), dtype=tensor.dtype).cos().reshape(tensor.shape)
            terms.append((tensor * weights.to(tensor.device)).sum() / max(1, tensor.numel()) ** 0.5)
    assert terms, "no output requires a gradient"
    return torch.stack(terms).sum()


@dataclass
class Result:
    """What one run gave."""

    outputs: list[dict[str, torch.Tensor]]
    grads: dict[str, torch.Tensor]
    types: list[type]
    input_grads: dict[str, torch.Tensor] = field(default_factory=dict)
    loss: float = 0.0
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


def _detached(output: Any) -> dict[str, torch.Tensor]:
    return {path: tensor.detach().clone() for path, tensor in tensors_of(output)}


def _fresh(tree: Any) -> Any:
    """Inputs of their own, so that gradients and updates in place of one run do not reach another."""
    return copy.deepcopy(tree)


def run_original(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *,
    loss: Loss = weighted_loss, seed: int = 0,
) -> Result:  # fmt: skip
    """One forward and backward pass of a copy of the model, on one device."""
    model = copy.deepcopy(model)
    args, kwargs = _fresh((args, dict(kwargs or {})))
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(*args, **kwargs)
    value = loss(output)
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return Result([_detached(output)], grads, [type(output)], _input_grads(args, kwargs), value.item(), buffers)


def run_simulated(
    program: fxshard.ParallelModule, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *,
    loss: Loss = weighted_loss, seed: int = 0,
) -> Result:  # fmt: skip
    """One forward and backward pass of all ranks, in this process."""
    args, kwargs = _fresh((args, dict(kwargs or {})))
    torch.manual_seed(seed)
    run = fxshard.simulate(program, *args, **kwargs)
    losses = run.backward(loss)
    grads = _input_grads(args, kwargs)
    outputs = [_detached(output) for output in run.outputs]
    state = program.full_state_dict()
    buffers = {name: state[name] for name, _ in program._original.get().named_buffers() if name in state}
    return Result(outputs, run.full_grads(), [type(o) for o in run.outputs], grads, losses[0].item(), buffers)


def _input_grads(args: Any, kwargs: Any) -> dict[str, torch.Tensor]:
    return {path: t.grad for path, t in tensors_of((args, kwargs)) if t.grad is not None}


def problems_of(actual: Result, expected: Result, tolerance: float = 0.0) -> list[str]:
    """Every difference between a run of the program and the original, a line each; none where they agree.

    Args:
        tolerance: as for ``fxshard.ruler.compare``, where a model computes a part in lower precision. Rounding that
            cancels in one gradient is measured by the largest of all: of a thousandth of that, so much may be off.
    """
    dtypes = [t.dtype for outputs in expected.outputs for t in outputs.values() if t.dtype in TOLERANCE]
    least = 1e-3 * max([tolerance, *(TOLERANCE[dtype] for dtype in dtypes)])
    problems, rows = [], list[Row]()
    (whole,) = expected.outputs
    for rank, outputs in enumerate(actual.outputs):
        if actual.types[rank] is not expected.types[0]:
            problems.append(f"rank {rank} returns a {actual.types[rank].__name__}, not {expected.types[0].__name__}")
        names = dict.fromkeys([*whole, *outputs])
        rows += [(f"output {path} of rank {rank}", outputs.get(path), whole.get(path)) for path in names]
    rows += _rows("buffer", actual.buffers, {n: b for n, b in expected.buffers.items() if n in actual.buffers})
    compared = compare(rows, tolerance, floor=least)
    grads = _rows("gradient of parameter", actual.grads, expected.grads)
    grads += _rows("gradient of input", actual.input_grads, expected.input_grads)
    largest = max((want.abs().max().item() for _, _, want in grads if want is not None and want.numel()), default=0.0)
    compared += compare(grads, tolerance, floor=least * largest)
    found = {name: (got, want) for name, got, want in (*rows, *grads)}
    return problems + [
        f"{row.name}: off by {row.error:.1e}{_ratio(*found[row.name])}" for row in compared if not row.ok
    ]


def _rows(kind: str, actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[Row]:
    return [(f"{kind} {n}", actual.get(n), expected.get(n)) for n in dict.fromkeys([*expected, *actual])]


def _ratio(actual: torch.Tensor | None, expected: torch.Tensor | None) -> str:
    """A hint: gradients that are N times too large are the commonest bug."""
    if actual is None or expected is None:
        return ", it is missing" if actual is None else ", it should be none"
    if actual.shape != expected.shape:
        return f" (shape {list(actual.shape)} for {list(expected.shape)})"
    norms = (each.to(torch.complex128).norm().item() for each in (actual, expected))
    return " (norm {:.3g} for {:.3g})".format(*norms)


def assert_equivalent(
    model: nn.Module,
    plan: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = 0.0,
    loss: Loss = weighted_loss,
    expected: Result | None = None,
    seed: int = 0,
    **options: Any,
) -> fxshard.ParallelModule:
    """Parallelizes and simulates a model; fails with every difference from the original. Returns the program."""
    expected = expected or run_original(model, args, kwargs, loss=loss, seed=seed)
    program = fxshard.parallelize(model, plan, args, kwargs, **options)
    actual = run_simulated(program, args, kwargs, loss=loss, seed=seed)
    problems = problems_of(actual, expected, tolerance)
    assert not problems, "\n".join([f"differs from the original under {program.plan}", *problems[:20]])
    return program

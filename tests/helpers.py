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

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-10, 1e-10)}
"""dtype -> the largest error of outputs, and of gradients, each relative to the tensor's scale."""

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


def error_of(actual: torch.Tensor, expected: torch.Tensor, scale: float = 0.0) -> float:
    """The largest difference, relative to the largest element (or to ``scale``, if that is larger)."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not expected.dtype.is_floating_point:
        return 0.0 if torch.equal(actual, expected) else float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(actual)) or not torch.equal(actual[~finite], expected[~finite]):
        return float("inf")
    largest = max(expected[finite].abs().max().item() if finite.any() else 0.0, scale, 1e-30)
    return (actual - expected)[finite].abs().max().item() / largest if finite.any() else 0.0


def problems_of(actual: Result, expected: Result, tolerances: tuple[float, float]) -> list[str]:
    """Every difference between a run of the program and the original, a line each; none where they agree."""
    out_tolerance, grad_tolerance = tolerances
    problems = []
    (whole,) = expected.outputs
    for rank, outputs in enumerate(actual.outputs):
        if actual.types[rank] is not expected.types[0]:
            problems.append(f"rank {rank} returns a {actual.types[rank].__name__}, not {expected.types[0].__name__}")
        if outputs.keys() != whole.keys():
            problems.append(f"rank {rank} returns {sorted(outputs)}, not {sorted(whole)}")
        for path in outputs.keys() & whole.keys():
            error = error_of(outputs[path], whole[path], scale=1e-3)
            if not error <= out_tolerance:
                shapes = f"{list(outputs[path].shape)} for {list(whole[path].shape)}"
                problems.append(f"output {path} of rank {rank}: error {error:.1e} ({shapes})")
    problems += _grad_problems("parameter", actual.grads, expected.grads, grad_tolerance)
    problems += _grad_problems("input", actual.input_grads, expected.input_grads, grad_tolerance)
    for name in actual.buffers.keys() & expected.buffers.keys():
        error = error_of(actual.buffers[name], expected.buffers[name], scale=1e-3)
        if not error <= out_tolerance:
            problems.append(f"buffer {name}: error {error:.1e}")
    return problems


def _grad_problems(
    kind: str, actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> list[str]:
    problems = []
    scale = 1e-3 * max((g.abs().max().item() for g in expected.values() if g.numel()), default=0.0)
    for name in expected.keys() - actual.keys():
        problems.append(f"gradient of {kind} {name} is missing")
    for name in actual.keys() - expected.keys():
        if actual[name].abs().max() > 0:
            problems.append(f"{kind} {name} has a gradient, the original's has none")
    for name in actual.keys() & expected.keys():
        error = error_of(actual[name], expected[name], scale)
        if not error <= tolerance:
            ratio = _ratio(actual[name], expected[name])
            problems.append(f"gradient of {kind} {name}: error {error:.1e}{ratio}")
    return sorted(problems)


def _ratio(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """A hint: gradients that are N times too large are the commonest bug."""
    if actual.shape != expected.shape or not expected.norm() > 0:
        return f" (shape {list(actual.shape)} for {list(expected.shape)})"
    return f" (norm {actual.norm().item():.3g} for {expected.norm().item():.3g})"


def assert_equivalent(
    model: nn.Module,
    plan: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerances: tuple[float, float] | None = None,
    loss: Loss = weighted_loss,
    expected: Result | None = None,
    seed: int = 0,
    **options: Any,
) -> fxshard.ParallelModule:
    """Parallelizes and simulates a model; fails with every difference from the original. Returns the program."""
    expected = expected or run_original(model, args, kwargs, loss=loss, seed=seed)
    program = fxshard.parallelize(model, plan, args, kwargs, **options)
    actual = run_simulated(program, args, kwargs, loss=loss, seed=seed)
    if tolerances is None:
        tolerances = TOLERANCES[next(model.parameters()).dtype]
    problems = problems_of(actual, expected, tolerances)
    assert not problems, "\n".join([f"differs from the original under {program.plan}", *problems[:20]])
    return program

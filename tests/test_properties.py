"""Random modules under random plans: what all ranks compute together is what one device computes.

Outputs, gradients of every parameter and of the input, in float64, in training mode with dropout.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis.errors import UnsatisfiedAssumption

import fxshard
from fxshard.errors import CaptureError, InputError, PlanError
from fxshard.placement import BlockShard, chunk_shares, cut, cut_of, shard
from tests.random_models import Example, examples

TOLERANCE = 1e-9


def loss_of(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A sum over elements, so that ranks may each sum over their own part."""
    terms = [(k + 1) * (t.sin() + 0.1 * t * t).sum() for k, t in enumerate(outputs) if t.requires_grad]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def part_of(whole: torch.Tensor, splits: dict[str, fxshard.Shard], mesh: fxshard.Mesh, rank: int) -> torch.Tensor:
    """What a rank returns of an output that the plan leaves split."""
    for axis, size, position in zip(mesh.names, mesh.sizes, mesh.coordinate(rank), strict=True):
        if axis in splits:
            dim, (blocks, shares, _) = splits[axis].dim, cut_of(splits[axis])
            shares = shares or chunk_shares(whole.shape[dim] // sum(blocks), size)
            whole = cut(whole, shard(dim, blocks, shares), size, position)
    return whole


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, scale: float = 1.0) -> None:
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, not {list(expected.shape)}"
    if not expected.numel():
        return
    scale = max(scale, expected.abs().max().item())
    error = (actual - expected).abs().max().item()
    assert error <= TOLERANCE * scale, f"{what}: error {error:.2e} at a scale of {scale:.2e}"


def parallelize(example: Example, inputs: tuple[torch.Tensor, ...], **options: Any) -> fxshard.ParallelModule:
    """Compiles an example. Its own entries fit; what a preset asks beside them need not."""
    try:
        return fxshard.parallelize(example.model, example.plan, inputs, **options)
    except PlanError as error:
        text = str(error)
        asked_by_presets = re.findall(r"^ *op +(\w+_parallel): ", text, re.MULTILINE)
        # a step whose result is its operand itself returns nothing of its own
        unknown = re.findall(r"activations '(steps\.\d+)' matches no module", text)
        if len(asked_by_presets) + len(unknown) < text.count("  fix "):
            raise
        if asked_by_presets:
            reject()
        activations = {name: entry for name, entry in example.plan.activations.items() if name not in unknown}
        example.plan = replace(example.plan, activations=activations)
        return parallelize(example, inputs, **options)


def check(example: Example) -> None:
    model = copy.deepcopy(example.model)
    x = example.x.detach().clone().requires_grad_(example.x.requires_grad)
    torch.manual_seed(7)
    expected = model(x, example.ids)
    scalar = loss_of(expected)
    assume(all(t.isfinite().all() and t.abs().max() < 1e6 for t in expected))
    if scalar.requires_grad:
        scalar.backward()

    mine = example.x.detach().clone().requires_grad_(example.x.requires_grad)
    program = parallelize(example, (mine, example.ids))
    torch.manual_seed(7)
    run = fxshard.simulate(program, mine, example.ids)
    for rank, outputs in enumerate(run.outputs):
        for k, (actual, whole) in enumerate(zip(outputs, expected, strict=True)):
            part = part_of(whole, example.output_splits[k], program.mesh, rank)
            assert_close(actual.detach(), part.detach(), f"output {k} of rank {rank}")
    if not scalar.requires_grad:
        return
    run.backward(loss_of)
    grads = run.full_grads()
    # A small gradient may be what is left of large ones that cancel.
    largest = (p.grad.abs().max().item() for p in (x, *model.parameters()) if p.grad is not None and p.numel())
    scale = max(1.0, max(largest, default=0.0) / 100)
    for name, parameter in model.named_parameters():
        expected_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(grads.get(name, torch.zeros_like(parameter)), expected_grad, f"gradient of {name}", scale)
    if x.grad is not None:
        assert mine.grad is not None, "no gradient of x"
        assert_close(mine.grad, x.grad, "gradient of x", scale)


def asked_batch(example: Example) -> set[str]:
    """The axes by which the plan asks that the batch be split."""
    entries = [*example.plan.inputs.values(), *example.plan.activations.values(), *example.plan.outputs.values()]
    asked = {axis for entry in entries for axis, placement in entry.items() if placement == fxshard.Shard(0)}
    return asked | {axis for preset, axis in example.plan.presets if preset == "data_parallel"}


def refines(plan: fxshard.Plan) -> bool:
    """Whether a plan speaks of blocks or shares."""
    entries = [*plan.inputs.values(), *plan.activations.values(), *plan.outputs.values()]
    return any(isinstance(placement, BlockShard) for entry in entries for placement in entry.values())


def check_dynamic(example: Example) -> None:
    """One capture with a dynamic batch serves a batch twice as large."""
    model, x, ids = example.model.eval(), example.x.detach(), example.ids
    auto = {0: torch.export.Dim.AUTO}
    try:
        program = parallelize(example, (x, ids), dynamic_shapes={"x": auto, "ids": auto})
    except CaptureError:
        reject()  # some step needs this very batch
    except PlanError:
        if not refines(example.plan):
            raise
        reject()  # a dynamic size has no blocks or shares
    shapes = {leaf.path: leaf.shape for leaf in program.compiled.captured.example_inputs}
    assume(not isinstance(shapes["x"][0], int) and not isinstance(shapes["ids"][0], int))
    splits = [
        size for size, axis in zip(program.mesh.sizes, program.mesh.names, strict=True) if axis in asked_batch(example)
    ]
    assume(len(x) % math.prod(splits) == 0)
    larger = (torch.cat([x.cos(), x]), torch.cat([ids.flip(0), ids]))
    for inputs in ((x, ids), larger):
        with torch.no_grad():
            try:
                expected = model(*inputs)
            except (RuntimeError, IndexError):
                continue  # the model itself does not run on that batch
            try:
                outputs = fxshard.simulate(program, *inputs).outputs
            except InputError:
                continue  # refused: outside of the range that the capture found
        for rank, actual in enumerate(outputs):
            for k, whole in enumerate(expected):
                part = part_of(whole, example.output_splits[k], program.mesh, rank)
                assert_close(actual[k], part, f"output {k} of rank {rank} at batch {len(inputs[0])}")


def check_again(example: Example) -> None:
    """The plan is read back as the same program, and a second capture takes the weights to lie as the first."""
    model, x, ids = example.model.train(), example.x.detach(), example.ids
    program = parallelize(example, (x, ids))
    again = fxshard.parallelize(model, fxshard.Plan.from_json(program.plan.to_json()), (x, ids))
    ranks = range(program.mesh.world_size)
    assert [again.code(rank) for rank in ranks] == [program.code(rank) for rank in ranks]
    program.eval()
    with torch.no_grad():
        expected = model.eval()(x, ids)
        assume(all(t.isfinite().all() and t.abs().max() < 1e6 for t in expected))
        for rank, outputs in enumerate(fxshard.simulate(program, x, ids).outputs):
            for k, whole in enumerate(expected):
                part = part_of(whole, example.output_splits[k], program.mesh, rank)
                assert_close(outputs[k], part, f"output {k} of rank {rank}")


def each(check: Callable[[Example], None], family: list[Example]) -> None:
    """Checks one model under its plans; those that do not fit are left out."""
    for example in family:
        with contextlib.suppress(UnsatisfiedAssumption):
            check(example)


@settings(max_examples=15)
@given(examples(max_steps=6))
def test_random_models_under_random_plans(family: list[Example]) -> None:
    each(check, family)


@pytest.mark.slow
@settings(max_examples=40)
@given(examples(max_steps=10))
def test_many_random_models_under_random_plans(family: list[Example]) -> None:
    each(check, family)


@settings(max_examples=6)
@given(examples(max_steps=5))
def test_random_plans_are_read_back(family: list[Example]) -> None:
    each(check_again, family)


@pytest.mark.slow
@settings(max_examples=12)
@given(examples(max_steps=8))
def test_many_random_plans_are_read_back(family: list[Example]) -> None:
    each(check_again, family)


@settings(max_examples=5)
@given(examples(max_steps=5))
def test_random_models_with_a_dynamic_batch(family: list[Example]) -> None:
    each(check_dynamic, family)


@pytest.mark.slow
@settings(max_examples=15)
@given(examples(max_steps=6))
def test_many_random_models_with_a_dynamic_batch(family: list[Example]) -> None:
    each(check_dynamic, family)

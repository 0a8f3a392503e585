"""State dicts into the parts of a program: whole tensors are cut, ``DTensor``s laid out anew, own parts copied.

``program.state_dict()`` holds plain tensors, this rank's parts. Those of another rank or plan may have the same shapes
and other contents, so the state dict says what each is a part of (in ``_metadata``, which ``copy.deepcopy`` and
``torch.save`` keep), and only what says the same is taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fxshard.ranks.agreement import gathered, refuse
from fxshard.torch_internals import IncompatibleKeys
from fxshard.weights.checkpoint_parts import BlockTensor, local_of, same
from fxshard.weights.layout import Layout, dtensor_placements, fill
from fxshard.weights.staging import Staging
from fxshard.weights.weights import Weights

KEY = "fxshard"


def describe_parts(weights: Weights) -> dict[str, str]:
    """What each part of ``program.state_dict()`` is a part of; nothing for a tensor that is whole on every rank."""
    layouts = {name: weights.layout(name) for name in weights.names}
    return {name: str(layout) for name, layout in layouts.items() if layout.is_cut}


def load_state_dict(weights: Weights, state: Mapping[str, Any], strict: bool) -> IncompatibleKeys:
    """See ``ParallelModule.load_state_dict``."""
    metadata = getattr(state, "_metadata", None) or {}
    parts: dict[str, str] = metadata.get("", {}).get(KEY, {})
    wanted = [*weights.names, *weights.extras]
    wanted += [name for name, t in weights.tensors.items() if name in state and name not in wanted and t.is_meta]
    missing, unexpected = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    found = [name for name in wanted if name in state and name in weights.tensors]
    problems = [problem for name in found if (problem := _problem(weights, name, state[name], parts.get(name)))]
    if strict:
        problems += [f"{name} is missing" for name in missing]
        problems += [f"{name} is not in the model" for name in unexpected]
    problems += _untied(weights, found, state)
    dtensors = [name for name in found if isinstance(state[name], DTensor | BlockTensor)]
    if len({tuple(names) for names in gathered(dtensors)}) > 1:  # each is gathered by all ranks together
        problems.append("the ranks give DTensors under different names")
    refuse(
        problems,
        f"cannot load the state dict into {type(weights.model).__name__}:",
        "give a state dict of this model: whole tensors, DTensors, or what this rank's program.state_dict() returned",
    )
    staging = Staging(weights, found)
    once = [name for name in found if weights.first_names[name] == name or weights.first_names[name] not in found]
    staged = [name for name in once if isinstance(state[name], DTensor | BlockTensor) or weights.part(name).is_meta]
    for name in staged:
        value, is_part = _value(weights, name, state[name], name in parts)
        for rank in weights.modules:
            _fill(staging.of(name, rank), weights.layout(name, rank), value, is_part)
    extras = {name: state[name] for name in weights.extras if name in state}
    if extras:
        weights.model.load_state_dict(extras, strict=False)
    staging.install()
    for name in (name for name in once if name not in staged):  # what the caller has in memory, and fits
        for rank in weights.modules:
            _fill(weights.part(name, rank), weights.layout(name, rank), state[name], name in parts)
    return IncompatibleKeys(missing, unexpected)


def _problem(weights: Weights, name: str, value: Any, part_of: str | None) -> str | None:
    """Why a value cannot be loaded; None where it can."""
    layout = weights.layout(name)
    if not isinstance(value, torch.Tensor):
        return f"{name} is a {type(value).__name__}, not a tensor"
    if value.is_meta:
        return f"{name} is on the meta device, and has no values"
    if value.layout != torch.strided or value.is_quantized:
        return f"{name} is {'quantized' if value.is_quantized else value.layout}, not a tensor of plain numbers"
    if value.is_complex() and not weights.tensors[name].is_complex():
        return f"{name} is complex, and must be {weights.tensors[name].dtype}"
    if part_of is not None and not isinstance(value, DTensor | BlockTensor):
        if weights.is_simulated:
            return f"{name} is the part of {part_of}: all ranks are in this process, and need the whole"
        if part_of != str(layout):
            return f"{name} is the part of {part_of}; here it is the part of {layout}"
        expected = layout.local_shape
    else:
        expected = layout.shape
    if tuple(value.shape) == expected:
        return None
    if part_of is None and layout.is_cut and tuple(value.shape) == layout.local_shape:
        return f"{name} has the shape {list(value.shape)} of a part, and does not say of what; whole: {list(expected)}"
    return f"{name} has shape {list(value.shape)}, and must have {list(expected)}"


def _untied(weights: Weights, found: list[str], state: Mapping[str, Any]) -> list[str]:
    """Names of one tensor of the model whose values are not one, a line each."""
    problems = []
    for name in found:
        first = weights.first_names[name]
        if first != name and first in found and all(isinstance(state[n], torch.Tensor) for n in (first, name)):
            one, other = (local_of(state[key]) for key in (first, name))
            if one is not other and one.shape == other.shape and not same(one, other):
                problems.append(f"{first} and {name} are one tensor of the model, and differ")
    return problems


def _value(weights: Weights, name: str, value: torch.Tensor, is_part: bool) -> tuple[torch.Tensor, bool]:
    """A plain tensor, and whether that is this rank's part; collective where a ``DTensor`` lies in another way."""
    if isinstance(value, DTensor | BlockTensor):
        is_part = _lies_alike(value, weights, name)
        value = local_of(value) if is_part else value.full_tensor()
    return value, is_part


def _fill(part: torch.Tensor, layout: Layout, value: torch.Tensor, is_part: bool) -> None:
    with torch.no_grad():
        if is_part:
            part.copy_(value)
        else:
            fill(part, layout.boxes, lambda box: value[box.of_whole])


def _lies_alike(value: DTensor | BlockTensor, weights: Weights, name: str) -> bool:
    """Whether this rank's part of ``value`` is its part of the weight, on every rank."""
    layout = weights.layout(name)
    if isinstance(value, BlockTensor):
        return value.part_layout == layout
    mesh = value.device_mesh
    alike = mesh.shape == layout.mesh.sizes and mesh.mesh.flatten().tolist() == list(range(layout.mesh.world_size))
    return alike and value.placements == dtensor_placements(layout.shape, layout.placements, layout.mesh.sizes)

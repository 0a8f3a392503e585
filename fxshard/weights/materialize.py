"""Real memory for the parts of a model that was captured on the meta device.

Each rank allocates its own parts, and no more. Parameters and persistent buffers get their values from what is loaded.
Other buffers, such as the frequencies of a rotary embedding, are in no state dict: a real one is kept, and one on meta
is made by the model itself, by its module's ``reset_parameters`` (PyTorch's convention) or by the ``_init_weights`` of
the module around it (that of ``transformers``). Whether these made *all* of it, and not by chance, is seen by making it
twice, from memory that differs.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from fxshard.ranks.agreement import refuse
from fxshard.ranks.devices import target_device
from fxshard.runtime.module import find, local_part
from fxshard.weights.weights import Weights


def is_on_meta(weights: Weights) -> bool:
    """Whether some of this process's parts have no memory yet."""
    return any(weights.part(name).is_meta for name in weights.tensors)


def check_values(weights: Weights, given: Collection[str]) -> dict[str, torch.Tensor]:
    """Whether every part on the meta device will have a value, once ``given`` is loaded; nothing is changed.

    Returns:
        The whole values of those that the model makes by itself.

    Raises:
        CheckpointError: where something would be left without a value.
    """
    made: dict[str, torch.Tensor] = {}
    if not is_on_meta(weights):
        return made
    problems = problems_of(weights, given, made)
    refuse(
        problems,
        f"cannot give the weights of {type(weights.model).__name__} memory:",
        "load a value for every weight; keep other tensors off the meta device when the model is made, or give their "
        "module a reset_parameters() that fills them",
    )
    return made


def problems_of(weights: Weights, given: Collection[str], made: dict[str, torch.Tensor]) -> list[str]:
    """What would have no value once ``given`` was loaded, a line each; fills ``made`` with what the model makes."""
    given = {weights.first_names[name] for name in given}
    problems = [f"{name}, neither a parameter nor a buffer, is on the meta device" for name in weights.lost]
    for name, tensor in weights.tensors.items():
        first = weights.first_names[name]
        if not tensor.is_meta or first in given or first != name:
            continue
        if name in weights.names or isinstance(tensor, nn.Parameter):
            problems.append(f"{name} is on the meta device, and is not loaded")
            continue
        value = made_by_itself(weights.model, name)
        if value is None:
            problems.append(f"{name}, a buffer that no state dict holds, is on the meta device: its value is lost")
        else:
            made[name] = value
    return problems


def materialize(weights: Weights, made: dict[str, torch.Tensor]) -> None:
    """Gives every part that is on the meta device memory.

    Args:
        weights: those of the program.
        made: whole values for some; others are cut from the model where it has them.
    """
    device = target_device(weights.tensors.values())
    for rank, module in weights.modules.items():
        for name, tensor in weights.tensors.items():
            part = find(module, name)
            if weights.first_names[name] != name or not part.is_meta:
                continue
            whole = local_part(made.get(name, tensor), weights.placements[name], weights.mesh, rank)
            swap(part, whole.to(device, part.dtype))


def swap(part: torch.Tensor, new: torch.Tensor) -> None:
    """Gives a part other memory, under the same parameter: an optimizer that has it keeps it."""
    torch.utils.swap_tensors(part, nn.Parameter(new, part.requires_grad) if isinstance(part, nn.Parameter) else new)


def made_by_itself(model: nn.Module, name: str) -> torch.Tensor | None:
    """The value of a buffer, as the model itself initialises it; None where it does not, or not all of it.

    >>> class Rotary(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_buffer("steps", torch.arange(3), persistent=False)
    ...     def reset_parameters(self):
    ...         self.steps.copy_(torch.arange(3))
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(Rotary())
    >>> made_by_itself(model, "0.steps")
    tensor([0, 1, 2])
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    for initialize in _initializers(model, path):
        with (
            contextlib.suppress(Exception),
            torch.random.fork_rng(devices=[]),
        ):  # another may do
            tries = [_tried(module, last, initialize, fill) for fill in (0, 1)]
            if torch.equal(tries[0], tries[1]):
                return tries[0]
    return None


def _initializers(model: nn.Module, path: str) -> Iterator[Callable[[nn.Module], Any]]:
    """The ways in which a module may be initialised: its own, and those of the modules around it, innermost first."""
    if callable(getattr(model.get_submodule(path), "reset_parameters", None)):
        yield lambda module: module.reset_parameters()  # type: ignore[operator]
    parts = path.split(".") if path else []
    for count in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:count]))
        if callable(getattr(around, "_init_weights", None)):
            yield around._init_weights  # type: ignore[misc]


def _tried(module: nn.Module, last: str, initialize: Callable[[nn.Module], Any], fill: int) -> torch.Tensor:
    """What a buffer of ``module`` holds after it was initialised, from memory that held ``fill``."""
    one = copy.deepcopy(module).to("meta")
    for key, buffer in one._buffers.items():
        if buffer is not None:
            one._buffers[key] = torch.full(buffer.shape, fill, dtype=buffer.dtype, device="cpu")
    with torch.no_grad():
        initialize(one)
    out = one._buffers[last]
    assert out is not None
    return out

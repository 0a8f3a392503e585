"""A rank's module: the local weights under their original names, and the generated code that uses them."""

from __future__ import annotations

import keyword
import linecache
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fxshard.mesh import Mesh
from fxshard.placement import Placements, cut_all
from fxshard.runtime.collectives import Axis

_MOST = 2**22
"""How many elements of a tensor are looked at."""


class Container(nn.Module):
    """A module of the original tree, holding what it held; children named by numbers are items too."""

    def __getitem__(self, index: int) -> nn.Module:
        child = self._modules[str(index)]
        assert child is not None
        return child


class RankModule(Container):
    """One rank's part of a sharded model.

    Its parameters are plain local tensors under the original names. Tied names are one parameter. It has no public
    attributes of its own: any name may be that of a module of the user's.
    """

    def __init__(self, rank: int, mesh: Mesh) -> None:
        super().__init__()
        self._where = f"rank {rank} of {mesh}"

    def extra_repr(self) -> str:
        """Which rank this is."""
        return self._where


def place(module: nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:
    """Puts a parameter, a buffer or a submodule under a dotted name.

    What a class defines may have the same name (``plan``, ``mesh``): torch's own ``add_module`` would refuse it.
    """
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module._modules[part] = Container()
        child = module._modules[part]
        assert child is not None
        module = child
    if isinstance(tensor, nn.Parameter):
        module._parameters[last] = tensor
    elif isinstance(tensor, torch.Tensor):
        module._buffers[last] = tensor
        if not persistent:
            module._non_persistent_buffers_set.add(last)
    elif isinstance(tensor, nn.Module):
        module._modules[last] = tensor
    else:
        module.__dict__[last] = tensor


def find(module: nn.Module, name: str) -> Any:
    """What ``place`` put under a dotted name; None where nothing is.

    It looks where torch keeps what modules hold: an attribute of the class may have the same name.
    """
    *path, last = name.split(".")
    for part in path:
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    for held in (module._parameters, module._buffers, module._modules):
        if last in held:
            return held[last]
    return module.__dict__.get(last)


def joined(path: str, name: str) -> str:
    """The name of what a module holds, from its own and the module's, which is empty for the root.

    >>> joined("model.norm", "weight"), joined("", "weight")
    ('model.norm.weight', 'weight')
    """
    return f"{path}.{name}" if path else name


def is_word(text: str) -> bool:
    """Whether a text may stand in code as a name: Python reads some others as another one, or not at all.

    >>> is_word("up_proj"), is_word("class"), is_word("\N{LATIN SMALL LIGATURE FI}le"), is_word("2")
    (True, False, False, False)
    """
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def share(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` what ``source`` holds, under the same names."""
    target._modules.update(source._modules)
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)


def state_of(tensor: torch.Tensor) -> Hashable:
    """What tells whether a parameter or buffer was changed: also by ``.data``, of which its version says nothing.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> before = state_of(weight)
    >>> _ = weight.data.mul_(2)
    >>> state_of(weight) == before
    False
    """
    state = tensor._version, tensor.data_ptr(), tensor.requires_grad
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return state
    values = tensor.detach().flatten()[:: 1 + tensor.numel() // _MOST]
    values = torch.view_as_real(values) if values.is_complex() else values
    return *state, repr(values.sum(dtype=torch.float64).item())


def local_part(tensor: torch.Tensor, placements: Placements, mesh: Mesh, rank: int) -> torch.Tensor:
    """What ``rank`` holds of a whole tensor, in memory of its own."""
    part = cut_all(tensor.detach(), placements, mesh.sizes, mesh.coordinate(rank))
    return part.clone(memory_format=torch.contiguous_format)


def load(source: str, axes: Mapping[str, Axis], device: torch.device, filename: str) -> Callable[..., tuple[Any, ...]]:
    """Runs generated source. Tracebacks and debuggers show its lines.

    Returns:
        ``forward(module, *inputs)``, where ``module`` holds the local weights.
    """
    build = load_builder(source, axes, device, filename)
    built: list[Any] = [None, None]

    def forward(module: nn.Module, *inputs: Any) -> tuple[Any, ...]:
        if built[0] is not module:
            built[:] = module, build(module)
        outputs: tuple[Any, ...] = built[1](*inputs)
        return outputs

    return forward


def load_builder(
    source: str, axes: Mapping[str, Axis], device: torch.device, filename: str
) -> Callable[[nn.Module], Callable[..., tuple[Any, ...]]]:
    """Runs generated source: its ``build``, which makes the model over a module that holds the local weights."""
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace: dict[str, Any] = {**axes, "axes": axes, "device": device}
    exec(_compiled(source, filename), namespace)
    build: Callable[[nn.Module], Callable[..., tuple[Any, ...]]] = namespace["build"]
    return build


@lru_cache(maxsize=64)
def _compiled(source: str, filename: str) -> Any:
    return compile(source, filename, "exec")

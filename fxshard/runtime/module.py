"""A rank's module: the local weights under their original names, and the generated code that uses them."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fxshard.mesh import Mesh
from fxshard.placement import Placements, cut_all
from fxshard.runtime.collectives import Axis


class Container(nn.Module):
    """A module of the original tree, holding what it held; children named by numbers are items too."""

    def __getitem__(self, index: int) -> nn.Module:
        child = self._modules[str(index)]
        assert child is not None
        return child


class RankModule(Container):
    """One rank's part of a sharded model.

    Its parameters are plain local tensors under the original names. Tied names are one parameter.
    """

    def __init__(self, rank: int, mesh: Mesh) -> None:
        super().__init__()
        self.rank = rank
        self.mesh = mesh

    def place(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """Puts a parameter, a buffer or a submodule under a dotted name."""
        *path, last = name.split(".")
        at: nn.Module = self
        for part in path:
            if part not in at._modules:
                at.add_module(part, Container())
            child = at._modules[part]
            assert child is not None
            at = child
        if isinstance(tensor, nn.Parameter):
            at.register_parameter(last, tensor)
        elif isinstance(tensor, torch.Tensor):
            at.register_buffer(last, tensor, persistent)
        else:
            at.add_module(last, tensor)


def local_part(tensor: torch.Tensor, placements: Placements, mesh: Mesh, rank: int) -> torch.Tensor:
    """What ``rank`` holds of a whole tensor, in memory of its own."""
    part = cut_all(tensor.detach(), placements, mesh.sizes, mesh.coordinate(rank))
    return part.clone(memory_format=torch.contiguous_format)


def load(source: str, axes: Mapping[str, Axis], device: torch.device, filename: str) -> Callable[..., tuple[Any, ...]]:
    """Runs generated source. Tracebacks and debuggers show its lines.

    Returns:
        ``forward(module, *inputs)``, where ``module`` holds the local weights.
    """
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace: dict[str, Any] = {**axes, "axes": axes, "device": device}
    exec(_compiled(source, filename), namespace)
    build = namespace["build"]
    built: list[Any] = [None, None]

    def forward(module: nn.Module, *inputs: Any) -> tuple[Any, ...]:
        if built[0] is not module:
            built[:] = module, build(module)
        outputs: tuple[Any, ...] = built[1](*inputs)
        return outputs

    return forward


_code: dict[tuple[str, str], Any] = {}


def _compiled(source: str, filename: str) -> Any:
    key = (source, filename)
    if key not in _code:
        _code[key] = compile(source, filename, "exec")
    return _code[key]

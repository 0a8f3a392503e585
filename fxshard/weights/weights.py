"""The weights of a program, or of a plain module: where each lies, and the state dicts made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fxshard.errors import CheckpointError, DistributedError
from fxshard.mesh import Mesh
from fxshard.placement import REPLICATE, Placements, join_all
from fxshard.ranks.agreement import is_spread
from fxshard.ranks.devices import target_device
from fxshard.runtime.collectives import Axis
from fxshard.runtime.module import find
from fxshard.weights.checkpoint_parts import device_mesh_of, sharded
from fxshard.weights.gathering import fill_whole, gather_whole, stream_whole
from fxshard.weights.layout import Layout


def _no_axes() -> Mapping[str, Axis]:
    raise DistributedError("a plain module has no mesh axes")


@dataclass(frozen=True)
class Weights:
    """The parameters and buffers of a model, under their original names, and where each lies.

    Attributes:
        model: the original model: its names, shapes and dtypes.
        placements: of every parameter and buffer, one an axis.
        mesh: the mesh.
        rank: this process's rank.
        modules: the ranks whose parts this process holds, and their modules.
        axes: gives this process's axes.
        given_mesh: the torch ``DeviceMesh`` that the user gave, if any.
        lost: names of constants of the program that are on the meta device.
    """

    model: nn.Module
    placements: Mapping[str, Placements]
    mesh: Mesh
    rank: int
    modules: Mapping[int, nn.Module]
    axes: Callable[[], Mapping[str, Axis]] = _no_axes
    given_mesh: DeviceMesh | None = None
    lost: tuple[str, ...] = ()

    @staticmethod
    def of_module(model: nn.Module) -> Weights:
        """Those of a plain module: all whole.

        >>> Weights.of_module(nn.Linear(2, 3)).names
        ('weight', 'bias')
        """
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return Weights(model, {n: (REPLICATE,) for n, _ in tensors}, Mesh(("all",), (1,)), 0, {0: model})

    # --- names -----------------------------------------------------------------------------------------------------

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The original parameters and buffers under all their names; for shapes, dtypes and identity."""
        model = self.model
        return {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the model's state dict that are parameters or persistent buffers, in its order."""
        return tuple(name for name in self.model.state_dict(keep_vars=True) if name in self.tensors)

    def in_order(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict in the order of the model's own."""
        return {name: state[name] for name in self.model.state_dict(keep_vars=True) if name in state}

    @cached_property
    def extras(self) -> dict[str, Any]:
        """What else the model's state dict holds: the extra state of modules that have some."""
        return {k: v for k, v in self.model.state_dict().items() if k not in self.tensors}

    @cached_property
    def first_names(self) -> dict[str, str]:
        """Every name -> the first name of the same tensor: itself, where nothing is tied."""
        seen: dict[int, str] = {}
        return {name: seen.setdefault(id(tensor), name) for name, tensor in self.tensors.items()}

    @cached_property
    def parameters(self) -> dict[int, str]:
        """The id of each parameter that this process trains -> its first name."""
        module = self.modules[self.rank]
        return {id(find(module, name)): name for name, _ in self.model.named_parameters()}

    # --- parts -----------------------------------------------------------------------------------------------------

    @property
    def is_simulated(self) -> bool:
        """Whether this one process holds the parts of several ranks."""
        return self.mesh.world_size > 1 and not is_spread()

    def layout(self, name: str, rank: int | None = None) -> Layout:
        """How a parameter or buffer lies."""
        shape = tuple(self.tensors[name].shape)
        return Layout(shape, self.placements[name], self.mesh, self.rank if rank is None else rank)

    def part(self, name: str, rank: int | None = None) -> torch.Tensor:
        """What a rank holds of a parameter or buffer."""
        found: torch.Tensor = find(self.modules[self.rank if rank is None else rank], name)
        return found

    @cached_property
    def _device_mesh(self) -> DeviceMesh:
        device = target_device(self.tensors.values()).type
        return self.given_mesh or device_mesh_of(self.mesh, self.axes(), device)

    def sharded(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A part of something that lies as the parameter ``name`` does, as a tensor of the whole shape."""
        if self.mesh.world_size == 1:
            return part.detach()
        return sharded(part, self.layout(name), self.axes, lambda: self._device_mesh)

    # --- state dicts -----------------------------------------------------------------------------------------------

    def sharded_state_dict(self) -> dict[str, Any]:
        """See ``ParallelModule.sharded_state_dict``."""
        if self.is_simulated:
            raise DistributedError(
                f"the mesh {self.mesh} has {self.mesh.world_size} ranks, which are all in this process",
                fix="take full_state_dict(), or run under torchrun",
            )
        self.check_real()
        made: dict[str, torch.Tensor] = {}
        for name in self.names:
            kept = self.first_names[name]
            if kept not in made:
                made[kept] = self.sharded(kept, self.part(kept))
        return self.in_order({name: made[self.first_names[name]] for name in self.names} | self.extras)

    def whole(self, name: str, read: Callable[[torch.Tensor], torch.Tensor | None]) -> torch.Tensor | None:
        """What ``read`` gives of the parts of a weight, whole on every rank; None where it gives none; collective."""
        if self.modules[self.rank] is self.model:  # a plain module's are its own
            return read(self.part(name))
        placed = self.placements[name]
        if is_spread() and self.mesh.world_size > 1:
            part = read(self.part(name))
            return None if part is None else gather_whole(part.detach(), placed, self.mesh, self.axes()).clone()
        parts = [read(self.part(name, rank)) for rank in self.modules]
        there = [part for part in parts if part is not None]
        return join_all(there, placed, self.mesh.sizes).clone() if len(there) == len(parts) else None

    def full_state_dict(self) -> dict[str, Any]:
        """The whole state dict, on every rank; collective."""
        made: dict[str, Any] = {}
        for name in self.names:  # tied names share one tensor, as in the model's own state dict
            first = made.get(self.first_names[name])
            made[name] = self.whole(name, lambda t: t.detach()) if first is None else first
        return self.in_order(made | self.extras)

    def full_grads(self) -> dict[str, torch.Tensor]:
        """The whole gradients of the parameters that have some, on every rank; collective."""
        grads = {name: self.whole(name, lambda t: t.grad) for name, _ in self.model.named_parameters()}
        return {name: grad for name, grad in grads.items() if grad is not None}

    def stream_state_dict(self) -> dict[str, Any]:
        """The whole state dict on the CPU of rank 0, a tensor after the other; nothing on other ranks; collective."""
        self.check_real()
        first = not is_spread() or dist.get_rank() == 0
        made: dict[str, torch.Tensor | None] = {}
        for name in self.names:
            kept = self.first_names[name]
            if kept not in made:
                made[kept] = self._whole(kept, first)
        return self.in_order({n: made[self.first_names[n]] for n in self.names} | self.extras) if first else {}

    def _whole(self, name: str, first: bool) -> torch.Tensor | None:
        if is_spread() and self.mesh.world_size > 1:
            return stream_whole(self.part(name), self.layout(name))
        if not first:
            return None
        whole = torch.empty(self.layout(name).shape, dtype=self.part(name).dtype, device="cpu")
        for rank in self.modules:
            fill_whole(whole, self.part(name, rank).detach(), self.layout(name, rank))
        return whole

    def check_real(self) -> None:
        """Raises ``CheckpointError`` where weights have no values yet."""
        meta = [name for name in self.names if self.part(name).is_meta]
        if meta:
            raise CheckpointError(
                f"{len(meta)} weights are on the meta device and have no values, first {meta[0]!r}",
                fix="load them first, with load_state_dict, load_pretrained or load_checkpoint",
            )

"""The parts of a model's weights that the ranks hold: made where they are asked for, and kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fxshard.capture.queries import outside_inference_mode
from fxshard.errors import FxshardError, InputError
from fxshard.mesh import Mesh
from fxshard.passes.pipeline import Compiled
from fxshard.placement import Placements, is_shard
from fxshard.ranks.agreement import is_one_of_several, is_spread, own_rank
from fxshard.ranks.devices import target_device
from fxshard.runtime.collectives import Axis
from fxshard.runtime.module import RankModule, find, local_part, place, state_of
from fxshard.training.optimizers import note_parted, watch_optimizers
from fxshard.weights.layout import Layout, mark_part
from fxshard.weights.original_model import Original
from fxshard.weights.weights import Weights

Tensors = list[tuple[str, torch.Tensor]]


def not_captured() -> FxshardError:
    """What is asked of a program before the first capture."""
    return FxshardError(
        "the model has not been captured yet",
        fix="pass example inputs to parallelize, or call the program once",
    )


class Parts:
    """The weights of each rank.

    Attributes:
        original: the model.
        mesh: the ranks.
        placements: how each parameter and buffer lies; empty before the first capture.
    """

    def __init__(self, original: Original, mesh: Mesh) -> None:
        self.original, self.mesh = original, mesh
        self.placements: Mapping[str, Placements] = {}
        self._settled, self._training = False, True
        self._transient: frozenset[str] = frozenset()  # buffers that are not part of the state dict
        self._modules: dict[int, RankModule] = {}
        self._then: Mapping[str, torch.Tensor] = {}  # the whole weights, as they were when the first rank was made
        self._seen: dict[int, dict[str, Hashable]] = {}

    def copied(self, memo: dict[int, Any]) -> Parts:
        """The same parts in memory of their own."""
        made = Parts(self.original, self.mesh)
        made.placements, made._settled, made._training = self.placements, self._settled, self._training
        made._transient = self._transient
        made._then = self._then
        made._modules = {rank: copy.deepcopy(module, memo) for rank, module in self._modules.items()}
        made._seen = {rank: made._states(rank) for rank in made._modules}
        made.device = self.device
        return made

    @property
    def rank(self) -> int:
        """This process's rank."""
        return own_rank(self.mesh.world_size)

    @cached_property
    def device(self) -> torch.device:
        """Where this process computes, as it was when the weights were placed."""
        tensors = [t for _, t in self.tensors()]
        if any(t.is_meta for t in tensors):
            return torch.device("meta")
        return target_device(tensors)

    def tensors(self) -> Tensors:
        """The model's parameters and buffers, under all their names."""
        model = self.original.get()
        return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]

    # --- making them -----------------------------------------------------------------------------------------------

    def settle(self, placements: Mapping[str, Placements], compiled: Compiled, training: bool) -> None:
        """From now on the weights lie so.

        Args:
            placements: of every parameter and buffer.
            compiled: the first capture.
            training: the mode of the ranks' modules.
        """
        self.placements, self._settled, self._training = placements, True, training
        self._transient = compiled.captured.non_persistent
        if self.mesh.world_size > 1 and not is_one_of_several():  # other ranks are made later
            kept = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for _, t in self.tensors()}
            self._then = {name: kept[id(tensor)] for name, tensor in self.tensors()}

    def of(self, rank: int) -> RankModule:
        """Those of a rank, made on first use and kept.

        Raises:
            MeshError: when the mesh has no such rank.
        """
        self.mesh.coordinate(rank)
        if not self._settled:
            raise not_captured()
        if rank not in self._modules:
            with outside_inference_mode():
                self._make(rank)
        return self._modules[rank]

    @property
    def made(self) -> Collection[int]:
        """The ranks whose parts were asked for."""
        return self._modules.keys()

    def here(self) -> list[RankModule]:
        """Those of the ranks that are this process's: its own, or in simulation all of them."""
        return [self.of(rank) for rank in ((self.rank,) if is_one_of_several() else range(self.mesh.world_size))]

    def _make(self, rank: int) -> None:
        if not self.original.has_values:
            raise FxshardError(
                f"the weights of rank {rank} cannot be made here: the model is gone",
                fix="keep a reference to the model for as long as you simulate other ranks within a real one",
            )
        module = RankModule(rank, self.mesh)
        made: dict[int, Any] = {}
        for name, tensor in self.tensors():
            if id(tensor) not in made:
                whole = self._then.get(name, tensor)
                part = local_part(whole, self.placements[name], self.mesh, rank).to(self.device)
                if isinstance(tensor, nn.Parameter):
                    part = nn.Parameter(part, whole.requires_grad)
                    note_parted(tensor, name)
                made[id(tensor)] = part
                if self.mesh.world_size > 1:
                    layout = Layout(tuple(tensor.shape), self.placements[name], self.mesh, rank)
                    mark_part(made[id(tensor)], layout)
            place(module, name, made[id(tensor)], name not in self._transient)
        module.train(self._training)
        self._modules[rank] = module
        if not is_spread():
            self._seen[rank] = self._states(rank)
        if len(self._modules) == self.mesh.world_size:
            self._then = {}
        watch_optimizers()

    def place_constants(self, compiled: Compiled, rank: int) -> None:
        """Puts the tensors and subgraphs that export lifted out of the code into a rank's module."""
        module = self.of(rank)
        for name in compiled.attributes_of(rank):
            if find(module, name) is None:
                value = find(compiled.root, name)
                local = value.detach().to(self.device) if isinstance(value, torch.Tensor) else value
                place(module, name, local, persistent=False)

    def have_moved(self, captures: list[Compiled]) -> bool:
        """Whether weights without values were given some on a device, where the constants of captures go now, too."""
        part = next(self._modules[self.rank].parameters(), None) if self.rank in self._modules else None
        if part is None or not self.device.type == "meta" != part.device.type:
            return False
        self.device = part.device
        for compiled in captures:
            for rank, module in self._modules.items():
                for name in compiled.attributes_of(rank):
                    if isinstance(found := find(module, name), torch.Tensor) and found.is_meta:
                        place(module, name, find(compiled.root, name).detach().to(self.device), persistent=False)
        return True

    # --- looking at them -------------------------------------------------------------------------------------------

    def check_alike(self) -> None:
        """Raises where the weights of this process's rank were changed since the last time, and no other rank's.

        In simulation ``parameters()`` are those of one rank, and an optimizer over them trains no other.
        """
        if self.mesh.world_size == 1:
            return
        now = {rank: self._states(rank) for rank in range(self.mesh.world_size)}
        before, self._seen = self._seen, now
        changed = {rank: {n for n, a in now[rank].items() if a != before.get(rank, {}).get(n, a)} for rank in now}
        others = set.union(*(names for rank, names in changed.items() if rank != self.rank))
        for name in sorted(changed[self.rank] - others):
            parts = [find(module, name) for module in self._modules.values()]
            whole = not any(is_shard(placed) for placed in self.placements.get(name, ()))
            needs = {part.requires_grad for part in parts}
            if not (whole and len(needs) == 1 and all(torch.equal(parts[0], part) for part in parts[1:])):
                raise InputError(
                    f"the ranks differ: {name} was changed on rank {self.rank}, and on no other",
                    fix="program.parameters() and buffers() are this rank's: in simulation do the same to those of "
                    "program.rank_module(r) for every rank r, and make an optimizer for each",
                )

    def _states(self, rank: int) -> dict[str, Hashable]:
        module = self.of(rank)
        return {n: state_of(p) for n, p in (*module.named_parameters(), *module.named_buffers())}

    def weights(self, captures: list[Compiled], axes: Callable[[], Mapping[str, Axis]], given_mesh: Any) -> Weights:
        """Where each parameter and buffer lies.

        Args:
            captures: of the model; before the first one the weights are the model's own.
            axes: gives this process's axes.
            given_mesh: the ``DeviceMesh`` that the user gave, if any.
        """
        if not captures:
            return Weights.of_module(self.original.get())
        ranks = [self.rank] if is_spread() else range(self.mesh.world_size)
        modules = {rank: self.of(rank) for rank in ranks}
        read = {name: find(each.root, name) for each in captures for name in each.attributes_of(self.rank)}
        lost = tuple(
            name
            for name, value in read.items()
            if name not in self.placements and isinstance(value, torch.Tensor) and value.is_meta
        )
        return Weights(self.original.get(), self.placements, self.mesh, self.rank, modules, axes, given_mesh, lost)

"""A rank's run: the generated code of each capture over this process's axes, and what goes on beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from fxshard.codegen.emit import emit
from fxshard.inspect.fingerprint import fingerprint
from fxshard.mesh import Mesh
from fxshard.parts import Parts
from fxshard.passes.pipeline import Compiled, Options
from fxshard.ranks.agreement import is_spread
from fxshard.ranks.meeting import meet
from fxshard.ranks.watch import current
from fxshard.runtime.autocast import ambient, using
from fxshard.runtime.collectives import Axis, ProcessAxisGroup
from fxshard.runtime.module import find, load
from fxshard.runtime.packs import Ahead, Pack
from fxshard.runtime.process_groups import check_world, checksum, joint_group, process_axes, share_random_state
from fxshard.runtime.regather import Regather
from fxshard.schedule.stored_weights import dim_of
from fxshard.training.buckets import Buckets, Synchronization, defer


class RankRun:
    """Runs the captures of a program on this process's rank.

    Attributes:
        parts: the weights.
        given_mesh: the ``DeviceMesh`` that the user gave, if any.
        options: how the program computes.
        synchronization: whether gradients are summed at the end of a backward pass.
    """

    def __init__(self, parts: Parts, given_mesh: Any, options: Options) -> None:
        self.parts, self.given_mesh, self.options = parts, given_mesh, options
        self.mesh: Mesh = parts.mesh
        self.synchronization = Synchronization()
        self._sources: dict[tuple[int, int], str] = {}
        self._functions: dict[int, Callable[..., Any]] = {}
        self._checksums: dict[str, int] = {}
        self._axes: dict[str, Axis] | None = None
        self._joint: dict[tuple[str, ...], ProcessAxisGroup] = {}
        self._packed: dict[int, dict[str, dict[int, Any]]] = {}
        self._ahead = Ahead()
        self._buckets: list[Buckets] = []
        self._regather = Regather()

    # --- the ranks -------------------------------------------------------------------------------------------------

    @property
    def axes(self) -> dict[str, Axis]:
        """This process's axes; ``DistributedError`` without a process group."""
        if self._axes is None:
            device, dtype = self.parts.device.type, self.options.reduce_dtype
            self._axes = process_axes(self.mesh, self.given_mesh, device, dtype)
            for axis in self._axes.values():
                axis.group.regather = self._regather if self.options.regather else None
        return self._axes

    def joint(self, names: tuple[str, ...]) -> ProcessAxisGroup:
        """The ranks along these axes together; collective where they are new."""
        if names not in self._joint:
            self._joint[names] = joint_group(self.mesh, names, self.axes)
        return self._joint[names]

    def note_weights(self) -> None:
        """What the first comparison of the ranks tells of their weights is what these are now."""
        if self.mesh.world_size > 1 and is_spread():
            self._checksums = {name: checksum(tensor) for name, tensor in self.parts.tensors()}

    def note_loaded(self, names: Iterable[str], given: Mapping[str, Any]) -> None:
        """After these were loaded: the ranks must agree on the whole tensors that each was given, and on no others."""
        for name in self._checksums.keys() & set(names):
            if type(given.get(name)) is torch.Tensor:
                self._checksums[name] = checksum(given[name])
            else:
                del self._checksums[name]

    def compare(self, compiled: Compiled, leaves: list[Any] | None, modes: Mapping[str, bool]) -> None:
        """Raises ``DistributedError`` where other ranks are about to run something else; collective."""
        check_world(self.mesh)
        watch = current()
        if watch is not None:
            sections = fingerprint(compiled, self.parts.original.get(), leaves, self._checksums, modes)
            about = ", ".join(f"{name}: {text}" for name, text in sections["inputs"].items.items())
            meet(watch, sections, f"with {about}")
            self._checksums = {}

    # --- code ------------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """The model's name."""
        return type(self.parts.original.get()).__name__

    def source(self, compiled: Compiled, rank: int) -> str:
        """The Python source that a rank runs, titled for all that run the same."""
        key = id(compiled), rank if compiled.is_uneven else 0
        if key not in self._sources:
            graph = compiled.graph_for(rank, "schedule")
            self._sources[key] = emit(graph, self.mesh.seen_by(rank), self.title, compiled.is_uneven)
        return self._sources[key]

    def function(self, compiled: Compiled, rank: int, axes: Mapping[str, Axis]) -> Callable[..., Any]:
        """The generated forward of a rank, over the given axes: of the rank's module, and the leaves of a call."""
        self.parts.place_constants(compiled, rank)
        where = f"<fxshard {self.title} {id(compiled)} {rank if compiled.is_uneven else 0}>"
        return load(self.source(compiled, rank), axes, self.parts.device, where)

    def forget(self) -> None:
        """The code is loaded anew at the next call."""
        self._functions.clear()

    # --- running ---------------------------------------------------------------------------------------------------

    def knows(self, compiled: Compiled) -> bool:
        """Whether it ran a capture before."""
        return id(compiled) in self._functions

    def __call__(self, compiled: Compiled, leaves: list[Any], finish: Callable[[Any], Any]) -> Any:
        """Runs a capture, after ``compare``; collective.

        Args:
            compiled: the capture.
            leaves: of a call that it serves.
            finish: makes of the leaves of the result what the call returns.
        """
        run = self._functions.get(id(compiled)) or self._begin(compiled)
        if compiled.draws:
            share_random_state(self.mesh, self.parts.device)
        leaves = [x.to(self.parts.device) if isinstance(x, torch.Tensor) else x for x in leaves]
        self._ahead.drop()
        self.synchronization.calls += 1
        for axis, packed in self._packed[id(compiled)].items():
            self.axes[axis].group.packed = packed
        regathers = compiled.regathers and torch.is_grad_enabled()
        if not (regathers or ambient()):
            return finish(run(*leaves))
        saving = self._regather.saving() if regathers else nullcontext()
        with using(()), saving:  # the casts are in the code
            return finish(run(*leaves))

    def _begin(self, compiled: Compiled) -> Callable[..., Any]:
        rank = self.parts.rank
        run = partial(self.function(compiled, rank, self.axes), self.parts.of(rank))
        self._functions[id(compiled)] = run
        self._defer_gradients(compiled)
        self._pack_weights(compiled)
        return run

    @property
    def unsummed(self) -> bool:
        """Whether gradients of ``no_sync`` wait for a backward pass outside of it, which sums them over the ranks."""
        return any(buckets.unsummed for buckets in self._buckets)

    def _defer_gradients(self, compiled: Compiled) -> None:
        """Sums the gradients of whole weights in buckets from now on; collective."""
        if self.mesh.world_size == 1:
            return
        module = self.parts.of(self.parts.rank)
        weights = [(find(module, name), names) for name, names in compiled.varied_weights]
        for _, names in weights:
            self.joint(names)
        size = self.options.bucket_bytes
        self._buckets += defer(weights, self._joint, self.axes, size, self.synchronization)

    def _pack_weights(self, compiled: Compiled) -> None:
        """Gathers small weights together whenever this capture is called."""
        found: dict[str, dict[int, Any]] = {axis: {} for axis in compiled.gathered_over}
        before: dict[str, Pack] = {}
        module = self.parts.of(self.parts.rank)
        for each in compiled.packs:
            weights = [find(module, str(node.all_input_nodes[0].target)) for node in each.nodes]
            axis, dims = str(each.nodes[0].args[1]), [dim_of(node) for node in each.nodes]
            summed = bool(each.nodes[0].kwargs.get("summed"))
            pack = Pack(self.axes[axis], weights, dims, summed, each.lane, self._ahead)
            found[axis].update((id(weight), pack.take) for weight in weights)
            if each.ahead:
                if axis in before:
                    before[axis].next = pack
                before[axis] = pack
        self._packed[id(compiled)] = found

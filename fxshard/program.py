"""The sharded program: an ``nn.Module`` that is called like the model."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from fxshard.cache import cached
from fxshard.capture.capture import LOCK, capture, number_constants
from fxshard.capture.captured import Captured
from fxshard.capture.constants import check_constants, declared
from fxshard.capture.fidelity import check_fidelity
from fxshard.capture.queries import outside_inference_mode
from fxshard.capture.reads import Guard, check_kept, check_unread
from fxshard.capture.serves import Changes, Conditions
from fxshard.capture.tensors import Kinds, check_own_memory, check_same, kinds_of
from fxshard.capture.writes import LOST, check_lost
from fxshard.captures import Captures, Held, check_apart
from fxshard.codegen.emit import emit
from fxshard.compiling import Entry, traced_call
from fxshard.errors import CheckpointError, DistributedError, FxshardError, InputError, SoundnessError
from fxshard.inspect.coverage import Coverage, coverage_of
from fxshard.inspect.fallbacks import Fallback, fallbacks_of
from fxshard.inspect.fingerprint import fingerprint
from fxshard.inspect.report import Collective, collectives_of, explain, notes_of, table
from fxshard.mesh import Mesh
from fxshard.passes.annotate import placements
from fxshard.passes.pipeline import STAGES, Compiled, Options, compile_graph
from fxshard.placement import Placements, is_shard, join_all
from fxshard.plan.plan import Plan
from fxshard.ranks.agreement import is_spread
from fxshard.ranks.devices import target_device
from fxshard.ranks.faults import calling, compared, told_to_others
from fxshard.ranks.meeting import meet
from fxshard.ranks.watch import current
from fxshard.runtime.autocast import ambient, using
from fxshard.runtime.collectives import Axis, ProcessAxisGroup
from fxshard.runtime.module import RankModule, find, joined, load, local_part, place, share, state_of
from fxshard.runtime.packs import Ahead, Pack
from fxshard.runtime.process_groups import check_world, checksum, joint_group, process_axes, share_random_state
from fxshard.runtime.regather import Regather
from fxshard.schedule.stored_weights import dim_of
from fxshard.standing_in import StandIn
from fxshard.torch_internals import SEES_EVERY_APPLY, IncompatibleKeys
from fxshard.training.buckets import Buckets, Synchronization, defer
from fxshard.training.optimizer_state import load_optimizer_state_dict, sharded_optimizer_state_dict
from fxshard.training.optimizers import WholeMatrix, note_parted, watch_optimizers
from fxshard.weights.gathering import gather_whole
from fxshard.weights.layout import Layout, mark_part
from fxshard.weights.loading import KEY, describe_parts, load_state_dict
from fxshard.weights.mirror import mirror
from fxshard.weights.original_model import Original
from fxshard.weights.weights import Weights

logger = logging.getLogger("fxshard")


class ParallelModule(StandIn):
    """A model compiled for a mesh: what ``fxshard.parallelize`` returns.

    Under torchrun each process calls it like the model, with the same whole inputs on every rank, and its parameters
    are this rank's. Without a process group ``fxshard.simulate`` runs all ranks in this process; then the parameters
    that it shows are those of rank 0, and ``rank_module(r)`` gives every other rank's.

    Attributes:
        plan: the plan, explicit once the model was captured.
        mesh: the mesh.
        options: how it computes, beside the plan.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        device_mesh: Any,
        dynamic_shapes: Any,
        options: Options | None = None,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self._asked = plan
        self.plan = plan
        self.mesh: Mesh = plan.mesh
        self._original = Original(model)
        self._device_mesh = device_mesh
        self._dynamic_shapes = dynamic_shapes
        self._cache = cache
        self.options = options or Options()
        self._signature = inspect.signature(model.forward)
        check_constants(self.options.constants, self._signature)
        self._captures = Captures(Changes())
        self._lock = threading.RLock()
        self._latest: Compiled | None = None
        self._kinds: Kinds = {}
        self._ranks: dict[int, RankModule] = {}
        self._then: dict[str, torch.Tensor] = {}
        self._seen: dict[int, dict[str, Hashable]] = {}
        self._sources: dict[tuple[int, int], str] = {}
        self._functions: dict[int, Any] = {}
        self._checksums: dict[str, int] = {}
        self._axes: dict[str, Axis] | None = None
        self._joint: dict[tuple[str, ...], ProcessAxisGroup] = {}
        self._entries: list[Entry] = []
        self._packed: dict[int, dict[str, dict[int, Any]]] = {}
        self._ahead = Ahead()
        self._buckets: list[Buckets] = []
        self._synchronization = Synchronization()
        self._regather = Regather()
        self._placements: dict[str, Placements] = {}
        self.training = model.training
        self._take_signature(model)

    # --- copies ----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """A program of its own, with weights of its own; its first call is collective under torchrun.

        >>> import copy, fxshard
        >>> model, x = nn.Linear(4, 4), torch.randn(2, 4)
        >>> program = fxshard.parallelize(model, fxshard.data_parallel(1), (x,))
        >>> average = copy.deepcopy(program)
        >>> torch.equal(average(x), program(x)), average.weight is program.weight
        (True, False)
        """
        model = self._original.get() if self._shown is not None else copy.deepcopy(self._original.get(), memo)
        made = ParallelModule(model, self._asked, self._device_mesh, self._dynamic_shapes, self.options, self._cache)
        memo[id(self)] = made
        made.__dict__["_original"] = self._original if self._shown is not None else made._original
        changes = made._captures.changes
        changes.attributes = dict(self._captures.changes.attributes)
        made._captures.fixed = self._captures.fixed
        made.__dict__["training"] = self.training
        if self._shown is None:
            changes.modes = dict(self._captures.changes.modes)
            return made
        for held in self._captures.all:
            made._captures.add(held)
        made.plan, made._latest, made._placements = self.plan, self._latest, dict(self._placements)
        made._kinds, made._then = self._kinds, self._then
        made._ranks = {rank: copy.deepcopy(module, memo) for rank, module in self._ranks.items()}
        made._seen = {rank: made._states(rank) for rank in made._ranks}
        made._device = self._device
        made._show(made.rank_module(made.rank))
        for (_, own), (_, mine) in zip(made.named_modules(), self.named_modules(), strict=True):
            if own.training != mine.training:
                own.training = mine.training
        for name, value in self.__dict__.items():
            if name not in made.__dict__:
                made.__dict__[name] = copy.deepcopy(value, memo)
        return made

    # --- capture ---------------------------------------------------------------------------------------------------

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Compiled:
        """Captures and compiles the model for these inputs, unless that was done before: see ``fxshard.captures``.

        Args:
            args: the inputs.
            kwargs: likewise, by name.
        """
        held, _ = self._serving(*self._declared(args, kwargs or {}))
        return held.compiled

    def _declared(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """A call with its declared constants."""
        names = self.options.constants
        return declared(names, self._signature, args, kwargs) if names else (args, kwargs)

    def _serving(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Held, list[Any]]:
        """The capture that serves a call, which becomes the latest, and the call's leaves."""
        model = self._original.get()
        found = self._captures.look_up(args, kwargs, model)
        if found is None:
            with self._lock, LOCK, outside_inference_mode(), self._captures.changes.on(model):
                make = partial(self._capture, model, args, kwargs)
                found = self._captures.find(args, kwargs, model, make)
        if self._latest is not found[0].compiled:
            self._latest = found[0].compiled
        return found

    def _capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], exact: bool) -> Held:
        if self._latest is None:
            check_own_memory(self._tensors())
            self._kinds = kinds_of(self._tensors())
        check_same(kinds_of(self._tensors()), self._kinds)
        shapes = None if exact else self._dynamic_shapes
        device = target_device(()) if self._device.type == "meta" else self._device
        is_there = all(t.device.type == device.type for _, t in self._tensors())
        has_values = self._original.has_values and (is_there or not ambient())

        with_grad = torch.is_grad_enabled()
        guards: tuple[Guard, ...] = ()

        def check(made: Captured, stored: bool) -> bool:
            nonlocal guards
            guards = made.reads.guards(model, self._captures.changes.attributes.keys())
            check_kept(guards)
            backward = stored or with_grad or not SEES_EVERY_APPLY  # whose gradients would be others
            fits = has_values and check_fidelity(model, made, args, kwargs, backward)
            check_unread(guards)
            return fits

        kept = self._cache if shapes is None else None
        make = partial(capture, model, args, kwargs, dynamic_shapes=shapes, device=device)
        captured, seconds = cached(kept, model, args, kwargs, device, make, check)
        settled = self._latest is not None
        if settled:  # a rank's module holds the constants of all captures
            number_constants(captured, len(self._captures.all), self._placements)
        compiled = compile_graph(captured, self._pinned(), model, seconds, self.options, settled)
        placed = self._placed(compiled)
        if settled and placed != self._placements:
            wrong = next(name for name, each in placed.items() if each != self._placements[name])
            raise SoundnessError(
                f"a later capture reads {wrong!r} as {placed[wrong]}, but it lies as {self._placements[wrong]}",
                fix="this is a bug of fxshard: please report the model and the plan",
            )
        for before in self._captures.all:
            check_lost(before.compiled.captured.written, captured.reads)
        leaves = captured.flatten_inputs(args, kwargs)
        conditions = Conditions.of(captured, model, self._captures.changes, leaves, guards)
        held = Held(compiled, conditions, exact)
        self._captures.add(held)
        self._latest = compiled
        if not settled:
            self._placements = placed
            self._settle(compiled)
        self._original.empty([captured.root, compiled.root])
        for note in notes_of(compiled):
            logger.warning(note)
        lost = [joined(each.module, str(each.steps[0])) for each in captured.written if each.value is LOST]
        if lost:
            logger.warning(
                f"what forward assigns to {lost[0]} is lost" + f", and to {len(lost) - 1} more" * (len(lost) > 1)
            )
        for fallback in self.fallbacks():
            logger.warning(str(fallback))
        return held

    def _pinned(self) -> Plan:
        """The plan as asked; after the first capture the weights lie as they lie."""
        if self._latest is None:
            return self._asked
        every = {name: dict(zip(self.mesh.names, placed, strict=True)) for name, placed in self._placements.items()}
        return replace(self._asked, params=every)

    def _settle(self, compiled: Compiled) -> None:
        """After the first capture: the plan is explicit, and this rank's weights exist."""
        self.plan = compiled.resolved.plan
        several = self.mesh.world_size > 1
        if several and dist.is_available() and dist.is_initialized():
            self._checksums = {name: checksum(tensor) for name, tensor in self._tensors()}
        elif several and "RANK" not in os.environ:  # other ranks, made later, hold the weights of this moment
            kept = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for _, t in self._tensors()}
            self._then = {name: kept[id(tensor)] for name, tensor in self._tensors()}
        self._show(self.rank_module(self.rank))
        if is_spread():  # this rank needs its parts only
            self._original.release()

    def _show(self, module: RankModule) -> None:
        """Shows a rank's weights as those of this module, in modules of the model's classes."""
        model, changes = self._original.get(), self._captures.changes
        share(module, self)
        shown = mirror(model, module, changes)
        self.__dict__["_modules"] = dict(shown._modules)
        self.__dict__["_shown"] = shown
        changes.modes = {path: each.training for path, each in model.named_modules()}
        changes.parameters = dict(module.named_parameters(remove_duplicate=False))
        changes.version += 1

    def _placed(self, compiled: Compiled) -> dict[str, Placements]:
        """How a capture takes each parameter and buffer to lie."""
        given = {str(n.target): e for n, e in compiled.resolved.nodes.items() if n.op == "get_attr"}
        aliases = compiled.captured.aliases
        out = {}
        for name, _ in self._tensors():
            asked: Any = given.get(aliases.get(name, name))
            if asked is None:
                asked = compiled.resolved.plan.params.get(name)
            out[name] = placements(asked or {}, self.mesh)
        return out

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        model = self._original.get()
        return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]

    @property
    def compiled(self) -> Compiled:
        """The capture that was used last."""
        if self._latest is None:
            raise FxshardError(
                "the model has not been captured yet",
                fix="pass example inputs to parallelize, or call the program once",
            )
        return self._latest

    # --- ranks -----------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's rank: torch.distributed's, or torchrun's, or 0."""
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank()
        rank = int(os.environ.get("RANK", "0"))
        return rank if rank < self.mesh.world_size else 0

    def rank_module(self, rank: int) -> RankModule:
        """Rank ``rank``'s module: its local weights, made on first use and kept.

        Raises:
            MeshError: when the mesh has no such rank.
        """
        self.mesh.coordinate(rank)
        if rank not in self._ranks:
            with outside_inference_mode():
                self._make_rank(rank)
        return self._ranks[rank]

    @property
    def ranks_made(self) -> Collection[int]:
        """The ranks whose modules were asked for."""
        return self._ranks.keys()

    def _make_rank(self, rank: int) -> None:
        if not self._original.has_values:
            raise FxshardError(
                f"the weights of rank {rank} cannot be made here: the model is gone",
                fix="keep a reference to the model for as long as you simulate other ranks within a real one",
            )
        compiled = self.compiled
        module = RankModule(rank, self.mesh)
        made: dict[int, Any] = {}
        persistent = compiled.captured.non_persistent
        for name, tensor in self._tensors():
            if id(tensor) not in made:
                whole = self._then.get(name, tensor)
                part = local_part(whole, self._placements[name], self.mesh, rank).to(self._device)
                if isinstance(tensor, nn.Parameter):
                    part = nn.Parameter(part, whole.requires_grad)
                    note_parted(tensor, name)
                made[id(tensor)] = part
                if self.mesh.world_size > 1:
                    layout = Layout(tuple(tensor.shape), self._placements[name], self.mesh, rank)
                    mark_part(made[id(tensor)], layout)
            place(module, name, made[id(tensor)], name not in persistent)
        module.train(self.training)
        self._ranks[rank] = module
        if not is_spread():
            self._seen[rank] = self._states(rank)
        if len(self._ranks) == self.mesh.world_size:
            self._then = {}
        watch_optimizers()

    def modules_here(self) -> list[RankModule]:
        """The modules of the ranks that are this process's: its own, or in simulation all of them."""
        is_one = is_spread() or "RANK" in os.environ
        return [self.rank_module(rank) for rank in ((self.rank,) if is_one else range(self.mesh.world_size))]

    @cached_property
    def _device(self) -> torch.device:
        """Where this process computes, as it was when the weights were placed."""
        tensors = [t for _, t in self._tensors()]
        if any(t.is_meta for t in tensors):
            return torch.device("meta")
        return target_device(tensors)

    def code(self, rank: int = 0) -> str:
        """The Python source that rank ``rank`` runs."""
        where = ", ".join(f"{n}={i}" for n, i in zip(self.mesh.names, self.mesh.coordinate(rank), strict=True))
        title = f"{type(self._original.get()).__name__}, rank {rank} of {self.mesh.world_size} ({where})."
        return emit(self.compiled.graph_for(rank, "schedule"), self.mesh.seen_by(rank), title, self.compiled.is_uneven)

    def source(self, compiled: Compiled, rank: int) -> str:
        """The Python source that a rank runs, titled for all that run the same."""
        key = id(compiled), rank if compiled.is_uneven else 0
        if key not in self._sources:
            graph, title = compiled.graph_for(rank, "schedule"), type(self._original.get()).__name__
            self._sources[key] = emit(graph, self.mesh.seen_by(rank), title, compiled.is_uneven)
        return self._sources[key]

    def function(self, compiled: Compiled, rank: int, axes: Mapping[str, Axis]) -> Any:
        """The generated forward of a rank, over the given axes."""
        self.place_constants(compiled, rank)
        where = f"<fxshard {type(self._original.get()).__name__} {id(compiled)} {rank if compiled.is_uneven else 0}>"
        return load(self.source(compiled, rank), axes, self._device, where)

    def place_constants(self, compiled: Compiled, rank: int) -> None:
        """Puts the tensors and subgraphs that export lifted out of the code into a rank's module."""
        module = self.rank_module(rank)
        for name in compiled.attributes_of(rank):
            if find(module, name) is None:
                value = find(compiled.root, name)
                local = value.detach().to(self._device) if isinstance(value, torch.Tensor) else value
                place(module, name, local, persistent=False)

    # --- running ---------------------------------------------------------------------------------------------------

    def compile_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Compiled, list[Any]]:
        """The capture that serves a call, and the call's leaves.

        Raises:
            InputError: when the inputs do not fit what was captured with example inputs.
        """
        held, leaves = self._serving(*self._declared(args, kwargs))
        check_apart(held.compiled, leaves)
        return held.compiled, leaves

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs this rank's part; collective. Give every rank the same whole inputs."""
        return traced_call(self, args, kwargs) if torch.compiler.is_compiling() else self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """``forward``, eagerly."""
        with calling():
            compiled, leaves = self.compile_call(args, kwargs)
            run = self._functions.get(id(compiled))
            if run is None or self.options.compare == "every_call":
                self._compare_ranks(compiled, leaves)
            compared()
            if run is None:
                function, module = self.function(compiled, self.rank, self.axes), self.rank_module(self.rank)
                run = self._functions[id(compiled)] = partial(function, module)
                self._defer_gradients(compiled)
                self._pack_weights(compiled)
            if compiled.draws:
                share_random_state(self.mesh, self._device)
            leaves = [x.to(self._device) if isinstance(x, torch.Tensor) else x for x in leaves]
            self._ahead.drop()
            self._synchronization.calls += 1
            for axis, packed in self._packed[id(compiled)].items():
                self.axes[axis].group.packed = packed
            regathers = compiled.regathers and torch.is_grad_enabled()
            if not (regathers or ambient()):
                return self.finish(compiled, run(*leaves), args, kwargs)
            saving = self._regather.saving() if regathers else nullcontext()
            with using(()), saving:  # the casts are in the code
                return self.finish(compiled, run(*leaves), args, kwargs)

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
            parts = [find(module, name) for module in self._ranks.values()]
            whole = not any(is_shard(placed) for placed in self._placements.get(name, ()))
            needs = {part.requires_grad for part in parts}
            if not (whole and len(needs) == 1 and all(torch.equal(parts[0], part) for part in parts[1:])):
                raise InputError(
                    f"the ranks differ: {name} was changed on rank {self.rank}, and on no other",
                    fix="program.parameters() and buffers() are this rank's: in simulation do the same to those of "
                    "program.rank_module(r) for every rank r, and make an optimizer for each",
                )

    def _states(self, rank: int) -> dict[str, Hashable]:
        module = self.rank_module(rank)
        return {n: state_of(p) for n, p in (*module.named_parameters(), *module.named_buffers())}

    def finish(self, compiled: Compiled, leaves: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a call returns, after what the model does beside: to its attributes, to what it is given."""
        for each in compiled.captured.written:
            if each.value is LOST:
                continue
            self._captures.changes.write(each)
            each.again(self._shown)
        return compiled.captured.unflatten_outputs(leaves, (args, kwargs))

    def _compare_ranks(self, compiled: Compiled, leaves: list[Any] | None) -> None:
        """Raises ``DistributedError`` where other ranks are about to run something else; collective."""
        check_world(self.mesh)
        watch = current()
        if watch is not None:
            modes = self._captures.changes.modes
            sections = fingerprint(compiled, self._original.get(), leaves, self._checksums, modes)
            about = ", ".join(f"{name}: {text}" for name, text in sections["inputs"].items.items())
            meet(watch, sections, f"with {about}")
            self._checksums = {}

    def _defer_gradients(self, compiled: Compiled) -> None:
        """Sums the gradients of whole weights in buckets from now on; collective."""
        if self.mesh.world_size == 1:
            return
        module = self.rank_module(self.rank)
        weights = [(find(module, name), names) for name, names in compiled.varied_weights]
        for _, names in weights:
            self.joint(names)
        size = self.options.bucket_bytes
        self._buckets += defer(weights, self._joint, self.axes, size, self._synchronization)

    def _pack_weights(self, compiled: Compiled) -> None:
        """Gathers small weights together whenever this capture is called."""
        found: dict[str, dict[int, Any]] = {axis: {} for axis in compiled.gathered_over}
        before: dict[str, Pack] = {}
        for each in compiled.packs:
            weights = [find(self.rank_module(self.rank), str(node.all_input_nodes[0].target)) for node in each.nodes]
            axis, dims = str(each.nodes[0].args[1]), [dim_of(node) for node in each.nodes]
            summed = bool(each.nodes[0].kwargs.get("summed"))
            pack = Pack(self.axes[axis], weights, dims, summed, each.lane, self._ahead)
            found[axis].update((id(weight), pack.take) for weight in weights)
            if each.ahead:
                if axis in before:
                    before[axis].next = pack
                before[axis] = pack
        self._packed[id(compiled)] = found

    def joint(self, names: tuple[str, ...]) -> ProcessAxisGroup:
        """The ranks along these axes together; collective where they are new."""
        if names not in self._joint:
            self._joint[names] = joint_group(self.mesh, names, self.axes)
        return self._joint[names]

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, gradients of weights that every rank holds whole are not summed over the ranks.

        For the inner steps of gradient accumulation: the first backward pass outside sums what all of them gave. Until
        then ``.grad`` is each rank's own. Gradients of weights that are stored in parts are summed all the same.

        >>> import fxshard
        >>> model, x = nn.Linear(4, 4), torch.randn(2, 4)
        >>> program = fxshard.parallelize(model, fxshard.data_parallel(1), (x,))
        >>> with program.no_sync():
        ...     program(x).sum().backward()
        >>> program(x).sum().backward()  # the sum of both is in .grad

        Reference: ``torch.nn.parallel.DistributedDataParallel.no_sync``.
        """
        return self._synchronization.hold()

    @property
    def unsummed(self) -> bool:
        """Whether gradients of ``no_sync`` wait for a backward pass outside of it, which sums them over the ranks."""
        return any(buckets.unsummed for buckets in self._buckets)

    def whole_matrix(
        self, optimizer_class: Callable[..., torch.optim.Optimizer], params: Any = None, **options: Any
    ) -> WholeMatrix:
        """An optimizer that steps whole matrices, over parts: Muon, Adafactor, LAMB and the like.

        Such optimizers compute a step from all elements of a matrix, and would be silently wrong over parts. This one
        gathers a parameter, its gradient and its state, makes the step of one device on every rank, and keeps this
        rank's part; its memory is that of the parts. In simulation it steps the parts of all ranks.

        Args:
            optimizer_class: such as ``torch.optim.Muon``.
            params: some of ``program.parameters()``, or groups of them; by default all.
            options: the optimizer's, such as ``lr``.

        >>> import fxshard
        >>> model, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8)
        >>> program = fxshard.parallelize(model, fxshard.zero(2), (x,))
        >>> optimizer = program.whole_matrix(torch.optim.Muon, lr=0.1)
        >>> losses = fxshard.simulate(program, x).backward(lambda y: y.pow(2).mean())
        >>> optimizer.step()

        Reference: Jordan et al., 2024, Muon: an optimizer for hidden layers in neural networks.
        """
        given = self.parameters() if params is None else params
        return WholeMatrix(self._weights(), lambda: self.axes, optimizer_class, given, options)

    # --- state dicts: docs/checkpoints.md --------------------------------------------------------------------------

    @told_to_others
    def full_state_dict(self, rank0_only: bool = False) -> dict[str, Any]:
        """The whole model's state dict, under the original names; collective under torchrun.

        Args:
            rank0_only: only rank 0 gets it, on its CPU, a tensor after the other, and no other rank ever holds a whole
                tensor; the others get an empty dict.
        """
        weights = self._weights()
        if rank0_only:
            return weights.stream_state_dict()
        made: dict[str, Any] = {}
        for name in weights.names:  # tied names share one tensor, as in the model's own state dict
            first = made.get(weights.first_names[name])
            made[name] = self._whole(name, lambda t: t.detach()) if first is None else first
        return weights.in_order(made | weights.extras)

    def sharded_state_dict(self) -> dict[str, Any]:
        """This rank's parts under the original names, as tensors of the whole shape that share their memory.

        A part is a ``DTensor`` where one expresses it, else a ``BlockTensor``, which
        ``torch.distributed.checkpoint`` saves and loads as well; on a mesh of one rank it is a plain tensor.
        """
        return self._weights().sharded_state_dict()

    @told_to_others
    def sharded_optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of an optimizer over ``parameters()``, under their original names; collective under torchrun.

        As ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` gives it for the model.

        Raises:
            CheckpointError: where it keeps state that has no meaning on another mesh.
        """
        return sharded_optimizer_state_dict(self._weights(), optimizer)

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Gives an optimizer what ``sharded_optimizer_state_dict`` returned, of this mesh and plan."""
        load_optimizer_state_dict(self._weights(), optimizer, state)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """This rank's parts, as plain tensors; empty before the model was captured."""
        out: dict[str, Any] = super().state_dict(*args, prefix=prefix, **kwargs)
        metadata = getattr(out, "_metadata", None)
        if self._latest is not None and metadata is not None:
            metadata[prefix[:-1]][KEY] = describe_parts(self._weights())
        return out

    @told_to_others
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> IncompatibleKeys:
        """Loads weights in place; collective under torchrun.

        Before the first capture they are loaded into the model.

        Args:
            state_dict: under the model's own names: whole tensors, of which this rank takes its part; ``DTensor``s of
                any mesh and placement; or what ``state_dict()`` gave on this rank. Where the model is on the meta
                device, this rank's parts get memory.
            strict: whether missing and unexpected names are errors.
            assign: must be False once the model was captured: parts are copied.

        Returns:
            Missing and unexpected names, as ``nn.Module.load_state_dict`` returns them.

        Raises:
            CheckpointError: when the state dict does not fit; everything that does not fit is listed.
        """
        if self._latest is None:
            whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state_dict.items()}
            loaded: IncompatibleKeys = self._original.get().load_state_dict(whole, strict, assign)
            return loaded
        if assign:
            raise CheckpointError("a program's weights are parts, and cannot be assigned", fix="leave assign=True out")
        weights = self._weights()
        out = load_state_dict(weights, state_dict, strict)
        self._loaded([name for name in weights.names if name in state_dict], state_dict)
        return out

    def _weights(self) -> Weights:
        """Where each parameter and buffer lies."""
        if self._latest is None:
            return Weights.of_module(self._original.get())
        ranks = [self.rank] if is_spread() else range(self.mesh.world_size)
        modules = {rank: self.rank_module(rank) for rank in ranks}
        root = self._latest.root
        constants = [name for name in self._latest.attributes_of(self.rank) if name not in self._placements]
        lost = [n for n in constants if isinstance(t := find(root, n), torch.Tensor) and t.is_meta]
        return Weights(
            self._original.get(),
            self._placements,
            self.mesh,
            self.rank,
            modules,
            lambda: self.axes,
            self._device_mesh,
            tuple(lost),
        )

    def _loaded(self, names: Iterable[str], given: Mapping[str, Any] | None = None) -> None:
        """After these were loaded: what the ranks must agree on, and where the parts are now."""
        for name in self._checksums.keys() & set(names):
            value = given[name] if given else None
            if type(value) is torch.Tensor:  # every rank was given one of its own
                self._checksums[name] = checksum(value)
            else:
                del self._checksums[name]
        part = next(iter(self.parameters()), None)
        if part is not None and self._device.type == "meta" != part.device.type:
            self._device = part.device
            self._functions.clear()
            self._entries.clear()
            for compiled in [held.compiled for held in self._captures.all]:
                for rank, module in self._ranks.items():
                    for name in compiled.attributes_of(rank):
                        if isinstance(found := find(module, name), torch.Tensor) and found.is_meta:
                            place(module, name, find(compiled.root, name).detach().to(self._device), persistent=False)

    @told_to_others
    def full_grads(self) -> dict[str, torch.Tensor]:
        """The whole gradients, under the names of ``model.named_parameters()``; collective under torchrun.

        A parameter without a gradient is left out.

        Raises:
            DistributedError: when gradients of ``no_sync`` wait to be summed.
        """
        if self.unsummed:
            raise DistributedError(
                "gradients of no_sync wait to be summed over the ranks",
                fix="run the last backward pass outside of no_sync",
            )
        grads = {n: self._whole(n, lambda t: t.grad) for n, _ in self._original.get().named_parameters()}
        return {name: grad for name, grad in grads.items() if grad is not None}

    def _whole(self, name: str, read: Any) -> torch.Tensor | None:
        placed = self._placements[name] if self._placements else None
        if placed is None:
            return read(dict(self._tensors())[name])  # type: ignore[no-any-return]
        if dist.is_available() and dist.is_initialized() and self.mesh.world_size > 1:
            part = read(find(self.rank_module(self.rank), name))
            return None if part is None else gather_whole(part.detach(), placed, self.mesh, self.axes).clone()
        parts = [read(find(self.rank_module(r), name)) for r in range(self.mesh.world_size)]
        return None if any(p is None for p in parts) else join_all(parts, placed, self.mesh.sizes).clone()

    def placements_of(self, name: str) -> Placements:
        """How a parameter or buffer lies on the mesh: a placement an axis."""
        return self._placements[name]

    def output_placements(self, index: int) -> Placements:
        """How the ``index``-th flat output of the last call lies on the mesh: a placement an axis."""
        return self.compiled.output_placements(index)

    def gather_output(self, output: torch.Tensor, index: int) -> torch.Tensor:
        """The ``index``-th flat output of the last call, whole; collective where the plan left it split."""
        return gather_whole(output, self.compiled.output_placements(index), self.mesh, self.axes)

    @property
    def axes(self) -> dict[str, Axis]:
        """This process's axes; ``DistributedError`` without a process group."""
        if self._axes is None:
            self._axes = process_axes(self.mesh, self._device_mesh, self._device.type, self.options.reduce_dtype)
            for axis in self._axes.values():
                axis.group.regather = self._regather if self.options.regather else None
        return self._axes

    # --- seeing ----------------------------------------------------------------------------------------------------

    @property
    def graph_module(self) -> fx.GraphModule:
        """The final graph, over this rank's weights, for reading; names that are none in Python get others."""
        return self.compiled.root.over(self.graph_after("optimize")).as_graph_module()

    def graph_after(self, stage: str) -> fx.Graph:
        """The graph after a stage of the pipeline: see ``fxshard.passes.pipeline.STAGES``."""
        if stage not in self.compiled.stages:
            raise ValueError(f"there is no stage {stage!r}; the stages are {', '.join(STAGES)}")
        return self.compiled.stages[stage]

    def collectives(self) -> list[Collective]:
        """Every collective of one step, forward and backward, in order."""
        return collectives_of(self.compiled)

    def fallbacks(self) -> list[Fallback]:
        """The calls whose operands are gathered because their operator has no rule."""
        return fallbacks_of(self.compiled)

    def coverage(self) -> Coverage:
        """How much of the weights is split, and why the rest is whole on every rank: print it.

        >>> import fxshard
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.Linear(8, 1))
        >>> print(fxshard.parallelize(model, fxshard.tensor_parallel(2), (torch.randn(4, 8),)).coverage())
        98.5% of the bytes of matrices are split (2,048 of 2,080)
        <BLANKLINE>
        whole on every rank      shape    bytes  why
        ---------------------  -------  -------  ------------------------------------
        3.weight                   1x8       32  small, and in no column and row pair
        """
        model = self._original.get()
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        return coverage_of(self.compiled, tensors, self._placements, self._asked.presets)

    def print_tabular(self, file: Any = None) -> None:
        """Prints the program, an operator a line: module, placements, local shape, collective, bytes."""
        print(table(self.compiled), file=file)

    def explain(self) -> str:
        """Every collective, its size, where it comes from, and why it is there."""
        return explain(self.compiled)

"""The sharded program: an ``nn.Module`` that is called like the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from fxshard.capture.writes import LOST
from fxshard.captures import Captures, check_apart, title_of, weights_lie
from fxshard.codegen.emit import emit
from fxshard.compiling import Entry, traced_call
from fxshard.errors import CheckpointError, DistributedError, InputError
from fxshard.inspect.coverage import Coverage, coverage_of
from fxshard.inspect.fallbacks import Fallback, fallbacks_of
from fxshard.inspect.report import Collective, collectives_of, explain, table
from fxshard.mesh import Mesh
from fxshard.parts import Parts, not_captured
from fxshard.passes.pipeline import STAGES, Compiled, Options
from fxshard.placement import Placements
from fxshard.plan.plan import Plan
from fxshard.rank_run import RankRun
from fxshard.ranks.agreement import is_spread
from fxshard.ranks.faults import calling, compared, told_to_others
from fxshard.runtime.collectives import Axis, ProcessAxisGroup
from fxshard.runtime.module import RankModule, share
from fxshard.standing_in import StandIn
from fxshard.torch_internals import IncompatibleKeys
from fxshard.training.optimizer_state import load_optimizer_state_dict, sharded_optimizer_state_dict
from fxshard.training.optimizers import WholeMatrix
from fxshard.weights.gathering import gather_whole
from fxshard.weights.loading import KEY, describe_parts, load_state_dict
from fxshard.weights.mirror import mirror
from fxshard.weights.original_model import Original
from fxshard.weights.weights import Weights


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
        self.plan = plan
        self.mesh: Mesh = plan.mesh
        self.options = options or Options()
        self._original = Original(model)
        self._parts = Parts(self._original, plan.mesh)
        self._captures = Captures(plan, self._parts, self.options, dynamic_shapes, cache)
        self._run = RankRun(self._parts, device_mesh, self.options)
        self._entries: list[Entry] = []
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
        settled = self._shown is not None
        model = self._original.get() if settled else copy.deepcopy(self._original.get(), memo)
        made = ParallelModule(model, self._captures.asked, self._run.given_mesh, None, self.options)
        memo[id(self)] = made
        if settled:
            made.__dict__["_original"] = self._original
            made._parts = self._parts.copied(memo)
            made._run = RankRun(made._parts, self._run.given_mesh, self.options)
        made._captures = self._captures.copied(made._parts)
        made.__dict__["training"] = self.training
        if not settled:
            return made
        made.plan = self.plan
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
        return self._captures.serving(args, kwargs or {}, self._settle)[0]

    def _settle(self, compiled: Compiled) -> None:
        """After the first capture: the plan is explicit, and this rank's weights exist."""
        self.plan = compiled.resolved.plan
        self._run.note_weights()
        self._parts.settle(weights_lie(compiled, [name for name, _ in self._parts.tensors()]), compiled, self.training)
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

    # --- ranks -----------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This process's rank: torch.distributed's, or torchrun's, or 0."""
        return self._parts.rank

    @property
    def computes_on(self) -> torch.device:
        """Where this process computes."""
        return self._parts.device

    @property
    def ranks_made(self) -> Collection[int]:
        """The ranks whose modules were asked for."""
        return self._parts.made

    def modules_here(self) -> list[RankModule]:
        """The modules of the ranks that are this process's: its own, or in simulation all of them."""
        return self._parts.here()

    def rank_module(self, rank: int) -> RankModule:
        """Rank ``rank``'s module: its local weights, made on first use and kept.

        Raises:
            MeshError: when the mesh has no such rank.
        """
        return self._parts.of(rank)

    # --- running ---------------------------------------------------------------------------------------------------

    def compile_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Compiled, list[Any]]:
        """The capture that serves a call, and the call's leaves.

        Raises:
            InputError: when the inputs do not fit what was captured with example inputs.
        """
        compiled, leaves = self._captures.serving(args, kwargs, self._settle)
        check_apart(compiled, leaves)
        return compiled, leaves

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs this rank's part; collective. Give every rank the same whole inputs."""
        return traced_call(self, args, kwargs) if torch.compiler.is_compiling() else self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """``forward``, eagerly."""
        with calling():
            compiled, leaves = self.compile_call(args, kwargs)
            if not self._run.knows(compiled) or self.options.compare == "every_call":
                self.compare_ranks(compiled, leaves)
            compared()
            return self._run(compiled, leaves, lambda out: self.finish(compiled, out, args, kwargs))

    def compare_ranks(self, compiled: Compiled, leaves: list[Any] | None) -> None:
        """Raises ``DistributedError`` where other ranks are about to run something else; collective."""
        self._run.compare(compiled, leaves, self._captures.changes.modes)

    def check_alike(self) -> None:
        """Raises where the weights of this process's rank were changed since the last time, and no other rank's."""
        self._parts.check_alike()

    def source(self, compiled: Compiled, rank: int) -> str:
        """The Python source that a rank runs, titled for all that run the same."""
        return self._run.source(compiled, rank)

    def function(self, compiled: Compiled, rank: int, axes: Mapping[str, Axis]) -> Any:
        """The generated forward of a rank, over the given axes."""
        return self._run.function(compiled, rank, axes)

    def place_constants(self, compiled: Compiled, rank: int) -> None:
        """Puts the tensors and subgraphs that export lifted out of the code into a rank's module."""
        self._parts.place_constants(compiled, rank)

    def joint(self, names: tuple[str, ...]) -> ProcessAxisGroup:
        """The ranks along these axes together; collective where they are new."""
        return self._run.joint(names)

    def finish(self, compiled: Compiled, leaves: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What a call returns, after what the model does beside: to its attributes, to what it is given."""
        for each in compiled.captured.written:
            if each.value is LOST:
                continue
            self._captures.changes.write(each)
            each.again(self._shown)
        return compiled.captured.unflatten_outputs(leaves, (args, kwargs))

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
        return self._run.synchronization.hold()

    @property
    def unsummed(self) -> bool:
        """Whether gradients of ``no_sync`` wait for a backward pass outside of it, which sums them over the ranks."""
        return self._run.unsummed

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
        return WholeMatrix(self.weights_here(), lambda: self.axes, optimizer_class, given, options)

    # --- state dicts: docs/checkpoints.md --------------------------------------------------------------------------

    @told_to_others
    def full_state_dict(self, rank0_only: bool = False) -> dict[str, Any]:
        """The whole model's state dict, under the original names; collective under torchrun.

        Args:
            rank0_only: only rank 0 gets it, on its CPU, a tensor after the other, and no other rank ever holds a whole
                tensor; the others get an empty dict.
        """
        weights = self.weights_here()
        return weights.stream_state_dict() if rank0_only else weights.full_state_dict()

    def sharded_state_dict(self) -> dict[str, Any]:
        """This rank's parts under the original names, as tensors of the whole shape that share their memory.

        A part is a ``DTensor`` where one expresses it, else a ``BlockTensor``, which
        ``torch.distributed.checkpoint`` saves and loads as well; on a mesh of one rank it is a plain tensor.
        """
        return self.weights_here().sharded_state_dict()

    @told_to_others
    def sharded_optimizer_state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state of an optimizer over ``parameters()``, under their original names; collective under torchrun.

        As ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`` gives it for the model.

        Raises:
            CheckpointError: where it keeps state that has no meaning on another mesh.
        """
        return sharded_optimizer_state_dict(self.weights_here(), optimizer)

    def load_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Gives an optimizer what ``sharded_optimizer_state_dict`` returned, of this mesh and plan."""
        load_optimizer_state_dict(self.weights_here(), optimizer, state)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """This rank's parts, as plain tensors; empty before the model was captured."""
        out: dict[str, Any] = super().state_dict(*args, prefix=prefix, **kwargs)
        metadata = getattr(out, "_metadata", None)
        if self._shown is not None and metadata is not None:
            metadata[prefix[:-1]][KEY] = describe_parts(self.weights_here())
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
        if self._shown is None:
            whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state_dict.items()}
            loaded: IncompatibleKeys = self._original.get().load_state_dict(whole, strict, assign)
            return loaded
        if assign:
            raise CheckpointError("a program's weights are parts, and cannot be assigned", fix="leave assign=True out")
        weights = self.weights_here()
        out = load_state_dict(weights, state_dict, strict)
        self.note_loaded([name for name in weights.names if name in state_dict], state_dict)
        return out

    def weights_here(self) -> Weights:
        """Where each parameter and buffer lies."""
        return self._parts.weights(self._captures.compiled, lambda: self.axes, self._run.given_mesh)

    def note_loaded(self, names: Iterable[str], given: Mapping[str, Any] | None = None) -> None:
        """After weights were loaded: what the ranks must agree on, and where the parts are now.

        Args:
            names: of the weights.
            given: whole tensors that every rank was given, by name.
        """
        self._run.note_loaded(names, given or {})
        if self._parts.have_moved(self._captures.compiled):
            self._run.forget()
            self._entries.clear()

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
        return self.weights_here().full_grads()

    def placements_of(self, name: str) -> Placements:
        """How a parameter or buffer lies on the mesh: a placement an axis."""
        return self._parts.placements[name]

    def output_placements(self, index: int, capture: int | None = None) -> Placements:
        """How the ``index``-th flat output lies on the mesh: a placement an axis.

        Args:
            index: of the output.
            capture: of which capture: a place in ``captures``.

        Raises:
            InputError: when the captures differ in it, and none was named.
        """
        if capture is not None:
            return self.capture_at(capture).output_placements(index)
        self.capture_at()
        found = {each.output_placements(index) for each in self._captures.compiled if each.has_output(index)}
        if not found:
            raise InputError(
                f"the program has no tensor as output {index}",
                fix="give a place among the flat outputs that are tensors",
            )
        if len(found) > 1:
            raise InputError(
                f"output {index} lies differently in each capture of the program: {', '.join(sorted(map(str, found)))}",
                fix="say which capture it is of: capture=0 is the first of program.captures",
            )
        return found.pop()

    def gather_output(self, output: torch.Tensor, index: int, capture: int | None = None) -> torch.Tensor:
        """The ``index``-th flat output, whole; collective where the plan left it split.

        Args:
            output: this rank's part.
            index: of the output.
            capture: that gave it: a place in ``captures``; it need not be told where all split it alike.
        """
        return gather_whole(output, self.output_placements(index, capture), self.mesh, self.axes)

    @property
    def axes(self) -> dict[str, Axis]:
        """This process's axes; ``DistributedError`` without a process group."""
        return self._run.axes

    # --- seeing ----------------------------------------------------------------------------------------------------

    @property
    def captures(self) -> tuple[str, ...]:
        """What the program was captured for, in order; what shows a program takes a place in it as ``capture``.

        >>> import fxshard
        >>> model, x = nn.Linear(4, 4), torch.randn(2, 4)
        >>> program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (x,))
        >>> run = fxshard.simulate(program.eval(), x)
        >>> program.captures
        ('train, input: float32[2, 4]', 'eval, input: float32[2, 4]')
        """
        return tuple(map(title_of, self._captures.all))

    def capture_at(self, capture: int | None = None) -> Compiled:
        """A capture, compiled; the first one, where none is named.

        Raises:
            FxshardError: when the model was not captured yet.
            InputError: when there is no such capture.
        """
        return self._captures.compiled[self._place_of(capture)]

    def _place_of(self, capture: int | None) -> int:
        count = len(self._captures.all)
        if not count:
            raise not_captured()
        if not 0 <= (capture or 0) < count:
            raise InputError(
                f"there is no capture {capture}: there are {count}",
                fix="give 0 for the first of program.captures, 1 for the next",
            )
        return capture or 0

    @property
    def compiled(self) -> Compiled:
        """The first capture, compiled."""
        return self.capture_at()

    def _shown_as(self, capture: int | None) -> str:
        """Which capture is shown, where there are several."""
        at, titles = self._place_of(capture), self.captures
        return f"capture {at} of {len(titles)}: {titles[at]}" if len(titles) > 1 else ""

    def code(self, rank: int = 0, capture: int | None = None) -> str:
        """The Python source that a rank runs.

        Args:
            rank: a rank of the mesh.
            capture: which one: a place in ``captures``, by default the first.
        """
        compiled, mesh = self.capture_at(capture), self.mesh
        where = ", ".join(f"{name}={i}" for name, i in zip(mesh.names, mesh.coordinate(rank), strict=True))
        title = f"{self._run.title}, rank {rank} of {mesh.world_size} ({where})."
        which = self._shown_as(capture)
        title += f" {which[0].upper()}{which[1:]}." if which else ""
        return emit(compiled.graph_for(rank, "schedule"), mesh.seen_by(rank), title, compiled.is_uneven)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The final graph of the first capture, over this rank's weights, for reading; names that are none in Python
        get others.
        """
        return self.capture_at().root.over(self.graph_after("optimize")).as_graph_module()

    def graph_after(self, stage: str, capture: int | None = None) -> fx.Graph:
        """The graph after a stage of the pipeline: see ``fxshard.passes.pipeline.STAGES``."""
        stages = self.capture_at(capture).stages
        if stage not in stages:
            raise ValueError(f"there is no stage {stage!r}; the stages are {', '.join(STAGES)}")
        return stages[stage]

    def collectives(self, capture: int | None = None) -> list[Collective]:
        """Every collective of one step, forward and backward, in order."""
        return collectives_of(self.capture_at(capture))

    def fallbacks(self, capture: int | None = None) -> list[Fallback]:
        """The calls whose operands are gathered because their operator has no rule."""
        return fallbacks_of(self.capture_at(capture))

    def coverage(self, capture: int | None = None) -> Coverage:
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
        presets = self._captures.asked.presets
        return coverage_of(self.capture_at(capture), tensors, self._parts.placements, presets)

    def print_tabular(self, file: Any = None, capture: int | None = None) -> None:
        """Prints the program, an operator a line: module, placements, local shape, collective, bytes.

        Args:
            file: where to, by default the standard output.
            capture: which one: a place in ``captures``, by default the first.
        """
        shown = self._shown_as(capture)
        print(*[shown, ""] if shown else (), table(self.capture_at(capture)), sep="\n", file=file)

    def explain(self, capture: int | None = None) -> str:
        """Every collective, its size, where it comes from, and why it is there.

        Args:
            capture: which one: a place in ``captures``, by default the first.
        """
        shown = self._shown_as(capture)
        return "\n\n".join([*[shown] * bool(shown), explain(self.capture_at(capture))])

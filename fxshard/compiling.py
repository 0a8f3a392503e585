"""``torch.compile`` over a program: the way through it that dynamo traces.

On the eager way through a program stands much that no graph holds: the ranks compare what they run, a capture is looked
for, gradients go to buckets as a side effect of the backward pass. None of that is on this way. For each capture there
is an ``Entry``, made when a call is traced first, which knows in plain numbers which calls it serves. What is traced is
the generated code, over axes that issue functional collectives (``runtime.traced``), and with the weights whose
gradients are summed as inputs (``codegen.lift``).

What cannot be traced runs eagerly, behind a break of the graph. With ``fullgraph=True`` torch raises the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from fxshard.capture.binding import Binding
from fxshard.capture.writes import LOST
from fxshard.captures import Captures
from fxshard.codegen.emit import emit
from fxshard.codegen.lift import Lifted, lift
from fxshard.errors import CaptureError
from fxshard.mesh import Mesh
from fxshard.passes.pipeline import Compiled
from fxshard.rank_run import RankRun
from fxshard.ranks.faults import calling, compared
from fxshard.runtime.autocast import ambient
from fxshard.runtime.collectives import Axis, ProcessAxisGroup
from fxshard.runtime.module import find, load_builder
from fxshard.runtime.ring import ring_attention
from fxshard.runtime.traced import TracedGroup, VaryTogether
from fxshard.torch_internals import no_modes, pytree
from fxshard.weights.original_model import Original


class Program(Protocol):
    """What this way needs of a program: see ``fxshard.program.ParallelModule``."""

    mesh: Mesh
    _captures: Captures
    _entries: list[Entry]
    _run: RankRun
    _original: Original

    @property
    def computes_on(self) -> torch.device:
        """Where this process computes."""

    @property
    def axes(self) -> dict[str, Axis]:
        """This process's axes."""

    @property
    def rank(self) -> int:
        """This process's rank."""

    def joint(self, names: tuple[str, ...]) -> ProcessAxisGroup:
        """The ranks along several axes."""

    def place_constants(self, compiled: Compiled, rank: int) -> None:
        """Puts constants into a rank's module."""

    def rank_module(self, rank: int) -> torch.nn.Module:
        """A rank's weights."""

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call, eagerly."""

    def compare_ranks(self, compiled: Compiled, leaves: list[Any] | None) -> None:
        """Raises where other ranks are about to run something else."""


NEW, HELD, LAZY = "new", "held", "lazy"
DRAWS, UNEVEN, RING, EVERY_CALL, STARRED, EFFECTS = "draws", "uneven", "ring", "every_call", "starred", "effects"
ALWAYS_DRAWS, BRANCHES = "always_draws", "branches"

REASONS = {
    NEW: "fxshard has not captured such inputs in this mode. Call the program once with them, outside of torch.compile",
    HELD: "fxshard sums gradients in the compiled backward pass: within no_sync call the program itself",
    LAZY: "fxshard compiles a program that was given example inputs: pass args or kwargs to parallelize",
    DRAWS: "the program draws random numbers, which compiled code draws otherwise on each rank: use eval()",
    ALWAYS_DRAWS: "the program draws random numbers, in eval() too, which compiled code draws otherwise on each rank",
    BRANCHES: "the model decides by values what it computes (a layer that is dropped, an if on a tensor)",
    UNEVEN: "the ranks' parts differ in size, so each rank would compile another graph: choose sizes that divide",
    RING: "ring attention passes blocks from rank to rank while it computes, which has no functional collective",
    EVERY_CALL: "compare='every_call' compares the ranks outside of the graph: give 'first_call'",
    EFFECTS: "the model changes its attributes, or the containers that it is given, which no graph does",
    STARRED: "the model's forward takes *args, which compiled code does not bind",
}
"""Why a call runs eagerly, as torch tells it."""


class Entry:
    """A capture as compiled code finds and runs it: what dynamo reads of it are plain numbers, strings and modules.

    Attributes:
        serves: whether it serves calls in the present state of the program: see ``fxshard.captures``.
        autocast: the autocast that surrounded it.
        obstacle: why it cannot be traced, a key of ``REASONS``; empty where it can.
        binding: which calls it serves.
        out_spec: the tree of what the model returns.
        constants: outputs that no graph holds: their places and values.
        run: the generated code.
        lifted: the weights that are inputs of the code: the module that holds each, and its name there.
        buckets: the weights whose gradients are summed together: the groups, and places in ``lifted``.
        device: where the program computes.
    """

    def __init__(self, program: Program, compiled: Compiled) -> None:
        captured = compiled.captured
        self.compiled = compiled
        self.serves, self.autocast = True, captured.autocast
        self.binding = Binding(captured, compiled.multiples)
        self.obstacle = STARRED if self.binding.starred else obstacle(compiled)
        self.out_spec = captured.out_spec
        self.constants = tuple(captured.output_constants.items())
        self.device = program.computes_on
        self.lifted: tuple[tuple[dict[str, Any], str], ...] = ()
        self.buckets: tuple[tuple[TracedGroup, tuple[int, ...]], ...] = ()
        if not self.obstacle:
            self._load(program)

    def _load(self, program: Program) -> None:
        """The generated code, over this rank's weights and axes that can be traced."""
        rank, compiled = program.rank, self.compiled
        title = f"{type(program._original.get()).__name__}, compiled"
        graph, lifted = lift(compiled.graph_for(rank))
        source = emit(graph, program.mesh.seen_by(rank), title)
        axes = {name: replace(axis, group=TracedGroup(program.joint((name,)))) for name, axis in program.axes.items()}
        program.place_constants(compiled, rank)
        module = program.rank_module(rank)
        self.run = load_builder(source, axes, self.device, f"<fxshard {title} {id(compiled)}>")(module)
        self.lifted = tuple(_holder(module, each.name) for each in lifted)
        weights = [find(module, each.name) for each in lifted]
        self.buckets = tuple(
            (TracedGroup(program.joint(names)), places)
            for names, places in in_buckets(lifted, weights, compiled.options.bucket_bytes)
        )

    def weights(self) -> list[torch.Tensor]:
        """The weights that are inputs of the code, as it reads them."""
        weights = [owner[name] for owner, name in self.lifted]
        if torch.is_grad_enabled():
            for group, places in self.buckets:
                trained = [i for i in places if weights[i].requires_grad]
                varied = VaryTogether.apply(group, *[weights[i] for i in trained])  # type: ignore[no-untyped-call]
                for i, each in zip(trained, varied, strict=True):
                    weights[i] = each
        return weights

    def __call__(self, leaves: list[Any]) -> Any:
        """Runs the code."""
        given = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in leaves]
        out = list(self._without_autocast(given) if self.autocast else self.run(*given, *self.weights()))
        if torch.compiler.is_exporting():  # which records none of our gradients: its graph must not have any
            out = [x.detach() if isinstance(x, torch.Tensor) else x for x in out]
        for place, value in self.constants:
            out[place] = value
        return pytree.tree_unflatten(out, self.out_spec)

    def _without_autocast(self, leaves: list[Any]) -> tuple[Any, ...]:
        """The casts are in the code."""
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return self.run(*leaves, *self.weights())


def obstacle(compiled: Compiled) -> str:
    """Why a capture cannot be traced, a key of ``REASONS``; empty where it can."""
    found = {
        BRANCHES: compiled.has_branches,
        DRAWS: compiled.computes_with_draws and compiled.captured.training,
        ALWAYS_DRAWS: compiled.computes_with_draws,
        UNEVEN: compiled.is_uneven,
        RING: any(node.target is ring_attention for node in compiled.graph.nodes),
        EVERY_CALL: compiled.options.compare == "every_call",
        EFFECTS: any(w.value is not LOST for w in compiled.captured.written) or compiled.captured.changes_inputs,
    }
    return next((reason for reason, is_so in found.items() if is_so), "")


def in_buckets(
    lifted: Sequence[Lifted], weights: Sequence[torch.Tensor], bucket_bytes: int
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Which gradients are summed together, those first that the backward pass gives first.

    Returns:
        The mesh axes of each sum, and the places of its weights.

    >>> weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    >>> in_buckets([Lifted(name, ("dp",)) for name in "abc"], weights, 32)
    [(('dp',), (2, 1)), (('dp',), (0,))]
    """
    out: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    last: dict[Any, int] = {}  # what must be alike -> the bucket that is being filled
    filled: dict[int, int] = {}
    for place in reversed(range(len(lifted))):
        weight = weights[place]
        key = lifted[place].axes, weight.dtype, weight.device
        num_bytes = weight.numel() * weight.element_size()
        at = last.get(key)
        if at is None or filled[at] + num_bytes > bucket_bytes:
            at = last[key] = len(out)
            filled[at] = 0
            out.append((lifted[place].axes, ()))
        out[at] = out[at][0], (*out[at][1], place)
        filled[at] += num_bytes
    return out


def _holder(module: torch.nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, last = name.rpartition(".")
    owner = find(module, path) if path else module
    return owner._parameters, last


# --- what is called -------------------------------------------------------------------------------------------------


def traced_call(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of the program, while a tracer looks on."""
    why = NEW if program._captures.fixed else LAZY
    if program._run.synchronization.held:
        why = HELD
    if why == NEW and program._captures.changes.version >= 0:  # on which the tracer then guards
        make_entries(program)
        for entry in reversed(program._entries):
            if entry.serves and entry.autocast == ambient():
                leaves = entry.binding.leaves_of(args, kwargs)
                if leaves is not None:
                    if not entry.obstacle:
                        return entry(leaves)
                    why = entry.obstacle
                    break
    if torch.compiler.is_exporting():
        raise CaptureError(f"this program cannot be exported: {REASONS[why]}")
    return EAGERLY[why](program, args, kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def make_entries(program: Program) -> bool:
    """Makes what is missing; collective where it is. Dynamo does not trace this: it calls it, once a graph."""
    known = {id(entry.compiled) for entry in program._entries}
    model, captures = program._original.get(), program._captures
    with captures.changes.on(model):
        serving = {id(held.compiled) for held in captures.all if held.conditions.hold(model, captures.changes)}
    for entry in program._entries:
        entry.serves = id(entry.compiled) in serving
    for compiled in [held.compiled for held in captures.all if id(held.compiled) in serving]:
        if id(compiled) not in known:
            with calling(), no_modes():  # export is in the middle of tracing
                if not program._run.knows(compiled):
                    program.compare_ranks(compiled, None)
                compared()
                program._entries.append(Entry(program, compiled))
    return True


def _eagerly(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = program.run(args, kwargs)
    if program._captures.fixed:
        make_entries(program)  # of what was captured just now; the next call is traced anew, and finds it
    return out


EAGERLY = {why: torch.compiler.disable(_eagerly, reason=text) for why, text in REASONS.items()}

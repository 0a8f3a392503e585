"""``torch.compile`` over a program: the way through it that dynamo traces.

On the eager way through a program stands much that no graph holds: ranks compare what they run, a capture is looked for,
gradients go to buckets as a side effect of the backward pass. None of it is on this way. For each capture there is an
``Entry``, made when the first call is traced, which knows in plain numbers which calls it serves. What is traced is the
generated code, over axes that issue functional collectives (``runtime.traced``), and with the weights whose gradients
are summed as inputs (``passes.lift``).

What cannot be traced runs eagerly, behind a break of the graph. With ``fullgraph=True`` torch raises the reason.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch

from fxshard.codegen.emit import emit
from fxshard.passes.lift import Lifted, lift
from fxshard.passes.pipeline import Compiled
from fxshard.runtime.autocast import ambient
from fxshard.runtime.faults import calling, compared
from fxshard.runtime.module import find, load_builder
from fxshard.runtime.ring import ring_attention
from fxshard.runtime.traced import TracedGroup, VaryTogether
from fxshard.torch_internals import print_python, pytree

if TYPE_CHECKING:
    from fxshard.program import ParallelModule

NEW, HELD, LAZY = "new", "held", "lazy"
DRAWS, UNEVEN, RING, EVERY_CALL, STARRED = "draws", "uneven", "ring", "every_call", "starred"

REASONS = {
    NEW: "fxshard has not captured such inputs in this mode. Call the program once with them, outside of torch.compile",
    HELD: "fxshard sums gradients in the compiled backward pass: within no_sync call the program itself",
    LAZY: "fxshard compiles a program that was given example inputs: pass args or kwargs to parallelize",
    DRAWS: "the program draws random numbers, which compiled code draws otherwise on each rank: use eval(), or dropout 0",
    UNEVEN: "the ranks' parts differ in size, so each rank would compile another graph: choose sizes that divide",
    RING: "ring attention passes blocks from rank to rank while it computes, which has no functional collective",
    EVERY_CALL: "compare='every_call' compares the ranks outside of the graph: give 'first_call'",
    STARRED: "the model's forward takes *args, which compiled code does not bind",
}
"""Why a call runs eagerly, as torch tells it."""


class Entry:
    """A capture as compiled code finds and runs it: what dynamo reads of it are plain numbers, strings and modules.

    Attributes:
        training: the capture's mode.
        autocast: the autocast that surrounded it.
        obstacle: why it cannot be traced, a key of ``REASONS``; empty where it can.
        parameters: of the model's ``forward``: its name, whether it is given by position only, whether it is left out
            of a call that gives None.
        names: those that may be given by position.
        in_spec: the tree of a call.
        out_spec: the tree of what the model returns.
        constants: outputs that no graph holds: their places and values.
        expected: of each input leaf the dtype and the sizes, a dynamic one by its name, else the value.
        holds: whether the capture serves these dynamic sizes.
        run: the generated code.
        lifted: the weights that are inputs of the code: the module that holds each, and its name there.
        buckets: the weights whose gradients are summed together: the groups, and places in ``lifted``.
        device: where the program computes.
    """

    def __init__(self, program: ParallelModule, compiled: Compiled) -> None:
        captured = compiled.captured
        self.compiled = compiled
        self.training, self.autocast = captured.training, captured.autocast
        self.obstacle = obstacle(compiled)
        parameters = captured.signature.parameters
        kinds = inspect.Parameter
        self.parameters = tuple(
            (name, p.kind is kinds.POSITIONAL_ONLY, p.default is None)
            for name, p in parameters.items()
            if p.kind is not kinds.VAR_KEYWORD
        )
        by_position = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        self.names = tuple(name for name, p in parameters.items() if p.kind in by_position)
        self.in_spec, self.out_spec = captured.in_spec, captured.out_spec
        self.constants = tuple(captured.output_constants.items())
        self.expected, self.holds = expectations(compiled)
        self.device = program._device
        self.lifted: tuple[tuple[dict[str, Any], str], ...] = ()
        self.buckets: tuple[tuple[TracedGroup, tuple[int, ...]], ...] = ()
        if not self.obstacle:
            self._load(program)

    def _load(self, program: ParallelModule) -> None:
        """The generated code, over this rank's weights and axes that can be traced."""
        rank, compiled = program.rank, self.compiled
        title = f"{type(program._model[0]).__name__}, compiled"
        graph, lifted = lift(compiled.graph_for(rank))
        source = emit(graph, program.mesh.seen_by(rank), title)
        axes = {name: replace(axis, group=TracedGroup(axis.group)) for name, axis in program.axes.items()}
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
                varied = VaryTogether.apply(group, *[weights[i] for i in places])
                for i, each in zip(places, varied, strict=True):
                    weights[i] = each
        return weights

    def leaves_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The leaves of a call that the capture serves; None of any other."""
        named = dict(zip(self.names, args, strict=False))
        named.update(kwargs)
        if len(args) > len(self.names) or len(named) != len(args) + len(kwargs):
            return None
        positional, rest = [], {}
        for name, only, optional in self.parameters:
            if name in named:
                value = named.pop(name)
                if only:
                    positional.append(value)
                elif not (optional and value is None):
                    rest[name] = value
        for name in sorted(named):
            rest[name] = named[name]
        leaves, spec = pytree.tree_flatten((tuple(positional), rest))
        return leaves if spec == self.in_spec and self._fits(leaves) else None

    def _fits(self, leaves: list[Any]) -> bool:
        sizes: dict[str, Any] = {}
        for leaf, (dtype, want) in zip(leaves, self.expected, strict=True):
            if dtype is not None:
                if not isinstance(leaf, torch.Tensor) or leaf.dtype != dtype or leaf.dim() != len(want):
                    return False
                pairs = list(zip(leaf.shape, want, strict=True))
            elif isinstance(want, str):
                pairs = [(leaf, want)]
            elif type(leaf) is not type(want[0]) or leaf != want[0]:
                return False
            else:
                pairs = []
            for size, name in pairs:
                if isinstance(name, int):
                    if size != name:
                        return False
                elif name in sizes:
                    if size != sizes[name]:
                        return False
                else:
                    sizes[name] = size
        return self.holds is None or self.holds(**sizes)

    def __call__(self, leaves: list[Any]) -> Any:
        """Runs the code."""
        given = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in leaves]
        out = list(self._without_autocast(given) if self.autocast else self.run(*given, *self.weights()))
        for place, value in self.constants:
            out[place] = value
        return pytree.tree_unflatten(out, self.out_spec)

    def _without_autocast(self, leaves: list[Any]) -> tuple[Any, ...]:
        """The casts are in the code."""
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return self.run(*leaves, *self.weights())


def obstacle(compiled: Compiled) -> str:
    """Why a capture cannot be traced, a key of ``REASONS``; empty where it can."""
    parameters = compiled.captured.signature.parameters.values()
    found = {
        DRAWS: compiled.draws,
        UNEVEN: compiled.is_uneven,
        RING: any(node.target is ring_attention for node in compiled.graph.nodes),
        EVERY_CALL: compiled.options.compare == "every_call",
        STARRED: any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters),
    }
    return next((reason for reason, is_so in found.items() if is_so), "")


def expectations(compiled: Compiled) -> tuple[tuple[Any, ...], Callable[..., bool]]:
    """What a capture expects of each input leaf, and of the dynamic sizes together: see ``Entry``."""
    captured = compiled.captured
    expected: list[tuple[torch.dtype | None, Any]] = []
    conditions: list[Any] = list(captured.guards)
    names: dict[str, None] = {}

    def name_of(size: Any) -> Any:
        if isinstance(size, int):
            return size
        if not size.is_Symbol:  # a size that follows from others
            made = sympy.Symbol(f"derived_{len(names)}", integer=True)
            conditions.append(sympy.Eq(made, size, evaluate=False))
            size = made
        names[str(size)] = None
        return str(size)

    for index, info in enumerate(captured.example_inputs):
        if info.shape is not None:
            expected.append((info.dtype, tuple(map(name_of, info.shape))))
        else:
            expected.append((None, (captured.constants[index],) if info.symbol is None else name_of(info.symbol)))
    texts = [f"{low} <= {s} <= {high}" for s, (low, high) in captured.ranges.items() if str(s) in names]
    known = [c for c in conditions if {str(s) for s in c.free_symbols} <= names.keys()]
    texts += [f"({print_python(c)})" for c in known if c != sympy.true]
    cut = {size: parts for size, parts in compiled.multiples.items() if {str(s) for s in size.free_symbols} <= names.keys()}
    texts += [f"({print_python(size)}) % {parts} == 0" for size, parts in cut.items()]
    source = f"lambda {', '.join(names)}: {' and '.join(texts) or True}"
    holds: Callable[..., bool] = eval(source, {"inf": math.inf, "math": math, "torch": torch})
    return tuple(expected), holds


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
        if not weight.requires_grad:
            continue
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


# --- what is called ----------------------------------------------------------------------------------------------------


def traced_call(program: ParallelModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of the program, while a tracer looks on."""
    why = NEW if program._eager else LAZY
    if program._synchronization.held:
        why = HELD
    if why == NEW:
        make_entries(program)
        for entry in reversed(program._entries):
            if entry.training == program.training and entry.autocast == ambient():
                leaves = entry.leaves_of(args, kwargs)
                if leaves is not None:
                    if not entry.obstacle:
                        return entry(leaves)
                    why = entry.obstacle
                    break
    return EAGERLY[why](program, args, kwargs)


@torch.compiler.assume_constant_result
def make_entries(program: ParallelModule) -> bool:
    """Makes what is missing; collective where it is. Dynamo does not trace this: it calls it, once a graph."""
    known = {id(entry.compiled) for entry in program._entries}
    for (_, _), compiled in list(program._captures.items()):
        if id(compiled) not in known:
            with calling():
                if id(compiled) not in program._functions:
                    program._compare_ranks(compiled, None)
                compared()
                program._entries.append(Entry(program, compiled))
    return True


def _eagerly(program: ParallelModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = program.run(args, kwargs)
    if program._eager:
        make_entries(program)  # of what was captured just now; the next call is traced anew, and finds it
    return out


EAGERLY = {why: torch.compiler.disable(_eagerly, reason=text) for why, text in REASONS.items()}

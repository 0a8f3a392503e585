"""The whole compiler, top to bottom: each stage is a pure function from graph to graph, in a file of its own."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxshard.capture.captured import Captured
from fxshard.errors import SoundnessError
from fxshard.ir.conversions import FORWARD
from fxshard.ir.info import has_info, info_of, values_of
from fxshard.ir.origins import module_of
from fxshard.ir.root import Root
from fxshard.mesh import Mesh
from fxshard.normal.functionalize import nested_graphs
from fxshard.normal.normalize import normalize, sparse_tables
from fxshard.passes.annotate import annotate
from fxshard.passes.check import check
from fxshard.passes.check_local import check_local
from fxshard.passes.enclose import has_branches
from fxshard.passes.insert_collectives import insert_collectives
from fxshard.passes.localize import localize
from fxshard.passes.mark_recomputed import mark_recomputed
from fxshard.passes.optimize import optimize
from fxshard.passes.propagate import propagate
from fxshard.placement import Placements, cut_of, is_uneven
from fxshard.plan.plan import Plan
from fxshard.plan.resolve import Resolved, resolve
from fxshard.plan.work import Names
from fxshard.rules.effects import is_mutating
from fxshard.rules.lookup import draws
from fxshard.rules.recipe import shape_of
from fxshard.runtime.collectives import gather_weight, vary_weight
from fxshard.runtime.module import find
from fxshard.runtime.packs import PACK_BYTES
from fxshard.schedule.overlap import edges, length_of
from fxshard.schedule.schedule import schedule
from fxshard.schedule.stored_weights import Packed, packs_of
from fxshard.training.buckets import BUCKET_BYTES

STAGES = ("capture", "normalize", "annotate", "propagate", "insert_collectives", "localize", "optimize", "schedule")
LOCAL = STAGES[-3:]
"""The stages of one rank's graph."""


@dataclass(frozen=True)
class Options:
    """How a program computes, beside the plan.

    Attributes:
        reduce_dtype: the least precision in which sums over ranks are made; None leaves each value's own.
        independent: each rank draws for itself what is dropped of its part.
        bucket_bytes: how much of the gradients of whole weights is summed at once.
        regather: gathered weights are not kept for the backward pass, which gathers them again.
        checkpoint: globs of the modules whose calls are computed anew in the backward pass.
        compare: when ranks compare what they are about to run: ``first_call``, ``every_call``, or ``metadata`` for
            the first call without the values of the inputs.
        overlap: in how many pieces products at the edge of what is split are computed beside their collective; 0 for
            one after the other.
        constants: globs of the inputs whose values are constants of a capture.
    """

    reduce_dtype: torch.dtype | None = None
    independent: bool = False
    bucket_bytes: int = BUCKET_BYTES
    regather: bool = True
    checkpoint: tuple[str, ...] = ()
    compare: str = "first_call"
    overlap: int = 0
    constants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """A captured model, compiled for one plan.

    Attributes:
        captured: what ``capture`` gave.
        resolved: the plan, made explicit.
        stages: the graph after every stage.
        times_s: seconds that every stage took.
        options: how it computes.
    """

    captured: Captured
    resolved: Resolved
    mesh: Mesh
    root: Root
    stages: Mapping[str, fx.Graph]
    times_s: Mapping[str, float]
    options: Options = Options()

    @property
    def graph(self) -> fx.Graph:
        """The program that the first rank runs, and where all parts are even, every rank."""
        return self.stages["optimize"]

    @cached_property
    def is_uneven(self) -> bool:
        """Whether ranks hold parts of different sizes: then their programs differ in the sizes that they name."""
        return has_uneven_parts(self.stages["insert_collectives"])

    def graph_for(self, rank: int, stage: str = "optimize") -> fx.Graph:
        """The program of ``rank`` after a stage; what it runs is that after ``schedule``."""
        if rank == 0 or not self.is_uneven or stage not in LOCAL:
            return self.stages[stage]
        if rank not in self._graphs:
            run = Runner()
            with _collector_paused():
                lower(run, self.stages["insert_collectives"], self.root, self.mesh, rank, self.options, is_even=False)
            self._graphs[rank] = run.stages
        return self._graphs[rank][stage]

    @cached_property
    def edges(self) -> Mapping[fx.Node, int]:
        """The conversions that run beside products, each with how many rows there are to cut in pieces.

        There are none where the ranks' programs differ: one may have nothing to multiply where another has.
        """
        if not self.options.overlap or self.is_uneven or self.has_branches:
            return {}
        return {edge.conversion: length_of(edge, self.mesh) for edge in edges(self.graph)}

    @cached_property
    def has_branches(self) -> bool:
        """Whether the model decides by values what it computes."""
        return has_branches(self.graph)

    @cached_property
    def _graphs(self) -> dict[int, Mapping[str, fx.Graph]]:
        return {}

    def has_output(self, index: int) -> bool:
        """Whether there is a flat output of that index, and it is a tensor."""
        leaves: Any = next(iter(reversed(self.graph.nodes))).args[0]
        return -len(leaves) <= index < len(leaves) and isinstance(leaves[index], fx.Node) and has_info(leaves[index])

    def output_placements(self, index: int) -> Placements:
        """The placements of the ``index``-th flat output, a tensor."""
        leaves: Any = next(iter(reversed(self.graph.nodes))).args[0]
        return info_of(leaves[index]).placements

    def attributes_of(self, rank: int) -> tuple[str, ...]:
        """The names of the weights and constants that a rank reads."""
        return tuple(str(n.target) for n in self.graph_for(rank).find_nodes(op="get_attr"))

    @cached_property
    def multiples(self) -> dict[Any, int]:
        """The dynamic sizes that the program cuts, and what must divide each of them."""
        out: dict[Any, int] = {}
        for node in self.stages["insert_collectives"].nodes:
            for value, placed in zip(values_of(node), info_of(node).outputs if has_info(node) else (), strict=False):
                for dim, size in enumerate(shape_of(value)):
                    if not isinstance(size, int):
                        cuts = ((cut_of(p), n) for p, n in zip(placed, self.mesh.sizes, strict=True) if p.is_shard(dim))
                        parts = math.prod(sum(cut.blocks) * cut.pieces(n) for cut, n in cuts)
                        out[size] = math.lcm(out.get(size, 1), parts)
        return {size: parts for size, parts in out.items() if parts > 1}

    @cached_property
    def _symbols(self) -> dict[Any, tuple[int, int]]:
        """Where the sizes of the inputs say what a symbol is: (the input's position, its dim)."""
        position = {name: i for i, name in enumerate(self.captured.placeholders)}
        out: dict[Any, tuple[int, int]] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            for dim, size in enumerate(shape_of(node.meta.get("val"))):
                if not isinstance(size, int):
                    out[size] = position[node.name], dim
        return out

    def fits(self, leaves: list[Any]) -> bool:
        """Whether the dynamic sizes of a call's inputs divide as the program cuts them."""
        if not self.multiples:
            return True
        sizes = {symbol: leaves[position].shape[dim] for symbol, (position, dim) in self._symbols.items()}
        key = tuple(sizes.values())
        if key not in self._fitting:
            found = ((expr.subs(sizes), parts) for expr, parts in self.multiples.items())
            self._fitting[key] = all(not size.is_number or int(size) % parts == 0 for size, parts in found)
        return self._fitting[key]

    @cached_property
    def _fitting(self) -> dict[tuple[int, ...], bool]:
        return {}

    @cached_property
    def varied_weights(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The weights whose gradients go to buckets, as the backward pass comes to them, and the axes of the sums."""
        nodes = (node for node in reversed(self.graph.nodes) if node.target is vary_weight)
        return tuple((str(node.all_input_nodes[0].target), tuple(map(str, node.args[1:]))) for node in nodes)

    @cached_property
    def packs(self) -> tuple[Packed, ...]:
        """The weights that are gathered at once, and ahead; none where the ranks' programs differ, or branch."""
        large = self.options.bucket_bytes
        return (
            ()
            if self.is_uneven or self.has_branches
            else packs_of(self.graph, self.mesh, min(PACK_BYTES, large), large)
        )

    @cached_property
    def regathers(self) -> bool:
        """Whether weights are gathered that the backward pass gathers again.

        Not along an axis on which a rank has nothing of some call: it does not run it, keeps no weight for its
        gradient, and would not take part.
        """
        over = self.gathered_over
        return self.options.regather and bool(over) and not any(self._is_idle(self.mesh.index(axis)) for axis in over)

    @cached_property
    def gathered_over(self) -> tuple[str, ...]:
        """The mesh axes over which weights are gathered for use."""
        return tuple(dict.fromkeys(str(node.args[1]) for node in self.graph.nodes if node.target is gather_weight))

    def _is_idle(self, axis: int) -> bool:
        """Whether a rank along the axis has nothing of some call."""
        calls = (info_of(n).choices for n in self.stages["insert_collectives"].nodes if has_info(n))
        split = (c for choices in calls for c in choices[axis : axis + 1] if c is not None and c.kind == "split")
        return any(0 in cut_of(p).shares for c in split for p in (*c.inputs, *c.outputs) if p is not None)

    @cached_property
    def overwritten_inputs(self) -> tuple[int, ...]:
        """The places of the inputs that the program writes to."""
        nodes = [n for n in self.graph.nodes if n.target is torch.ops.aten.copy_.default]
        given = {node.name: index for index, node in enumerate(self.graph.find_nodes(op="placeholder"))}
        return tuple(sorted({given[n.args[0].name] for n in nodes if n.args[0].op == "placeholder"}))

    def empty_parts(self, axis: int, index: int) -> tuple[bool, ...]:
        """Which of the uneven splits along a mesh axis leave nothing to the rank at a place on it."""
        return tuple(not shares[index] for shares in self._shares[axis])

    @cached_property
    def _shares(self) -> list[list[tuple[int, ...]]]:
        found: list[dict[tuple[int, ...], None]] = [{} for _ in self.mesh.sizes]
        for node in self.stages["insert_collectives"].nodes:
            for placed in info_of(node).outputs if has_info(node) else ():
                for axis, each in enumerate(placed):
                    if is_uneven((each,)):
                        found[axis][cut_of(each).shares] = None
        return [list(shares) for shares in found]

    @cached_property
    def draws(self) -> bool:
        """Whether the program draws random numbers."""
        return bool(self._drawing)

    @cached_property
    def computes_with_draws(self) -> bool:
        """Whether it does anything with them: a number may be drawn that nobody reads."""
        return any(node.users or is_mutating(node.target) for node in self._drawing)

    @cached_property
    def _drawing(self) -> list[fx.Node]:
        inner = [each.graph.nodes for node in self.graph.nodes for each in nested_graphs(node, self.root)]
        return [node for nodes in (self.graph.nodes, *inner) for node in nodes if draws(node)]


def compile_graph(
    captured: Captured,
    plan: Plan,
    model: torch.nn.Module,
    capture_s: float,
    options: Options | None = None,
    settled: bool = False,
) -> Compiled:
    """Compiles a captured model: the pipeline.

    Args:
        captured: what ``capture`` gave.
        plan: the plan.
        model: the model, for the names of its tensors.
        capture_s: how long the capture took.
        options: how the program computes, beside the plan.
        settled: the parameters lie as ``plan.params`` says, to the letter: those of an earlier capture.
    """
    with _collector_paused():
        return _compile(captured, plan, model, capture_s, options or Options(), settled)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Nearly all that the passes make stays alive: looking for garbage among it would take longer than the passes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Runner:
    """Runs the stages one after the other, and keeps the graph after each, and how long it took.

    Attributes:
        stages: the graph after every stage.
        times_s: seconds that every stage took.
    """

    def __init__(self) -> None:
        self.stages: dict[str, fx.Graph] = {}
        self.times_s: dict[str, float] = {}

    def __call__(self, stage: Callable[..., Any], *args: Any) -> Any:
        """Runs a stage, which goes by the name of its function."""
        start, name = time.perf_counter(), stage.__name__
        out = stage(*args)
        self.times_s[name] = time.perf_counter() - start
        if isinstance(out, fx.Graph):
            self.stages[name] = out
        return out


def _compile(
    captured: Captured, plan: Plan, model: torch.nn.Module, capture_s: float, options: Options, settled: bool
) -> Compiled:
    mesh: Mesh = plan.mesh
    run = Runner()
    run.stages["capture"], run.times_s["capture"] = captured.root.graph, capture_s
    root: Root = run(normalize, captured.root, captured.autocast)  # no wrappers, writes, casts: what one rule can say
    graph = run.stages["normalize"] = root.graph
    graph, notes = run(mark_recomputed, graph, options.checkpoint, dict(model.named_modules()))
    mark_parameters(graph, root)
    resolved = run(resolve, plan, graph, names_of(graph, captured, model), settled)  # globs -> names and placements
    resolved = replace(resolved, notes=(*resolved.notes, *notes, *_sparse(captured)))
    graph = run(annotate, graph, resolved, mesh)
    graph = run(propagate, graph, mesh, [mesh.index(name) for name in resolved.plan.ring])  # every value's placement
    graph = run(insert_collectives, graph, mesh)  # what a value is -> what its reader needs
    run(check, graph, mesh)  # derived again from the rules alone
    lower(run, graph, root, mesh, 0, options, is_even=not has_uneven_parts(graph))
    compiled = Compiled(captured, resolved, mesh, root, run.stages, run.times_s, options)
    run(check_schedules, compiled)
    return compiled


def lower(run: Runner, graph: fx.Graph, root: Root, mesh: Mesh, rank: int, options: Options, is_even: bool) -> fx.Graph:
    """A rank's program: the same road for every rank.

    Args:
        run: runs the stages.
        graph: the program of all ranks.
        root: gets the constants that are computed at compile time.
        mesh: the mesh.
        rank: the rank.
        options: how the program computes.
        is_even: all ranks hold parts of one size; else one may have nothing to compute where another has.
    """
    pieces = options.overlap if is_even and not has_branches(graph) else 0
    graph = run(localize, graph, mesh, rank, options.independent)  # the sizes and lowerings of this rank
    graph = run(optimize, graph, root, pieces)
    graph = run(schedule, graph, pieces, is_even)  # what begins when, and what goes together
    if is_even:
        run(check_local, graph, mesh.seen_by(rank))  # run without values: every shape is what its node claims
    return graph


def _sparse(captured: Captured) -> list[str]:
    tables = sparse_tables(captured.root.graph)
    return [f"{name}: the gradient of its table is sparse on one device, and dense here" for name in tables]


def check_schedules(compiled: Compiled) -> None:
    """Raises where ranks would issue other collectives than the first one.

    Their programs differ only where parts are uneven, and then in what a rank leaves out that has nothing of a call. So
    one rank is looked at for each pattern of empty parts along each axis.

    Raises:
        SoundnessError: where they differ: a bug of the compiler.
    """
    if not compiled.is_uneven:
        return
    mesh, first = compiled.mesh, schedule_of(compiled.graph)
    alike: dict[Any, int] = {}
    for rank in range(mesh.world_size):
        at = mesh.coordinate(rank)
        alike.setdefault(tuple(compiled.empty_parts(axis, i) for axis, i in enumerate(at)), rank)
    for rank in alike.values():
        other = schedule_of(compiled.graph_for(rank))
        for number, (a, b) in enumerate(itertools.zip_longest(first, other)):
            if a != b:
                raise SoundnessError(
                    f"collective {number} of rank 0 is {a or 'nothing'}, of rank {rank} {b or 'nothing'}",
                    fix="this is a bug of fxshard: please report the model and the plan",
                )


def schedule_of(graph: fx.Graph) -> list[str]:
    """The collectives of a graph, in order: what they do, and along which axis."""
    return [f"{n.target.__name__} over {n.args[1]}" for n in graph.nodes if n.target in FORWARD]


def has_uneven_parts(graph: fx.Graph) -> bool:
    """Whether ranks hold parts of different sizes of some value."""
    return any(is_uneven(placed) for node in graph.nodes if has_info(node) for placed in info_of(node).outputs)


def mark_parameters(graph: fx.Graph, root: torch.nn.Module) -> None:
    """Notes on every attribute whether it is a parameter, and whether it requires a gradient."""
    for node in graph.nodes:
        if node.op == "get_attr":
            value = find(root, str(node.target))
            node.meta["is_parameter"] = isinstance(value, torch.nn.Parameter)
            node.meta["requires_grad"] = isinstance(value, torch.Tensor) and value.requires_grad


def names_of(graph: fx.Graph, captured: Captured, model: torch.nn.Module) -> Names:
    """What a plan can name in this graph."""
    attributes = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    params: dict[str, fx.Node] = {}
    unread: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        node = attributes.get(captured.aliases.get(name, name))
        if node is None:
            unread[name] = tuple(tensor.shape)
        else:
            params[name] = node
    canonical = {name: node for name, node in params.items() if name == str(node.target)}
    inputs = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    last = next(iter(reversed(graph.nodes)))
    outputs = [leaf if isinstance(leaf, fx.Node) else None for leaf in last.args[0]]
    return Names(canonical | params, inputs, _modules(graph), outputs, unread)


def _modules(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Module path -> the values that leave the module: computed inside, read outside."""
    out: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        path = module_of(node)
        readers = [module_of(user) if user.op == "call_function" else "" for user in node.users]
        while path:
            if any(r != path and not r.startswith(path + ".") for r in readers):
                out.setdefault(path, []).append(node)
            path = path.rpartition(".")[0]
    return out

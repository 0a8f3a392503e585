"""The whole compiler, top to bottom: each stage is a pure function from graph to graph, in a file of its own."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxshard.errors import DivisibilityError
from fxshard.mesh import Mesh
from fxshard.passes.annotate import annotate
from fxshard.passes.capture import Captured, module_of
from fxshard.passes.check import check
from fxshard.passes.functionalize import nested_graphs
from fxshard.passes.insert_collectives import insert_collectives
from fxshard.passes.localize import localize
from fxshard.passes.normalize import normalize
from fxshard.passes.optimize import optimize
from fxshard.passes.propagate import propagate
from fxshard.passes.typing import info_of
from fxshard.placement import Placements, is_shard
from fxshard.plan.plan import Plan
from fxshard.plan.resolve import Names, Resolved, resolve
from fxshard.rules.lookup import draws
from fxshard.runtime.collectives import dropout_mask
from fxshard.runtime.module import find

STAGES = ("capture", "normalize", "annotate", "propagate", "insert_collectives", "localize", "optimize")


@dataclass(frozen=True)
class Compiled:
    """A captured model, compiled for one plan.

    Attributes:
        captured: what ``capture`` gave.
        resolved: the plan, made explicit.
        stages: the graph after every stage.
        times_s: seconds that every stage took.
        reduce_dtype: the least precision in which the program makes sums over ranks.
    """

    captured: Captured
    resolved: Resolved
    mesh: Mesh
    root: fx.GraphModule
    stages: Mapping[str, fx.Graph]
    times_s: Mapping[str, float]
    reduce_dtype: torch.dtype | None = None

    @property
    def graph(self) -> fx.Graph:
        """The program that the ranks run."""
        return self.stages["optimize"]

    def output_placements(self, index: int) -> Placements:
        """The placements of the ``index``-th flat output, a tensor."""
        leaves: Any = next(iter(reversed(self.graph.nodes))).args[0]
        return info_of(leaves[index]).placements

    @cached_property
    def attributes(self) -> tuple[str, ...]:
        """The names of the weights and constants that the program reads."""
        return tuple(str(n.target) for n in self.graph.find_nodes(op="get_attr"))

    @cached_property
    def _dynamic_splits(self) -> tuple[tuple[str, int, int, tuple[str, ...]], ...]:
        """The dynamic dims of inputs that the plan splits: (input, its position, the dim, the axes)."""
        position = {name: i for i, name in enumerate(self.captured.placeholders)}
        axes: dict[tuple[str, int, int], tuple[str, ...]] = {}
        for node, asked in self.resolved.nodes.items():
            for axis, placement in asked.items() if node.op == "placeholder" else ():
                if is_shard(placement) and not isinstance(node.meta["val"].shape[placement.dim], int):  # type: ignore[attr-defined]
                    key = (node.name, position[node.name], placement.dim)  # type: ignore[attr-defined]
                    axes[key] = (*axes.get(key, ()), axis)
        return tuple((*key, names) for key, names in axes.items())

    def check_divides(self, leaves: list[Any]) -> None:
        """Dynamic sizes are known only at a call: those that the plan splits must divide.

        Raises:
            DivisibilityError: naming the input, its dim, and the axes.
        """
        for name, position, dim, axes in self._dynamic_splits:
            size, parts = leaves[position].shape[dim], math.prod(map(self.mesh.size, axes))
            if size % parts:
                over = " and ".join(f"{a!r} (size {self.mesh.size(a)})" for a in axes)
                raise DivisibilityError(
                    f"dim {dim} (size {size}) of input {name} cannot be split over mesh axis {over}",
                    fix=f"give a size that {parts} divides; uneven shards are not supported yet",
                )

    @cached_property
    def draws(self) -> bool:
        """Whether the program draws random numbers."""
        inner = [each.graph.nodes for node in self.graph.nodes for each in nested_graphs(node, self.root)]
        return any(node.target is dropout_mask or draws(node) for nodes in (self.graph.nodes, *inner) for node in nodes)


def compile_graph(
    captured: Captured,
    plan: Plan,
    model: torch.nn.Module,
    capture_s: float,
    reduce_dtype: torch.dtype | None = None,
) -> Compiled:
    """Compiles a captured model: the pipeline."""
    with _collector_paused():
        return replace(_compile(captured, plan, model, capture_s), reduce_dtype=reduce_dtype)


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


def _compile(captured: Captured, plan: Plan, model: torch.nn.Module, capture_s: float) -> Compiled:
    mesh: Mesh = plan.mesh
    stages: dict[str, fx.Graph] = {"capture": captured.graph_module.graph}
    times: dict[str, float] = {"capture": capture_s}

    def stage(name: str, run: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        out = run(*args)
        times[name] = time.perf_counter() - start
        if isinstance(out, fx.Graph):
            stages[name] = out
        return out

    root: fx.GraphModule = stage("normalize", normalize, captured.graph_module, captured.autocast)
    graph = stages["normalize"] = root.graph
    mark_parameters(graph, root)
    resolved = stage("resolve", resolve, plan, graph, names_of(graph, captured, model))
    graph = stage("annotate", annotate, graph, resolved, mesh)
    graph = stage("propagate", propagate, graph, mesh)
    graph = stage("insert_collectives", insert_collectives, graph, mesh)
    stage("check", check, graph, mesh)
    graph = stage("localize", localize, graph, mesh)
    stage("optimize", optimize, graph)
    return Compiled(captured, resolved, mesh, root, stages, times)


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

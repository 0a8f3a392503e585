"""One rank's program, forward and backward, before the judge: from the placements of what the rank is given.

It may be run as the generated source, or node by node. Then the type that the checker infers for a value is held
against the placement that fxshard declares for it, and a declared ``Partial`` becomes P, which is followed from there.

Where the two differ, and no error is meant:

- The steps of a lowering (a lookup in a table whose rows are split, a norm or a softmax over a split dim) carry the
  placement of what they stand for, though a step may be another: they are followed, and only what comes out of the
  lowering is held against its placement. A P is stamped only there, and on the sums of :data:`SUMS`.
- I and R are one where no gradient flows.
- ``chunk`` of a value without gradient is no collective, and may take its part from a list by the rank's number, which
  the checker does not see: it is typed as one call, from I or R to V (:func:`cut`).
- ``reduce_scatter`` of uneven parts pads them by zeros, which are a sum of zeros, and R to the checker: the summands
  are given to it as V.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

import fxshard
from fxshard.codegen.spelling import is_ours
from fxshard.ir.info import has_info, info_of
from fxshard.ir.origins import module_of, source_of
from fxshard.ir.root import Interpreter
from fxshard.passes.pipeline import Compiled
from fxshard.placement import Placements, Varying, is_partial, is_shard
from fxshard.runtime import collectives as run
from fxshard.runtime.autocast import using
from fxshard.runtime.collectives import Axis
from fxshard.runtime.module import RankModule, find, load_builder
from tests.judge.group import I, JudgeGroup, P, R, S, Type, Types, V, back_propagate, judging, spmd, types_of_value
from tests.judge.operators import SUMS, table

Forward = Callable[..., Any]


def type_of(placement: Any, dims: bool) -> Type:
    """The other system's name for a placement."""
    if is_shard(placement):
        return S(placement.dim) if dims else V
    if is_partial(placement):
        return P
    return R if isinstance(placement, Varying) else I


def types_of(placements: Placements, axes: Mapping[str, Any]) -> Types:
    """The same for each axis."""
    groups = [axis.group for axis in axes.values()]
    return {group.axis: type_of(p, group.dims) for p, group in zip(placements, groups, strict=True)}


def judge_source(
    program: fxshard.ParallelModule, args: Any, kwargs: Any, rank: int = 0, source: str = "", dims: bool = False
) -> dict[str, JudgeGroup]:
    """Runs the source that a rank runs, or another one, and its backward pass.

    Args:
        program: the program.
        args: the model's inputs.
        kwargs: likewise.
        rank: which rank.
        source: what to run instead.
        dims: whether types are global: see ``tests.judge.group``.

    Returns:
        The groups of its axes, which know what was issued.

    Raises:
        SpmdTypeError: where the checker refuses it.
    """
    compiled, leaves = program.compile_call(args, kwargs)
    text = source or program.source(compiled, rank)

    def make(axes: Mapping[str, Axis], module: RankModule) -> Forward:
        build = load_builder(text, axes, torch.device("cpu"), f"<judged {hash(text)}>")
        if "chunk" in build.__globals__:
            build.__globals__["chunk"] = cut
        return build(module)

    return _run(program, compiled, leaves, rank, make, dims)


def judge_nodes(
    program: fxshard.ParallelModule, args: Any, kwargs: Any, rank: int = 0, graph: fx.Graph | None = None
) -> dict[str, JudgeGroup]:
    """Runs the graph that a rank's source is written of, or another one, with what is declared of each value."""
    compiled, leaves = program.compile_call(args, kwargs)
    graph = graph or compiled.graph_for(rank)
    declared = {node.name for node in compiled.stages["insert_collectives"].nodes if has_info(node)}

    def make(axes: Mapping[str, Axis], module: RankModule) -> Forward:
        return _Declared(module, graph, axes, declared).run

    return _run(program, compiled, leaves, rank, make)


def _run(
    program: fxshard.ParallelModule,
    compiled: Compiled,
    leaves: list[Any],
    rank: int,
    make: Callable[..., Forward],
    dims: bool = False,
) -> dict[str, JudgeGroup]:
    program.place_constants(compiled, rank)
    module = copy.deepcopy(program.rank_module(rank))  # types are attributes of tensors
    module.zero_grad(set_to_none=True)
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in leaves]
    with using(()), judging(program.mesh, rank, dims) as axes:
        whole = types_of((fxshard.Replicate(),) * len(axes), axes)
        for name in compiled.attributes_of(rank):
            stored = find(module, name)
            if isinstance(stored, torch.Tensor):
                placed = program._parts.placements.get(name)  # None of a constant, which every rank holds whole
                spmd.assert_type(stored, whole if placed is None else types_of(placed, axes))
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                spmd.assert_type(leaf, whole)
        outputs = make(axes, module)(*leaves)
        for index, output in enumerate(outputs):
            if isinstance(output, torch.Tensor):
                expect(output, types_of(compiled.output_placements(index), axes), f"output {index}")
        _back_propagate([x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad])
    return {name: axis.group for name, axis in axes.items()}  # type: ignore[misc]


def expect(value: torch.Tensor, types: Types, what: str) -> None:
    """``SpmdTypeError`` where a value is of other types. I and R are one where no gradient flows."""
    found = types_of_value(value)
    for axis, wanted in types.items():
        got = found.get(axis)
        if got != wanted and (value.requires_grad or {got, wanted} != {I, R}):
            raise spmd.SpmdTypeError(f"{what} is {got!r} on axis {axis}, and declared {wanted!r}")


def _back_propagate(outputs: list[torch.Tensor]) -> None:
    """From a loss that every element of each output moves, under the checker all the way."""
    if not outputs:
        return
    terms = [(torch.view_as_real(x) if x.is_complex() else x).square().sum() for x in outputs]
    loss = functools.reduce(operator.add, (term.to(torch.float64) for term in terms))
    table._check_backward_loss_type((loss,), {})
    back_propagate(loss)


def cut(x: torch.Tensor, axis: Axis, dim: int, *more: Any, **options: Any) -> torch.Tensor:
    """``chunk``; of a value without gradient it is typed as one call."""
    if x.requires_grad and torch.is_grad_enabled():
        return run.chunk(x, axis, dim, *more, **options)
    group: Any = axis.group
    along, types = group.axis, types_of_value(x)
    if types[along] not in (I, R):
        raise spmd.SpmdTypeError(f"chunk of a value that is {types[along]!r} on axis {along}")
    with spmd.no_typecheck():
        part = run.chunk(x, axis, dim, *more, **options)
    return spmd.assert_type(part, {**types, along: S(dim) if group.dims else V})


class _Declared(Interpreter):
    """Runs a graph, and holds the type of every value against its placement."""

    def __init__(self, module: nn.Module, graph: fx.Graph, axes: Mapping[str, Axis], declared: Collection[str]) -> None:
        super().__init__(module, graph)
        self.axes, self.declared = axes, declared

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if is_ours(target):
            args = tuple(self.axes.get(a, a) if isinstance(a, str) else a for a in args)
        if target is run.reduce_scatter and kwargs.get("lengths"):
            _retype(args[0], P, V)
        return super().call_function(cut if target is run.chunk else target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "call_function" or not isinstance(value, torch.Tensor) or n.name not in self.declared:
            return value
        types = types_of(info_of(n).placements, self.axes)
        if n.target is torch.ops.aten.embedding.default and P in types.values():
            return value  # a step of a lookup, whatever its name
        if n.target in SUMS or any(operand.name not in self.declared for operand in n.all_input_nodes):
            _retype(value, V, P, {axis for axis, kind in types.items() if kind is P})
        expect(value, types, ", ".join(x for x in (f"%{n.name}", str(n.target), module_of(n), source_of(n)) if x))
        return value


def _retype(value: torch.Tensor, before: Type, after: Type, axes: Collection[Any] | None = None) -> None:
    """Tells the checker that a value is of another type than it found, along some axes or all."""
    for axis, kind in [*spmd.get_local_type(value).items()]:
        if kind is before and (axes is None or axis in axes):
            spmd.mutate_type(value, axis, src=before, dst=after)

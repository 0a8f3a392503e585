"""insert_collectives: conversions between what a value is and what its reader needs become nodes.

In: a graph with an ``Info`` on every node.   Out: the same computation, where every operand is what its reader needs.

    %h = linear(x, w)          Partial              %h  = linear(x, w)
    %y = add(residual, h)      needs Replicate  ->  %h1 = all_reduce(h, "tp")
                                                    %y  = add(residual, h1)

One conversion a value and target, shared by all readers. A conversion changes one axis at a time. Where several axes
cut one dim, the outer one cut first: to change it, the inner ones are undone first and done again afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxshard.mesh import Mesh
from fxshard.passes.experts import groups_in, in_order, rows_node, write_rows
from fxshard.passes.propagate import METADATA, constrain
from fxshard.passes.typing import Info, info_of, set_info
from fxshard.placement import (
    REPLICATE,
    Placement,
    Placements,
    Shard,
    Varying,
    blocks_of,
    cut_of,
    describe,
    is_grouped,
    is_partial,
    is_shard,
    same,
)
from fxshard.rules.recipe import operands_of, with_operands
from fxshard.runtime import collectives as run

COMMUNICATES = {run.all_gather, run.all_reduce, run.reduce_scatter, run.all_to_all}
"""Conversions that communicate in the forward pass."""

RESULT_NAMES = {
    run.all_gather: "parts",
    run.concat: "whole",
    run.all_reduce: "sum",
    run.reduce_scatter: "part",
    run.all_to_all: "moved",
    run.chunk: "part",
    run.vary: "vary",
}
"""What a conversion's result is called: the value's own name, and this."""

CONVERSIONS = COMMUNICATES | {run.vary, run.chunk, run.concat}


@dataclass(frozen=True)
class Step:
    """One conversion on one axis: a function of ``runtime.collectives`` and the placements after it."""

    function: Any
    axis: int
    source: Placement
    after: Placements


def steps(source: Placements, target: Placements) -> list[Step]:
    """The conversions that lead from ``source`` to ``target``, in order.

    >>> from fxshard.placement import PARTIAL, Shard
    >>> [s.function.__name__ for s in steps((Shard(0), PARTIAL), (REPLICATE, Shard(0)))]
    ['all_reduce', 'all_gather', 'chunk']
    """
    now = list(source)
    redo = _to_redo(source, target)
    out: list[Step] = []

    def step(function: Any, axis: int, after: Placement) -> None:
        before, now[axis] = now[axis], after
        out.append(Step(function, axis, before, tuple(now)))

    for axis in reversed(range(len(now))):
        have, want = now[axis], target[axis]
        if same(have, want) and axis not in redo:
            continue
        free = axis not in redo
        if is_partial(have):
            if free and is_shard(want):
                step(run.reduce_scatter, axis, want)
            else:
                step(run.all_reduce, axis, REPLICATE)
        elif is_shard(have):
            if free and is_shard(want) and _may_exchange(have, want):
                step(run.all_to_all, axis, want)
            else:
                step(run.all_gather, axis, want if isinstance(want, Varying) else REPLICATE)
    for axis, want in enumerate(target):
        if not same(now[axis], want):
            assert same(now[axis], REPLICATE), (source, target)
            step(run.chunk if is_shard(want) else run.vary, axis, want)
    return out


def _may_exchange(have: Shard, want: Shard) -> bool:
    whole = blocks_of(have) == blocks_of(want) == (1,) and have.dim != want.dim
    return whole and not is_grouped(have) and not is_grouped(want)


def _to_redo(source: Placements, target: Placements) -> set[int]:
    """The axes that cannot be changed directly, since another axis that changes cuts the same dim."""
    redo: set[int] = set()
    changing = [a for a in range(len(source)) if not same(source[a], target[a])]
    for a in changing:
        dims = {p.dim for p in (source[a], target[a]) if is_shard(p)}
        for b in range(len(source)):
            others = {p.dim for p in (source[b], target[b]) if is_shard(p)}
            if b != a and dims & others and (b > a or b in changing):
                redo |= {a, b}
    return redo


def weigh(path: list[Step]) -> int:
    """How dear a path is: communicating steps first, then their number."""
    return sum(100 if s.function in COMMUNICATES else 1 for s in path)


@dataclass
class _Versions:
    """The forms in which one logical value exists so far: (placements, node)."""

    made: list[tuple[Placements, fx.Node]] = field(default_factory=list)

    def find(self, wanted: Placements) -> fx.Node | None:
        for placements, node in self.made:
            if all(map(same, placements, wanted)):
                return node
        return None

    def cheapest(self, wanted: Placements) -> tuple[list[Step], fx.Node]:
        usable = [(p, n) for p, n in self.made if not any(isinstance(x, Varying) for x in p)]
        usable = usable or self.made  # made of varied operands: what is wanted of it varies along the same axes
        paths = [(steps(p, wanted), n) for p, n in usable]
        return min(paths, key=lambda path: weigh(path[0]))


def insert_collectives(graph: fx.Graph, mesh: Mesh) -> fx.Graph:
    """Makes every conversion an explicit node. See the module's text."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    versions: dict[fx.Node, _Versions] = {}
    groups = groups_in(graph)
    for node in in_order(graph, groups):
        if node.target is constrain:
            (operand,) = node.all_input_nodes
            info = info_of(node)
            versions[node] = versions[operand]
            copies[node] = _convert(new, versions[operand], info.placements, mesh, node)
            continue
        wanted = list(required(node))
        if any(w is not None for w in wanted):
            made = [
                copies[o] if w is None else _convert(new, versions[o], w, mesh, node)
                for o, w in zip(operands_of(node), wanted, strict=True)
            ]
            args, kwargs = with_operands(node, made, copies)
            copy = new.create_node(node.op, node.target, args, kwargs, node.name)
            copy.meta = dict(node.meta)
        else:
            copy = new.node_copy(node, copies.__getitem__)
        copies[node] = copy
        info = info_of(node)
        versions[node] = _Versions([(info.placements, copy)] if info.outputs else [])
        for axis, each, shares in groups.get(node, ()):
            ends = _convert(new, versions[node], (REPLICATE,) * mesh.ndim, mesh, node)
            write_rows(new, ends, mesh, axis, each, shares)
    return new


def required(node: fx.Node) -> Iterator[Placements | None]:
    """What each tensor operand of a node must be; None where any form will do, or where it is that already."""
    if node.op != "call_function" or node.target in METADATA or node.target is operator.getitem:
        return
    info = info_of(node)
    for i, operand in enumerate(operands_of(node)):
        known = info_of(operand).placements
        if all(c is None or c.inputs[i] is None for c in info.choices) and not _must_gather(info, known):
            yield None
            continue
        asked = (c.inputs[i] if c is not None else REPLICATE for c in info.choices)
        yield tuple(known[axis] if at is None else at for axis, at in enumerate(asked))


def _must_gather(info: Info, known: Placements) -> bool:
    return any(c is None and p is not REPLICATE for c, p in zip(info.choices, known, strict=True))


def _convert(new: fx.Graph, versions: _Versions, wanted: Placements, mesh: Mesh, reader: fx.Node) -> fx.Node:
    found = versions.find(wanted)
    if found is not None:
        return found
    path, node = versions.cheapest(wanted)
    for step in path:
        done = versions.find(step.after)
        if done is None:
            done = emit(new, node, step, mesh, reader)
            versions.made.append((step.after, done))
        node = done
    return node


def emit(new: fx.Graph, node: fx.Node, step: Step, mesh: Mesh, reader: fx.Node) -> fx.Node:
    """Writes one conversion of ``node``, which ``reader`` asks for."""
    axis = mesh.names[step.axis]
    after = step.after[step.axis]
    known = info_of(node)
    info = Info((step.after,), differentiable=known.differentiable)
    reason = {"reader": reader.name, "from": describe(step.source), "to": describe(after)}

    def make(function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        source = args[0].name.removesuffix("_parts")
        made = new.create_node("call_function", function, args, kwargs, name=f"{source}_{RESULT_NAMES[function]}")
        made.meta = {k: v for k, v in node.meta.items() if k not in ("fxshard", "split_bias")}
        if "nn_module_stack" not in made.meta:  # a weight's conversion belongs to the module that reads it
            made.meta |= {k: reader.meta[k] for k in ("nn_module_stack", "stack_trace") if k in reader.meta}
        made.meta["fxshard_reason"] = reason
        made.meta["fxshard_reader"] = {k: reader.meta.get(k) for k in ("nn_module_stack", "stack_trace")}
        set_info(made, info)
        return made

    if step.function is run.all_gather:
        dim, said = step.source.dim, _told(new, axis, step.source)  # type: ignore[attr-defined]
        args = (node, axis, True) if isinstance(after, Varying) else (node, axis)
        gathered = make(
            run.all_gather, *args, **({"dim": dim, "lengths": said["lengths"]} if "lengths" in said else {})
        )
        return gathered if dim == 0 and not said else make(run.concat, gathered, axis, dim, **said)
    if step.function is run.all_to_all:
        lengths = cut_of(step.source).shares, cut_of(after).shares
        dims = step.source.dim, after.dim  # type: ignore[attr-defined]
        return make(run.all_to_all, node, axis, *dims, **({"lengths": lengths} if any(lengths) else {}))
    if step.function in (run.chunk, run.reduce_scatter):
        return make(step.function, node, axis, after.dim, **_told(new, axis, after))  # type: ignore[attr-defined]
    return make(step.function, node, axis)


def _told(new: fx.Graph, axis: str, placement: Placement) -> dict[str, Any]:
    return {"lengths": rows_node(new, axis, placement)} if is_grouped(placement) else how(placement)


def how(placement: Placement) -> dict[str, Any]:
    """What a conversion is told of a shard beside its dim; ``localize`` makes lengths of the shares."""
    blocks, shares, _ = cut_of(placement)
    return ({"blocks": blocks} if blocks != (1,) else {}) | ({"lengths": shares} if shares else {})

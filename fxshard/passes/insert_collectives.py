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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxshard.mesh import Mesh
from fxshard.passes.conversions import BETWEEN, CONVERSIONS, FORWARD, kind_of
from fxshard.passes.experts import groups_in, in_order, rows_node, write_rows
from fxshard.passes.propagate import METADATA, constrain
from fxshard.passes.typing import Info, info_of, set_info
from fxshard.placement import (
    REPLICATE,
    Placement,
    Placements,
    Shard,
    Varying,
    cut_of,
    cut_within,
    describe,
    is_grouped,
    is_partial,
    is_shard,
    same,
)
from fxshard.rules.recipe import operands_of, with_operands
from fxshard.runtime import collectives as run
from fxshard.torch_internals import Graph


@dataclass(frozen=True)
class Step:
    """One conversion on one axis: a function of ``runtime.collectives`` and the placements after it."""

    function: Any
    axis: int
    source: Placement
    after: Placements


def steps(source: Placements, target: Placements, sizes: Sequence[int]) -> list[Step]:
    """The conversions that lead from ``source`` to ``target``, in order; ``sizes`` are those of the axes.

    >>> from fxshard.placement import PARTIAL, Shard
    >>> [s.function.__name__ for s in steps((Shard(0), PARTIAL), (REPLICATE, Shard(0)), (2, 2))]
    ['all_reduce', 'all_gather', 'chunk']
    """
    now = list(source)
    redo = _to_redo(source, target, sizes)
    out: list[Step] = []

    def step(axis: int, after: Placement) -> None:
        before, now[axis] = now[axis], after
        out.append(Step(BETWEEN[kind_of(before), kind_of(after)], axis, before, tuple(now)))

    for axis in reversed(range(len(now))):
        have, want = now[axis], target[axis]
        if same(have, want) and axis not in redo:
            continue
        free = axis not in redo
        if is_shard(have):
            free = free and (not is_shard(want) or _exchanges(have, want, now, axis, sizes))
        elif not is_partial(have):
            continue
        after = want if (kind_of(have), kind_of(want)) in BETWEEN and (free or not is_shard(want)) else REPLICATE
        step(axis, after)
    for axis, want in enumerate(target):
        if not same(now[axis], want):
            assert same(now[axis], REPLICATE), (source, target)
            step(axis, want)
    return out


def _to_redo(source: Placements, target: Placements, sizes: Sequence[int]) -> set[int]:
    """The axes that cannot be changed directly, since another axis that changes cuts the same dim."""
    redo: set[int] = set()
    changing = [a for a in range(len(source)) if not same(source[a], target[a])]
    for a in changing:
        cuts = [p for p in (source[a], target[a]) if is_shard(p)]
        for b in changing:
            if b != a and {p.dim for p in cuts} & {p.dim for p in (source[b], target[b]) if is_shard(p)}:
                redo |= {a, b}
        inner = [b for b in range(a + 1, len(source)) if b not in changing]
        for p in cuts:
            if cut_within(p, [(source[b], sizes[b]) for b in inner]) is None:
                redo |= {a, *(b for b in inner if source[b].is_shard(p.dim))}
    return redo


def _exchanges(have: Shard, want: Shard, now: Sequence[Placement], axis: int, sizes: Sequence[int]) -> bool:
    """Whether one exchange leads from the one cut to the other: of two dims, neither with blocks, as the inner axes
    leave them.
    """
    if have.dim == want.dim:
        return False
    cuts = [cut_within(p, inside(now, axis, sizes)) for p in (have, want)]
    return all(cut is not None and cut.blocks == (1,) and cut.groups is None for cut in cuts)


def inside(placements: Sequence[Placement], axis: int, sizes: Sequence[int]) -> list[tuple[Placement, int]]:
    """The placements on the axes inside of ``axis``, with these axes' sizes."""
    return list(zip(placements, sizes, strict=True))[axis + 1 :]


def weigh(path: list[Step]) -> int:
    """How dear a path is: communicating steps first, then their number."""
    return sum(100 if s.function in FORWARD else 1 for s in path)


@dataclass
class _Versions:
    """The forms in which one logical value exists so far: (placements, node)."""

    made: list[tuple[Placements, fx.Node]] = field(default_factory=list)

    def find(self, wanted: Placements) -> fx.Node | None:
        for placements, node in self.made:
            if all(map(same, placements, wanted)):
                return node
        return None

    def cheapest(self, wanted: Placements, sizes: Sequence[int]) -> tuple[list[Step], fx.Node]:
        usable = [(p, n) for p, n in self.made if not any(isinstance(x, Varying) for x in p)]
        usable = usable or self.made  # made of varied operands: what is wanted of it varies along the same axes
        paths = [(steps(p, wanted, sizes), n) for p, n in usable]
        return min(paths, key=lambda path: weigh(path[0]))


def insert_collectives(graph: fx.Graph, mesh: Mesh) -> fx.Graph:
    """Makes every conversion an explicit node. See the module's text."""
    new = Graph()
    copies: dict[fx.Node, fx.Node] = {}
    versions: dict[fx.Node, _Versions] = {}

    def form(operand: fx.Node, wanted: Placements | None, reader: fx.Node) -> fx.Node:
        if wanted is None and operand in copies:
            return copies[operand]
        return _convert(new, versions[operand], wanted or info_of(operand).placements, mesh, reader)

    groups = groups_in(graph)
    for node in in_order(graph, groups):
        if node.target is constrain:
            (operand,) = node.all_input_nodes
            versions[node] = versions[operand]
            if not _is_stored(operand):  # of a weight, each reader says in which form it reads it
                copies[node] = form(operand, info_of(node).placements, node)
            continue
        wanted = list(required(node))
        if any(w is not None for w in wanted):
            made = [form(o, w, node) for o, w in zip(operands_of(node), wanted, strict=True)]
            args, kwargs = with_operands(node, made, copies)
            copy = new.create_node(node.op, node.target, args, kwargs, node.name)
            copy.meta = dict(node.meta)
        else:
            read = {o: form(o, None, node) for o in node.all_input_nodes}
            copy = new.node_copy(node, read.__getitem__)
        copies[node] = copy
        info = info_of(node)
        versions[node] = _Versions([(info.placements, copy)] if info.outputs else [])
        for axis, each, shares in groups.get(node, ()):
            ends = _convert(new, versions[node], (REPLICATE,) * mesh.ndim, mesh, node)
            write_rows(new, ends, mesh, axis, each, shares)
    return new


def _is_stored(node: fx.Node) -> bool:
    """Whether a value is a weight, or one cast."""
    source = node.all_input_nodes[0] if node.target is torch.ops.aten.to.dtype else node
    return bool(source.op == "get_attr")


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
    path, node = versions.cheapest(wanted, mesh.sizes)
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
    within = inside(step.after, step.axis, mesh.sizes)
    reason = {"reader": reader.name, "from": describe(step.source), "to": describe(after)}

    def make(function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        name = f"{args[0].name}_{CONVERSIONS[function].result}"
        made = new.create_node("call_function", function, args, kwargs, name=name)
        made.meta = {k: v for k, v in node.meta.items() if k not in ("fxshard", "split_bias")}
        if "nn_module_stack" not in made.meta:  # a weight's conversion belongs to the module that reads it
            made.meta |= {k: reader.meta[k] for k in ("nn_module_stack", "stack_trace") if k in reader.meta}
        made.meta["fxshard_reason"] = reason
        made.meta["fxshard_reader"] = {k: reader.meta.get(k) for k in ("nn_module_stack", "stack_trace")}
        set_info(made, info)
        return made

    if step.function is run.all_gather:
        assert is_shard(step.source)
        said = {"dim": step.source.dim} if step.source.dim else {}
        args = (node, axis, True) if isinstance(after, Varying) else (node, axis)
        return make(run.all_gather, *args, **said, **_told(new, axis, step.source, within))
    if step.function is run.all_to_all:
        lengths = cut_of(step.source).shares, cut_of(after).shares
        dims = step.source.dim, after.dim  # type: ignore[attr-defined]
        return make(run.all_to_all, node, axis, *dims, **({"lengths": lengths} if any(lengths) else {}))
    if step.function in (run.chunk, run.reduce_scatter):
        assert is_shard(after)
        return make(step.function, node, axis, after.dim, **_told(new, axis, after, within))
    return make(step.function, node, axis)


def _told(new: fx.Graph, axis: str, placement: Shard, within: Sequence[tuple[Placement, int]]) -> dict[str, Any]:
    return {"lengths": rows_node(new, axis, placement)} if is_grouped(placement) else how(placement, within)


def how(placement: Shard, within: Sequence[tuple[Placement, int]] = ()) -> dict[str, Any]:
    """What a conversion is told of a shard beside its dim; ``localize`` makes lengths of the shares.

    Args:
        placement: the shard.
        within: the placements on the axes inside, with these axes' sizes.
    """
    cut = cut_within(placement, within)
    assert cut is not None, (placement, within)
    return ({"blocks": cut.blocks} if cut.blocks != (1,) else {}) | ({"lengths": cut.shares} if cut.shares else {})

"""insert_collectives: conversions between what a value is and what its reader needs become nodes.

In: a graph with an ``Info`` on every node.   Out: the same computation, where every operand is what its reader needs.

    %h = linear(x, w)          Partial              %h  = linear(x, w)
    %y = add(residual, h)      needs Replicate  ->  %h1 = all_reduce(h, "tp")
                                                    %y  = add(residual, h1)

One conversion a value and target, shared by all readers; the way to it is that of ``ir.paths``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxshard.ir.info import Info, info_of
from fxshard.ir.paths import Step, steps, weigh
from fxshard.lowerings.convert import emit
from fxshard.lowerings.split_experts import groups_in, in_order, write_rows
from fxshard.mesh import Mesh
from fxshard.passes.propagate import METADATA, constrain
from fxshard.placement import (
    REPLICATE,
    Placements,
    Varying,
    same,
)
from fxshard.rules.recipe import operands_of, with_operands
from fxshard.torch_internals import Graph


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

"""Lowerings of experts that are dealt out to the ranks, and of what picks rows, or adds them up, by position.

grouped_mm(x, w, ends)       w: Shard(0)   x: the rows of this rank's groups; the ends are counted from its first row
index(x, [positions])        x: Shard(0)   a rank picks of what it has, and has zeros for the rest: the ranks' sum
index_add(x, 0, p, rows)     p, rows: Shard(0)   every rank adds its own rows to its share of x: the ranks' sum

Reference: GShard (Lepikhin et al., 2020); MegaBlocks (Gale et al., 2022), for products in groups.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from fxshard.ir.facts import value_name
from fxshard.ir.info import Info, info_of, values_of
from fxshard.lowerings.writer import call_like
from fxshard.mesh import Mesh, RankMesh
from fxshard.placement import Cut, Groups, Placement, cut_of, is_grouped, lengths_of, local_size
from fxshard.rules.recipe import bind, operands_of
from fxshard.runtime import row_groups as run

aten = torch.ops.aten
ENDS = 2
"""The position of the operand of a grouped product that says where the groups end."""


def rows_node(graph: fx.Graph, axis: str, placement: Placement) -> fx.Node:
    """The node that says how many rows every rank of ``axis`` has where a value lies as ``placement``."""
    cut = cut_of(placement)
    found = graph.find_nodes(op="call_function", target=run.group_rows)
    said = axis, cut.groups, cut.shares
    return next(node for node in found if node.meta["groups"] == said)  # type: ignore[no-any-return]


def write_rows(
    graph: fx.Graph, ends: fx.Node, mesh: Mesh, axis: int, groups: Groups, shares: tuple[int, ...]
) -> fx.Node:
    """Writes it, behind ``ends``, which every rank has whole."""
    count = values_of(ends)[0].shape[0]
    lengths: dict[str, Any] = {"lengths": tuple(count * share // sum(shares) for share in shares)} if shares else {}
    made = graph.call_function(run.group_rows, (ends, mesh.names[axis], groups.rows), lengths)
    made.meta = {k: v for k, v in ends.meta.items() if k in ("nn_module_stack", "stack_trace", "fxshard")}
    made.meta |= {"val": 0, "groups": (mesh.names[axis], groups, shares)}
    return made


def groups_in(graph: fx.Graph) -> dict[fx.Node, set[tuple[int, Groups, tuple[int, ...]]]]:
    """The values that say where groups end -> how their rows are dealt out: the axis, the groups, the ranks' shares."""
    by_name = {node.name: node for node in graph.nodes}
    found: dict[fx.Node, set[tuple[int, Groups, tuple[int, ...]]]] = {}
    for node in graph.nodes:
        for axis, cut in _grouped(node):
            assert cut.groups is not None
            found.setdefault(by_name[cut.groups.ends], set()).add((axis, cut.groups, cut.shares))
    return found


def _grouped(node: fx.Node) -> Iterator[tuple[int, Cut]]:
    """How rows in groups, that a node reads or gives, are cut, and by which axis."""
    info = info_of(node)
    for axis, choice in enumerate(info.choices):
        for placement in (*choice.inputs, *choice.outputs) if choice is not None else ():
            if placement is not None and is_grouped(placement):
                yield axis, cut_of(placement)


def in_order(graph: fx.Graph, groups: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes, where the ends of groups come before all that is dealt out by them."""
    if not groups:
        return list(graph.nodes)
    by_name = {node.name: node for node in groups}
    order = {node: at for at, node in enumerate(graph.nodes)}
    done: dict[fx.Node, None] = {}
    for node in graph.nodes:
        for name in {cut.groups.ends for _, cut in _grouped(node) if cut.groups}:
            done |= dict.fromkeys(sorted(before(by_name[name], done), key=order.__getitem__))
        done[node] = None
    return list(done)


def before(node: fx.Node, known: Collection[fx.Node] = ()) -> set[fx.Node]:
    """A node, and what it is computed from; ``known``: what needs not be looked at."""
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        each = queue.pop()
        if each not in found and each not in known:
            found.add(each)
            queue += each.all_input_nodes
    return found


def names_groups(node: fx.Node, ends: str, axis: str, rows: int, shares: tuple[int, ...]) -> bool:
    """Whether a node says how many rows each rank has of the groups that the value ``ends`` ends."""
    if node.target is not run.group_rows:
        return False
    source, name, count = node.args
    assert isinstance(source, fx.Node)
    groups = values_of(source)[0].shape[0]
    lengths = tuple(groups * share // sum(shares) for share in shares)
    said = (value_name(source), name, count, node.kwargs.get("lengths", ()))
    return said == (ends, axis, rows, lengths)


def experts(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """This rank's rows with the matrices of its groups."""
    (axis,) = axes
    weight, ends = operands_of(node)[1], operands_of(node)[ENDS]
    lengths = lengths_of(values_of(weight)[0].shape[0], info_of(weight).placements[axis], mesh.sizes[axis])
    with new.inserting_before(node):
        own = call_like(new, run.own_ends, (ends, mesh.names[axis]), ends, **_told(lengths))
        count = local_size(values_of(weight)[0].shape[0], info_of(weight).placements[axis], *_where(mesh, axis))
        own.meta["val"] = ends.meta["val"][:count]
    node.replace_input_with(ends, own)
    return node


def pick(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """A pick from a dim of which every rank has a part."""
    (axis,) = axes
    source, positions = operands_of(node)
    placement = info_of(source).placements[axis]
    dim: int = placement.dim  # type: ignore[attr-defined]
    size = values_of(source)[0].shape[dim]
    lengths: Any = lengths_of(size, placement, mesh.sizes[axis])
    if cut_of(placement).groups:
        lengths = rows_node(new, mesh.names[axis], placement)
    told = _told(lengths) | ({"wraps": False} if node.target is aten.index_select.default else {})
    made = call_like(new, run.pick, (source, dim, positions, mesh.names[axis]), node, **told)
    new.erase_node(node)
    return made


def added(new: fx.Graph, node: fx.Node, info: Info, mesh: RankMesh, axes: list[int]) -> fx.Node:
    """An index_add of this rank's rows, to its share of what they are added to."""
    source = bind(node)["self"]
    with new.inserting_before(node):
        share = call_like(new, aten.mul.Tensor, (source, 1 / math.prod(mesh.sizes[a] for a in axes)), source)
    node.args = (share, *node.args[1:])
    return node


def _where(mesh: RankMesh, axis: int) -> tuple[int, int]:
    return mesh.sizes[axis], mesh.at[axis]


def _told(lengths: Any) -> dict[str, Any]:
    return {"lengths": lengths} if lengths else {}

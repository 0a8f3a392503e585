"""enclose: what is computed on one way of a branch stands together, and nothing else among it.

In: a local graph with ``taken(decision, yes, no, number)``, of which other passes may have moved nodes, or put
conversions between.   Out: an equal one, in which each way is a run of consecutive nodes, with its key on their stacks:
the code generator writes it as a call of its own, that is made on that way only.

What only a way reads joins it, such as the sum over the ranks of what its layer gives: that has no operand where the
layer is not run. What others read too stands before it.

    %z  = linear(%x, %w)        branch 0     %z  = linear(%x, %w)          branch 0
    %z1 = all_reduce(%z, tp)            ->   %z1 = all_reduce(%z, tp)      branch 0
    %y  = taken(%d, %x, %z1, 0)              %y  = taken(%d, %x, %z1, 0)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from fxshard.errors import SoundnessError
from fxshard.ir.info import copy_graph
from fxshard.ir.origins import branch_of, module_of, source_of, way_of
from fxshard.rules.effects import has_effect
from fxshard.runtime.conditional import TAKEN

__all__ = ["enclose", "has_branches"]

Way = tuple[int, bool]


def has_branches(graph: fx.Graph) -> bool:
    """Whether a graph has ways of which a run takes one."""
    return any(node.target is TAKEN for node in graph.nodes)


def enclose(graph: fx.Graph) -> fx.Graph:
    """A copy with the ways of every branch in one piece each; a graph without branches comes back as it is.

    Raises:
        SoundnessError: something outside of a way needs what is computed on it: a bug of the compiler.
    """
    if not has_branches(graph):
        return graph
    graph = copy_graph(graph)
    ways: dict[Way, list[fx.Node]] = {}
    for node in graph.nodes:
        way = branch_of(node)
        if way is not None and node.op == "call_function":
            ways.setdefault(way, []).append(node)
    for way, marked in ways.items():
        _gather(graph, way, marked)
    return graph


def _gather(graph: fx.Graph, way: Way, marked: list[fx.Node]) -> None:
    joins = [n for n in graph.nodes if n.target is TAKEN and n.args[3] == way[0]]
    if not joins:
        for node in marked:
            _leave(node)
        return
    behind = set(joins)  # what reads a join stands behind all of the way
    for node in _from(joins[0], joins[-1]):
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    between = [node for node in _from(marked[0], joins[-1]) if node not in behind]
    place = 1 if way[1] else 2
    inside = set(marked)
    for node in reversed(between):
        ours = [u in inside or (u in joins and _is_only(u, place, node)) for u in node.users]
        if not all(ours):
            inside.discard(node)
        elif node.op == "call_function" and node.users and not has_effect(node) and branch_of(node) in (None, way):
            inside.add(node)
    for node in between:
        if node not in inside and inside.isdisjoint(node.all_input_nodes):
            if node in marked:
                _leave(node)
            if node is not marked[0]:
                marked[0].prepend(node)
    ordered = [node for node in between if node in inside]
    stack, key = _stack_of(marked, way)
    for node in between:
        if node in inside:
            continue
        if not inside.isdisjoint(node.all_input_nodes):
            raise SoundnessError(
                f"%{node.name} is computed whether or not branch {way[0]} is taken, of what only is where it is",
                module=module_of(node),
                source=source_of(node),
                fix="this is a bug of fxshard: please report the model and the plan",
            )
    for node in ordered:
        joins[0].prepend(node)
        if key not in (node.meta.get("nn_module_stack") or {}):
            node.meta["nn_module_stack"] = stack
        node.meta.pop("fxshard_reader", None)


def _is_only(join: fx.Node, place: int, node: fx.Node) -> bool:
    """Whether a join reads a node at one place, and at no other."""
    return [i for i, argument in enumerate(join.args) if argument is node] == [place]


def _from(first: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    node = first
    while node is not end:
        yield node
        node = node.next


def _stack_of(marked: list[fx.Node], way: Way) -> tuple[dict[str, Any], str]:
    """The stack of modules down to a way's own entry, and its key."""
    whole: dict[str, Any] = next(n.meta["nn_module_stack"] for n in marked if branch_of(n) == way)
    keys = list(whole)
    key = next(k for k in keys if way_of(k) == way)
    return {k: whole[k] for k in keys[: keys.index(key) + 1]}, key


def _leave(node: fx.Node) -> None:
    stack = node.meta.get("nn_module_stack") or {}
    node.meta["nn_module_stack"] = {key: entry for key, entry in stack.items() if way_of(key) is None}

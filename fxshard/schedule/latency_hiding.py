"""latency_hiding: collectives begin where what they move is made, and are waited for where it is read.

In: a local graph, after all other rewrites.   Out: an equal one, for the generated code alone; all that is reported of
a program is read off the graph that came in.

    %k  = linear(%x, %wk)                   %k  = linear(%x, %wk)
    %k1 = all_gather(%k, tp, dim=2)         %kb = begin_all_gather(%k, tp, dim=2)
    %kh = view(%k1, ..)                ->   %q  = linear(%x, %wq)
    %q  = linear(%x, %wq)                   %k1 = wait(%kb)
    %y  = attention(%q, %kh, ..)            %kh = view(%k1, ..)
                                            %y  = attention(%q, %kh, ..)

Views of the result go with the wait. A collective begins and ends in the call of one module, the innermost that holds
what it moves and all who read it. It stays as it is where nothing between the two takes long (``WORK``), where it cuts
uneven parts, on a way of a branch, and in calls that are computed anew, which may end before the wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from fxshard.ir.conversions import BEGIN, CONVERSIONS, FORWARD
from fxshard.ir.info import copy_graph
from fxshard.ir.origins import checkpoint_of, way_of
from fxshard.runtime import async_collectives, collective_matmul

aten = torch.ops.aten

WORK = {
    *FORWARD,
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.scaled_dot_product_attention.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten._grouped_mm.default,
    collective_matmul.vary_linears,
    collective_matmul.gather_linears,
    collective_matmul.linear_all_reduce,
    collective_matmul.linear_reduce_scatter,
}
"""What takes long enough to run a collective beside it."""

VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.slice.Tensor,
    aten.select.int,
    aten.alias.default,
}
"""What may be put off until its result is read."""

Path = tuple[str, ...]


def hide_latency(graph: fx.Graph) -> fx.Graph:
    """A copy, with the collectives of the module's text in two halves."""
    graph = copy_graph(graph)
    for node in list(graph.nodes):
        if node.target in BEGIN and "lengths" not in node.kwargs:
            _spread(graph, node)
    return graph


def _spread(graph: fx.Graph, node: fx.Node) -> None:
    source: Any = node.args[0]
    late = _put_off(node)
    readers = [user for each in (node, *late) for user in each.users if user not in late]
    if source.op != "call_function" or not readers or any(_marks(each) for each in (source, node, *late, *readers)):
        return
    home = _shared([_path(each) for each in (source, *late, *readers) if each.op != "output"])
    reader = min(readers)
    first, stop = _edge(source, home, _onward(source)), _edge(reader, home, _backward(reader))
    between = takewhile(lambda each: each is not stop, _onward(first))
    if not first < stop or not any(each.target in WORK for each in between if each is not node):
        return
    with graph.inserting_after(first):
        begun = graph.call_function(BEGIN[node.target], node.args, node.kwargs)
    with graph.inserting_before(stop):
        arrived = graph.call_function(async_collectives.wait, (begun,))
    begun.meta, arrived.meta = dict(node.meta), dict(node.meta)
    for each in late:
        stop.prepend(each)
    node.replace_all_uses_with(arrived)
    graph.erase_node(node)


def _put_off(node: fx.Node) -> dict[fx.Node, None]:
    """The views of a result, and the views of these, in the order of the graph."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user.target in VIEWS and user not in found:
                found[user] = None
                waiting.append(user)
    return dict.fromkeys(sorted(found))


def _path(node: fx.Node) -> Path:
    """The calls that a node stands in, outermost first."""
    return tuple(node.meta.get("nn_module_stack") or ())


def _marks(node: fx.Node) -> bool:
    return any(checkpoint_of(key) is not None or way_of(key) is not None for key in _path(node))


def _shared(paths: list[Path]) -> Path:
    shortest = min(paths, key=len)
    for depth in range(len(shortest), 0, -1):
        if all(path[:depth] == shortest[:depth] for path in paths):
            return shortest[:depth]
    return ()


def _edge(node: fx.Node, home: Path, along: Iterable[fx.Node]) -> fx.Node:
    """The last node ``along`` the graph of the call inside of ``home`` that ``node`` stands in; itself if in none."""
    inner, last = _path(node)[: len(home) + 1], node
    if len(inner) == len(home):
        return node
    for each in along:
        if each.target in CONVERSIONS or not _path(each):
            continue  # it stands in any call
        if _path(each)[: len(inner)] != inner:
            break
        last = each
    return last


def _onward(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op == "call_function":
        node = node.next
        yield node


def _backward(node: fx.Node) -> Iterator[fx.Node]:
    while node.prev.op == "call_function":
        node = node.prev
        yield node

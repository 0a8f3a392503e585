"""overlap: products are computed together with the collective before or behind them, which then runs beside them.

In: a local graph, after all other rewrites.   Out: an equal one, for the generated code alone; all that is reported of
a program is read off the graph that came in.

    %h = all_gather(%x, tp, True, 1)
    %q = linear(%h, %wq)                ->   %all = gather_linears(%x, [%wq, %wk], tp, 1, pieces=4)
    %k = linear(%h, %wk)                     %q, %k = %all[0], %all[1]

    %h = linear(%x, %w)                 ->   %y = linear_all_reduce(%x, %w, tp, pieces=4)
    %y = all_reduce(%h, tp)

``bring_together`` first moves all products that read one conversion behind the first of them. A conversion stays as it
is where something else reads it, or where it cuts uneven parts or blocks; and a product where it has a bias that its
sum would add on every rank.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxshard.ir.conversions import BEFORE, BEHIND, TABLE, options_of
from fxshard.ir.info import Info, copy_graph, has_info, info_of, set_info, sizes_of
from fxshard.ir.origins import checkpoint_of
from fxshard.mesh import Mesh
from fxshard.placement import local_shape
from fxshard.runtime import collectives as run

aten = torch.ops.aten

OF_WEIGHTS = {row.function for row in TABLE if row.of_weights} | {aten.to.dtype}
"""What may be computed earlier, if it is computed of weights alone."""


@dataclass(frozen=True)
class Edge:
    """A conversion, and the products that are computed together with it.

    Attributes:
        conversion: the node that communicates, forward or backward.
        products: the linears that read it, or the one that it reads.
    """

    conversion: fx.Node
    products: tuple[fx.Node, ...]

    @property
    def is_before(self) -> bool:
        """Whether the products read what the conversion gives."""
        return self.conversion.target in BEFORE


def bring_together(graph: fx.Graph) -> fx.Graph:
    """A copy, in which products that read one conversion stand behind the first, with what they read of weights."""
    graph = copy_graph(graph)
    for node in graph.nodes:
        products = _readers(node)
        if len(products) < 2 or not _is_in_one_call(node, products):
            continue
        last, *others = sorted(products)
        for product in others:
            if all(operand is node or _is_of_weights(operand) for operand in product.all_input_nodes):
                last.append(product)
                _move_before(product)
                last = product
    return graph


def _is_of_weights(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    return node.target in OF_WEIGHTS and all(map(_is_of_weights, node.all_input_nodes))


def _move_before(node: fx.Node) -> None:
    """Moves what ``node`` reads in front of it, where it stands behind it."""
    for operand in node.all_input_nodes:
        if node < operand:
            node.prepend(operand)
            _move_before(operand)


def edges(graph: fx.Graph) -> list[Edge]:
    """The conversions that run beside products, in the order of the graph."""
    out: list[Edge] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        products = _readers(node) if node.target in BEFORE else _summands(node)
        if not products or taken.intersection(products) or not _is_in_one_call(node, products):
            continue
        if not (_stand_together(products) if node.target in BEFORE else _runs_again_anyway(node)):
            continue
        taken.update(products)
        out.append(Edge(node, tuple(products)))
    return out


def _readers(node: fx.Node) -> list[fx.Node]:
    """The linears that read a conversion, if nothing else does."""
    if node.target not in BEFORE or not _is_plain(node):
        return []
    if node.target is run.all_gather and not options_of(node).get("summed"):
        return []
    readers = list(node.users)
    return readers if all(_is_product(user, node) for user in readers) else []


def _is_product(node: fx.Node, x: fx.Node) -> bool:
    if not _is_linear(node):
        return False
    bias = node.args[2] if len(node.args) > 2 else None
    is_row = not isinstance(bias, fx.Node) or bias.meta["val"].dim() == 1
    return is_row and [i for i, each in enumerate(node.args) if each is x] == [0]


def _summands(node: fx.Node) -> list[fx.Node]:
    """The linear whose results a conversion sums, if nothing else reads them."""
    if node.target not in BEHIND or not _is_plain(node):
        return []
    (product,) = node.all_input_nodes
    is_alone = _is_linear(product) and len(product.users) == 1 and len(product.args) == 2
    return [product] if is_alone else []


def _is_linear(node: fx.Node) -> bool:
    return node.target is aten.linear.default and not node.kwargs and "val" in node.meta and has_info(node)


def _is_plain(node: fx.Node) -> bool:
    """Whether a conversion takes equal parts, each in one piece, along another dim than that of the features."""
    options, value = options_of(node), node.meta.get("val")
    if options.get("lengths") or options.get("blocks", (1,)) != (1,) or not has_info(node):
        return False
    return isinstance(value, torch.Tensor) and bool(options.get("dim", 0) < value.dim() - 1)


def _stand_together(products: list[fx.Node]) -> bool:
    """Whether nothing that reads one of the products comes before the last of them."""
    last = max(products)
    return all(last < user for product in products for user in product.users)


def _is_in_one_call(node: fx.Node, products: list[fx.Node]) -> bool:
    """Whether all stand in the same call that is computed anew in the backward pass, or in none."""
    around = node.all_input_nodes if node.target in BEFORE else list(node.users)
    marks = {_marks(each) for each in (*products, *(n for n in around if n.op == "call_function"))}
    return len(marks) == 1


def _runs_again_anyway(node: fx.Node) -> bool:
    """Whether a call that is computed anew goes on behind the sum ``node``, to a product that keeps what it reads.

    Such a call ends where all is there again that the backward pass asks for: after the last product, and before its
    sum. One call of both would communicate once more.
    """
    marks = _marks(next(iter(node.users), node))
    if not marks:
        return True
    reached, latest = {node}, [node]
    while latest:
        further = [user for each in latest for user in each.users if user not in reached and _marks(user) == marks]
        if any(user.target is aten.linear.default for user in further):
            return True
        reached.update(further)
        latest = list(dict.fromkeys(further))
    return False


def _marks(node: fx.Node) -> tuple[Hashable, ...]:
    return tuple(key for key in node.meta.get("nn_module_stack") or () if checkpoint_of(key) is not None)


def length_of(edge: Edge, mesh: Mesh) -> int:
    """How many rows, or places along the sequence, there are to cut in pieces."""
    node = edge.conversion
    value = node.all_input_nodes[0] if node.target is run.all_gather else node
    sizes = local_shape(sizes_of(value.meta["val"]), info_of(value).placements, mesh.sizes)
    if node.target in (run.all_gather, run.reduce_scatter):
        return int(sizes[options_of(node).get("dim", 0)])
    return math.prod(sizes[:-1])


def overlap(graph: fx.Graph, pieces: int) -> fx.Graph:
    """A copy in which every edge is one call."""
    graph = copy_graph(graph)
    for edge in edges(graph):
        if edge.is_before:
            _multiply_behind(graph, edge, pieces)
        else:
            _multiply_before(graph, edge, pieces)
    return graph


def _multiply_behind(graph: fx.Graph, edge: Edge, pieces: int) -> None:
    node, products = edge.conversion, sorted(edge.products)
    weights, biases = ([p.args[i] if len(p.args) > i else None for p in products] for i in (1, 2))
    options = options_of(node)
    given = {name: options[name] for name in ("dim",) if name in options}
    if node.target is run.all_gather:
        given.setdefault("dim", 0)
    if any(bias is not None for bias in biases):
        given["biases"] = biases
    last = products[-1]
    with graph.inserting_after(last):
        made = graph.call_function(
            BEFORE[node.target], (node.args[0], weights, node.args[1]), {**given, "pieces": pieces}
        )
    made.meta = {"nn_module_stack": _shared_stack(products), "val": [p.meta["val"] for p in products]}
    made.meta["stack_trace"] = products[0].meta.get("stack_trace")
    infos = [info_of(p) for p in products]
    set_info(made, Info(tuple(i.placements for i in infos), differentiable=any(i.differentiable for i in infos)))
    for index, product in reversed(list(enumerate(products))):
        with graph.inserting_after(made):
            result = graph.call_function(operator.getitem, (made, index))
        result.meta = dict(product.meta)
        product.replace_all_uses_with(result)
        graph.erase_node(product)
    graph.erase_node(node)


def _multiply_before(graph: fx.Graph, edge: Edge, pieces: int) -> None:
    node, (product,) = edge.conversion, edge.products
    options = {"dim": options_of(node)["dim"]} if node.target is run.reduce_scatter else {}
    with graph.inserting_after(node):
        made = graph.call_function(BEHIND[node.target], (*product.args, node.args[1]), {**options, "pieces": pieces})
    made.meta = {**product.meta, "val": node.meta["val"]}
    set_info(made, info_of(node))
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    graph.erase_node(product)


def _shared_stack(nodes: Sequence[fx.Node]) -> dict[str, Any]:
    """The calls that hold all of the nodes."""
    stacks = [node.meta.get("nn_module_stack") or {} for node in nodes]
    out: dict[str, Any] = {}
    for key, value in stacks[0].items():
        if not all(list(stack)[len(out) : len(out) + 1] == [key] for stack in stacks):
            break
        out[key] = value
    return out

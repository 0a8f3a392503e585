"""layouts: draws fill a rank's tensor in the order in which one device fills its own.

PyTorch draws in the order of memory. What is gathered or computed on parts may lie in memory otherwise than on one
device, so each draw of the captured graph notes how its operands lie there, and where a rank's may not, they are
brought into that order (that of ``as_strided``, too, which shows memory):

    rand_like = rand_like(t)                  in_order = in_order(t_whole, (1, 0))
                                       ->     rand_like = rand_like(in_order)

    normal = normal_functional(t)      ->     normal = draw_in_place("aten.normal_.default", t, (1, 0), False, [], {})

The second was ``t.normal_()``: of a tensor that is not contiguous, it draws otherwise than what gives a new tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxshard.ir.conversions import CONVERSIONS
from fxshard.ir.info import info_of, values_of
from fxshard.lowerings.writer import call_like
from fxshard.rules.lookup import draws
from fxshard.rules.recipe import bind, operands_of, with_operands
from fxshard.runtime import collectives as run
from fxshard.runtime.draws import draw_in_place, in_order, order_of
from fxshard.torch_internals import OpOverload

__all__ = ["as_drawn", "as_on_one_device", "carry", "note", "order_drawn"]

aten = torch.ops.aten
_KEY = "fxshard_drawn"
_GIVE_CONTIGUOUS = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.embedding.default)
_KEEP = (run.vary, run.vary_weight, run.all_reduce)
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)


@dataclass(frozen=True)
class Drawn:
    """How one device draws.

    Attributes:
        orders: how each operand lies in memory, see ``order_of``; None where nobody knows.
        in_place: the operator that fills its first operand; None where the result is a new tensor.
    """

    orders: tuple[tuple[tuple[int, ...], bool] | None, ...]
    in_place: Any = None


def note(node: fx.Node) -> None:
    """Notes of a node of the captured graph, if it draws or speaks of memory, how one device does."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or not _speaks_of_memory(node):
        return
    arguments = bind(node)
    inside = not {"dropout_p", "dropout"}.isdisjoint(arguments)  # an attention, an lstm: what they drop is their own
    if inside or arguments.get("memory_format") not in (None, torch.preserve_format):
        return
    orders = tuple(_order(values_of(operand)[0]) for operand in operands_of(node))
    node.meta[_KEY] = Drawn(orders)


def _speaks_of_memory(node: fx.Node) -> bool:
    return node.target is aten.as_strided.default or draws(node)


def carry(node: fx.Node, new: fx.Node, in_place: Any = None) -> fx.Node:
    """What is noted of ``node`` holds of ``new``, which stands for it; ``in_place``: what it is that ``node`` fills."""
    if _KEY in node.meta:
        new.meta[_KEY] = replace(node.meta[_KEY], in_place=in_place)
    return new


def order_drawn(node: fx.Node) -> tuple[int, ...] | None:
    """The order in which one device draws for the first operand of a node; None where it is the plain one."""
    noted = node.meta.get(_KEY)
    order = noted.orders[0] if noted is not None else _order(values_of(operands_of(node)[0])[0])
    return None if order is None or order[0] == tuple(range(len(order[0]))) else order[0]


def _order(value: Any) -> tuple[tuple[int, ...], bool] | None:
    """The order of a tensor; its symbols count as numbers, whose sizes do not matter."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    numbers: dict[Any, int] = {}
    primes = itertools.cycle(_PRIMES)

    def number(size: Any) -> int:
        if isinstance(size, int):
            return size
        for symbol in sorted(size.node.expr.free_symbols, key=str):
            numbers.setdefault(symbol, next(primes))
        return int(size.node.expr.subs(numbers))

    shape, strides = [max(number(size), 0) for size in value.shape], [number(size) for size in value.stride()]
    return order_of(torch.empty_strided(shape, strides, device="meta"))


def as_on_one_device(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value lies in a rank's memory in the order of one device's, as far as that can be told."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        plain = isinstance(value, torch.Tensor) and (_order(value) or ((), True)) == (tuple(range(value.dim())), False)
        lowered = "fxshard" in node.meta and any(c is not None and c.lowering for c in info_of(node).choices)
        alike = found.issuperset(node.all_input_nodes)
        if node.target in CONVERSIONS and node.target not in _KEEP:
            alike = plain
        elif node.target in _GIVE_CONTIGUOUS:
            alike = alike or plain
        elif lowered or node.target in _KEEP:
            alike = alike and plain
        if alike:
            found.add(node)
    return found


def as_drawn(new: fx.Graph, node: fx.Node, alike: Sequence[bool]) -> fx.Node:
    """The draw ``node`` of whole operands, as one device draws.

    Args:
        new: the graph, which has the node.
        node: the draw.
        alike: whether each operand lies in memory as on one device.
    """
    noted, operands = node.meta.get(_KEY), operands_of(node)
    if noted is None or len(noted.orders) != len(operands) or not operands or not _speaks_of_memory(node):
        return node  # what converts its result has the note, too
    plain = [order is None or order == (tuple(range(len(order[0]))), False) for order in noted.orders]
    filled = noted.in_place is not None
    placed = []
    with new.inserting_before(node):
        for operand, order, is_alike in zip(operands, noted.orders, alike, strict=True):
            moved = order is not None and not is_alike and len(order[0]) > 1 and not (filled and operand is operands[0])
            placed.append(call_like(new, in_order, (operand, order[0]), operand) if moved else operand)
        node.args, node.kwargs = with_operands(node, placed, {each: each for each in node.all_input_nodes})
        if not filled or (plain[0] and alike[0]) or noted.orders[0] is None:
            return node
        order, gaps = noted.orders[0]
        told = (str(noted.in_place), operands[0], order, gaps, list(node.args[1:]), dict(node.kwargs))
        made = call_like(new, draw_in_place, told, node)
    new.erase_node(node)
    return made

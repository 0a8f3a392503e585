"""reduce_in_place: sums over the ranks are made where the summands lie, if nothing else reads that memory.

In: a local graph, after all other rewrites.   Out: the same graph; reductions that may be in place say so.

    %h = linear(%x, %w)                 %h = linear(%x, %w)
    %y = all_reduce(%h, tp)        ->   %y = all_reduce(%h, tp, inplace=True)

- ``all_reduce``: its operand is read by nothing else, its operator wrote it to new memory (it is no view), and the
  backward pass of that operator does not need it. Then it is overwritten with the sum. It needs no node of its own in
  the backward pass either: there an all-reduce does nothing.
- ``vary``: its gradient is summed in the backward pass. Each of its readers writes the gradient of this operand to new
  memory, and autograd adds them up there, or in new memory again. So nothing else reads it.

What is not in the two tables below is copied first, as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxshard.runtime.collectives import all_reduce, vary

aten = torch.ops.aten

FRESH: set[Any] = {
    aten.linear.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.matmul.default,
    aten.conv2d.default,
    aten.embedding.default,
    aten.masked_fill.Scalar,
    aten.add.Tensor,
    aten.mul.Tensor,
}
"""Operators whose result is in new memory, and is not saved for their backward pass."""

FRESH_GRADIENT: dict[Any, tuple[int, ...]] = {
    aten.linear.default: (0,),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.matmul.default: (0, 1),
    aten.conv2d.default: (0,),
}
"""Operators whose backward pass writes the gradients of these operands to new memory."""


def reduces_in_place(node: fx.Node) -> bool:
    """Whether the sum that a conversion makes, forward or backward, may be in place."""
    if node.target is all_reduce:
        (source,) = node.all_input_nodes
        return source.target in FRESH and len(source.users) == 1
    return node.target is vary and bool(node.users) and all(_gives_fresh(user, node) for user in node.users)


def _gives_fresh(reader: fx.Node, operand: fx.Node) -> bool:
    if reader.target is aten.to.dtype:
        return bool(reader.meta["val"].dtype != operand.meta["val"].dtype)
    positions = FRESH_GRADIENT.get(reader.target, ())
    return all(i in positions for i, arg in enumerate(reader.args) if arg is operand) and not reader.kwargs


def reduce_in_place(graph: fx.Graph) -> None:
    """Marks the reductions of the module's text, in place."""
    for node in graph.nodes:
        if reduces_in_place(node):
            node.kwargs = {**node.kwargs, "inplace": True}

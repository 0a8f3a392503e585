"""optimize: the same program, with less work.

In: a local graph.   Out: an equal one.

- ``add(linear(x, w), b)`` whose halves ``normalize`` had taken apart, and between which no reduction came, is
  ``linear(x, w, b)`` again; likewise ``addmm``.
- conversions and other pure nodes that nobody reads are gone.

    %h = linear(%x, %w)             %y = linear(%x, %w, %b)
    %y = add(%h, %b)           ->
"""

from __future__ import annotations

import torch
from torch import fx

from fxshard.passes.normalize import is_effect
from fxshard.passes.typing import copy_graph
from fxshard.runtime.collectives import dropout_mask

aten = torch.ops.aten


def optimize(graph: fx.Graph) -> fx.Graph:
    """Applies the rewrites of the module's text to a copy; a graph with nothing to do comes back as it is."""
    if not any(n.meta.get("split_bias") or _is_dead(n) for n in graph.nodes):
        return graph
    graph = copy_graph(graph)
    for node in graph.nodes:
        if node.meta.get("split_bias") and node.target is aten.add.Tensor:
            _fuse_bias(graph, node)
    for node in reversed(graph.nodes):
        if _is_dead(node):
            graph.erase_node(node)
    return graph


def _fuse_bias(graph: fx.Graph, node: fx.Node) -> None:
    product, bias = node.args[:2]
    if not isinstance(product, fx.Node) or len(product.users) != 1 or not isinstance(bias, fx.Node):
        return
    if product.target is aten.linear.default and len(product.args) == 2:
        node.target, node.args = aten.linear.default, (*product.args, bias)
    elif product.target is aten.mm.default:
        node.target, node.args = aten.addmm.default, (bias, *product.args)
    else:
        return
    node.kwargs = {}
    graph.erase_node(product)


def _is_dead(node: fx.Node) -> bool:
    if node.users or node.op not in ("call_function", "get_attr"):
        return False
    return not (node.target is dropout_mask or is_effect(node.target))

"""annotate: the resolved plan's tags go onto the graph.

In: a normalized graph and a resolved plan.   Out: the same graph, where parameters carry their placements, and a
``constrain`` node stands behind every input, result and output whose placements the plan fixes.

    %x = placeholder                     %x  = placeholder
    %h = linear(%x, %w)             ->   %x1 = constrain(%x)     dp: Shard(0)
    output(%h)                           %h  = linear(%x1, %w)
                                         %h1 = constrain(%h)     Replicate: outputs come back whole
                                         output(%h1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from fxshard.ir.info import Info, info_of, set_info
from fxshard.mesh import Mesh
from fxshard.passes.propagate import constrain
from fxshard.placement import REPLICATE, Placement, Placements, Replicate, Shard
from fxshard.plan.resolve import Resolved
from fxshard.torch_internals import Graph


def annotate(graph: fx.Graph, resolved: Resolved, mesh: Mesh) -> fx.Graph:
    """Puts the plan's tags onto a copy of ``graph``. See the module's text."""
    new = Graph()
    copies: dict[fx.Node, fx.Node] = {}
    parts: dict[fx.Node, fx.Node] = {}  # parameters that are gathered for use, as they are stored
    memory: dict[fx.Node, fx.Node] = {}  # what is written to is the buffer or the input, not what is made of it for use
    for node in graph.nodes:
        if node.op == "output":
            break
        narrowed = _narrows(node) and node.args[0] in parts  # the smaller one is gathered
        copy = copies[node] = new.node_copy(node, (parts if narrowed else copies).__getitem__)
        if node.op != "call_function":
            memory[node] = copy
        elif node.target is torch.ops.aten.copy_.default:
            copy.update_arg(0, memory.get(node.args[0], copies[node.args[0]]))
        if narrowed:
            parts[node], copies[node] = copy, _constrain(new, copy, info_of(copies[node.args[0]]).given)
        asked, used = resolved.nodes.get(node), resolved.uses.get(node)
        if node.op == "get_attr":
            set_info(copy, Info((), given=placements(asked or {}, mesh)))
            if used is not None and any(isinstance((asked or {}).get(axis), Shard) for axis in used):
                parts[node], copies[node] = copy, _constrain(new, copy, tuple(used.get(name) for name in mesh.names))
        elif asked is not None:
            copies[node] = _constrain(new, copy, tuple(asked.get(name) for name in mesh.names))
    last = next(iter(reversed(graph.nodes)))
    leaves = []
    for leaf, asked in zip(last.args[0], resolved.outputs, strict=True):
        if isinstance(leaf, fx.Node):
            is_tensor = isinstance(leaf.meta.get("val"), torch.Tensor)
            leaves.append(_constrain(new, copies[leaf], placements(asked, mesh)) if is_tensor else copies[leaf])
        else:
            leaves.append(leaf)
    new.output(tuple(leaves)).meta = dict(last.meta)
    return new


def _narrows(node: fx.Node) -> bool:
    """Whether a node casts a value to a smaller dtype."""
    if node.target is not torch.ops.aten.to.dtype:
        return False
    (source,) = node.all_input_nodes
    return bool(source.meta["val"].element_size() > node.meta["val"].element_size())


def placements(asked: Mapping[str, Placement], mesh: Mesh) -> Placements:
    """One placement an axis; replicated where nothing is asked."""
    found = (asked.get(name, REPLICATE) for name in mesh.names)
    return tuple(REPLICATE if type(p) is Replicate else p for p in found)


def _constrain(new: fx.Graph, node: fx.Node, given: Sequence[Placement | None] | None) -> fx.Node:
    """Fixes a value's placements; on an axis that is None it stays as it comes."""
    made = new.call_function(constrain, (node,))
    made.meta = {k: v for k, v in node.meta.items() if k != "fxshard"}
    set_info(made, Info((), given=tuple(REPLICATE if type(p) is Replicate else p for p in given or ())))
    return made

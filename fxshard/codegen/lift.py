"""lift: the weights whose gradients are summed over the ranks become inputs of the graph.

In: the final graph of a rank.   Out: the same, with further inputs behind its own.

    %w = get_attr[up.weight]
    %v = vary_weight(%w, dp)          ->      %v = placeholder
    %y = linear(%x, %v)                       %y = linear(%x, %v)

Whoever calls it decides how the gradients of these inputs are summed. ``torch.compile`` needs that: the buckets of
``training.buckets`` fill as a side effect of the backward pass, and a compiled backward pass has no side effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fxshard.runtime.collectives import vary_weight


@dataclass(frozen=True)
class Lifted:
    """A weight that became an input.

    Attributes:
        name: of the weight.
        axes: the mesh axes over which its gradient is summed.
    """

    name: str
    axes: tuple[str, ...]


def lift(graph: fx.Graph) -> tuple[fx.Graph, Sequence[Lifted]]:
    """The graph with these weights as inputs, and the weights, in the order of the inputs."""
    out = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    out.output(out.graph_copy(graph, copies))
    end = [node for node in out.nodes if node.op == "placeholder"][-1:]
    lifted = []
    for node in [node for node in out.nodes if node.target is vary_weight]:
        weight = node.args[0]
        with out.inserting_after(end[0]) if end else out.inserting_before(next(iter(out.nodes))):
            given = out.placeholder(node.name)
        end = [given]
        given.meta = dict(node.meta)
        node.replace_all_uses_with(given)
        out.erase_node(node)
        if not weight.users:
            out.erase_node(weight)
        lifted.append(Lifted(str(weight.target), tuple(map(str, node.args[1:]))))
    return out, lifted

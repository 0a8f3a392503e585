"""weights: the conversions of parameters, as their gradients and their memory ask for.

In: a local graph.   Out: an equal one.

- A parameter that every rank holds whole, and that nothing reads but one conversion to Varying, over one or more axes:
  its gradient needs not be summed at once, on its own. ``training.buckets`` sums many together.
- A parameter that is stored in parts and gathered for use: the whole is not kept for the backward pass, which gathers
  it once more (``runtime.regather``).

    %a = vary(%w, dp)                          %b = vary_weight(%w, dp, cp)
    %b = vary(%a, cp)                    ->
    %v = all_gather(%w, dp, True, dim=1) ->    %v = gather_weight(%w, dp, dim=1, summed=True)
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import fx

from fxshard.ir.info import local_bytes, values_of
from fxshard.ir.origins import checkpoint_of
from fxshard.mesh import Mesh
from fxshard.runtime import collectives as run

aten = torch.ops.aten

UNKEPT: dict[object, int] = {
    aten.embedding.default: 0,
    aten.linear.default: 2,
    aten.addmm.default: 0,
    aten.conv2d.default: 2,
    aten.layer_norm.default: 3,
}
"""Operators that do not need this operand for their gradient."""
RIDES = 2**15
"""A weight of so few bytes goes with those that are gathered again, though nothing asks for it again."""


def convert_weights(graph: fx.Graph) -> None:
    """Applies the rewrites of the module's text, in place."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.meta.get("is_parameter"):
            _vary_at_once(graph, node)
            for reader in (node, *(user for user in node.users if user.target is torch.ops.aten.to.dtype)):
                for user in list(reader.users):
                    if user.target is run.all_gather:
                        _gather(graph, user)


def converts_weights(graph: fx.Graph) -> bool:
    """Whether there is anything for ``convert_weights`` to do."""
    reads = (node for node in graph.nodes if node.target in (run.vary, run.all_gather))
    return any(
        source.op == "get_attr" or source.target is torch.ops.aten.to.dtype for n in reads for source in n.args[:1]
    )


def _vary_at_once(graph: fx.Graph, weight: fx.Node) -> None:
    last, axes = weight, []
    while len(last.users) == 1 and next(iter(last.users)).target is run.vary:
        (last,) = last.users
        axes.append(last.args[1])
    if not axes:
        return
    with graph.inserting_after(last):
        made = graph.call_function(run.vary_weight, (weight, *axes))
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    while last is not weight:
        (before,) = last.all_input_nodes
        graph.erase_node(last)
        last = before


def _gather(graph: fx.Graph, node: fx.Node) -> None:
    options = {**node.kwargs, **({"summed": True} if node.args[2:] == (True,) else {})}
    with graph.inserting_after(node):
        made = graph.call_function(run.gather_weight, node.args[:2], dict(sorted(options.items())))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


@dataclass(frozen=True)
class Packed:
    """Weights that are gathered at once.

    Attributes:
        nodes: their ``gather_weight`` nodes.
        lane: which packs they take turns with.
        ahead: they may be gathered while the pack before them is computed with.
    """

    nodes: tuple[fx.Node, ...]
    lane: int
    ahead: bool


def packs_of(graph: fx.Graph, mesh: Mesh, small: int, large: int) -> tuple[Packed, ...]:
    """What ``runtime.packs`` gathers at once, and ahead, in the order of the program.

    Small weights that are gathered one after the other are gathered together. Those of a pack have one dtype; all of
    them require a gradient, or none; all are gathered again for the gradients of what reads them, or none; and they are
    read in the same checkpointed call. Within such calls nothing is gathered ahead: they may stop before they end.

    Args:
        graph: the final one.
        mesh: the mesh.
        small: the most bytes of a pack of several.
        large: the most bytes of a weight that is gathered ahead.
    """
    gathers = [node for node in graph.nodes if node.target is run.gather_weight]
    times: dict[tuple[object, object], int] = {}
    for node in gathers:
        times[node.args[:2]] = times.get(node.args[:2], 0) + 1
    lanes: dict[Hashable, int] = {}
    packs: list[tuple[list[fx.Node], int, bool]] = []
    filled: dict[int, tuple[list[fx.Node], int]] = {}
    for node in gathers:
        weight, axis = node.args
        assert isinstance(weight, fx.Node)
        size = local_bytes(node, mesh)
        odd = weight.op != "get_attr" or {"blocks", "lengths"} & node.kwargs.keys() or times[node.args] > 1
        if odd or not 0 < size <= large:
            continue
        marks = [key for key in node.meta.get("nn_module_stack") or () if checkpoint_of(key) is not None]
        kept = size <= RIDES or any(UNKEPT.get(user.target, -1) != _place(node, user) for user in node.users)
        kind = axis, values_of(node)[0].dtype, bool(node.kwargs.get("summed")), weight.meta.get("requires_grad")
        lane = lanes.setdefault((*kind, kept, *marks), len(lanes))
        nodes, total = filled.get(lane, ([], small))
        if total + size > small:
            nodes, total = [], 0
            packs.append((nodes, lane, not marks))
        nodes.append(node)
        filled[lane] = nodes, total + size
    return tuple(Packed(tuple(nodes), lane, ahead) for nodes, lane, ahead in packs)


def dim_of(gather: fx.Node) -> int:
    """Along which dim the weight of a ``gather_weight`` node is cut."""
    dim = gather.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim


def _place(operand: fx.Node, reader: fx.Node) -> int:
    return next((i for i, each in enumerate(reader.args) if each is operand), -2)

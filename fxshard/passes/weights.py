"""weights: the conversions of parameters, as their gradients and their memory ask for.

In: a local graph.   Out: an equal one.

- A parameter that every rank holds whole, and that nothing reads but one conversion to Varying, over one or more axes:
  its gradient needs not be summed at once, on its own. ``runtime.buckets`` sums many together.
- A parameter that is stored in parts and gathered for use: the whole is not kept for the backward pass, which gathers
  it once more (``runtime.regather``).

    %a = vary(%w, dp)                          %b = vary_weight(%w, dp, cp)
    %b = vary(%a, cp)                    ->
    %p = all_gather(%w, dp, True)              %v = gather_weight(%w, dp, summed=True, dim=1)
    %v = concat(%p, dp, 1)               ->
"""

from __future__ import annotations

import torch
from torch import fx

from fxshard.passes.typing import info_of, set_info
from fxshard.runtime import collectives as run


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
    stacked = [user for user in node.users if user.target is run.concat]
    if stacked and len(node.users) > 1:
        return
    last = stacked[0] if stacked else node
    options = {name: value for name, value in last.kwargs.items() if name in ("blocks", "lengths")}
    if stacked and last.args[2]:
        options["dim"] = last.args[2]
    if len(node.args) > 2 and node.args[2]:
        options["summed"] = True
    with graph.inserting_after(last):
        made = graph.call_function(run.gather_weight, (node.args[0], node.args[1]), dict(sorted(options.items())))
    made.meta = dict(last.meta)
    set_info(made, info_of(last))
    last.replace_all_uses_with(made)
    graph.erase_node(last)
    if stacked:
        graph.erase_node(node)

"""optimize: the same program, with less work.

In: a local graph.   Out: an equal one.

- ``add(linear(x, w), b)`` whose halves ``normalize`` had taken apart, and between which no reduction came, is
  ``linear(x, w, b)`` again; likewise ``addmm``.
- where a weight, or a value that several calls read, is cast to a lower precision first and made Varying then, it is
  made Varying first: one sum of its gradients, in its own precision, and not one for each cast in theirs.
- the conversions of parameters become those of ``weights.py``.
- conversions and other pure nodes that nobody reads are gone.
- sums over the ranks are made in place where nothing else reads the summands: ``reduce_in_place.py``.
- what depends on no input and no weight is computed here (``fold.py``), and the ways of a branch stand together
  (``enclose.py``).

    %h = linear(%x, %w)             %y = linear(%x, %w, %b)
    %y = add(%h, %b)           ->
"""

from __future__ import annotations

import torch
from torch import fx

from fxshard.ir.info import copy_graph, info_of, set_info
from fxshard.passes.enclose import enclose
from fxshard.passes.fold import fold
from fxshard.rules.effects import is_dead
from fxshard.runtime.collectives import vary
from fxshard.schedule.overlap import bring_together
from fxshard.schedule.reduce_in_place import reduce_in_place, reduces_in_place
from fxshard.schedule.stored_weights import convert_weights, converts_weights

aten = torch.ops.aten


def optimize(graph: fx.Graph, root: torch.nn.Module, pieces: int = 0) -> fx.Graph:
    """Applies the rewrites of the module's text; a graph with nothing to do comes back as it is.

    Args:
        graph: a rank's program.
        root: gets the constants that are computed here.
        pieces: in how many pieces products will be computed beside their collective: those are brought together.
    """
    graph = fold(_rewritten(graph), root)
    return enclose(bring_together(graph) if pieces else graph)


def _rewritten(graph: fx.Graph) -> fx.Graph:
    todo = (n.meta.get("split_bias") or is_dead(n) or _varied_cast(n) or reduces_in_place(n) for n in graph.nodes)
    idle = not any(todo)
    if idle and not converts_weights(graph):
        return graph
    graph = copy_graph(graph)
    for node in graph.nodes:
        if node.meta.get("split_bias") and node.target is aten.add.Tensor:
            _fuse_bias(graph, node)
    for node in graph.nodes:
        if node.target is vary:
            _vary_before_casts(graph, node)
    for node in reversed(graph.nodes):
        if is_dead(node):
            graph.erase_node(node)
    convert_weights(graph)
    reduce_in_place(graph)
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


def _varied_cast(node: fx.Node) -> fx.Node | None:
    """The source of a cast to a lower precision that only the conversion ``node`` reads, which makes it Varying."""
    if node.target is not vary:
        return None
    cast = node.args[0]
    if not isinstance(cast, fx.Node) or cast.target is not aten.to.dtype or len(cast.users) != 1:
        return None
    source = cast.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"].dtype, cast.meta["val"].dtype
    return source if before.is_floating_point and before.itemsize > after.itemsize else None


def _vary_before_casts(graph: fx.Graph, node: fx.Node) -> None:
    """Move ``node``, and the conversions like it behind other casts of the same value, in front of the casts."""
    source = _varied_cast(node)
    if source is None:
        return
    readers = [user for cast in source.users for user in cast.users if cast.target is aten.to.dtype]
    group = [user for user in readers if user.args[1:] == node.args[1:] and _varied_cast(user) is source]
    if len(group) < 2 and source.op != "get_attr":
        return
    casts = [item.all_input_nodes[0] for item in group]
    with graph.inserting_before(min(casts)):
        varied = graph.call_function(vary, (source, *node.args[1:]))
    varied.meta = {**node.meta, "val": source.meta["val"]}
    for item, cast in zip(group, casts, strict=True):
        cast.replace_input_with(source, varied)
        set_info(cast, info_of(item))
        item.replace_all_uses_with(cast)
        graph.erase_node(item)

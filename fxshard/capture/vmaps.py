"""``torch.vmap`` written out: what runs over a mapped dim becomes operators on the whole tensors.

``torch.export`` records the function that is mapped, on values without the mapped dims, between calls that enter and
leave the map. No rule could read that. So each region is traced once more, below functorch, where every operator has
become one on all of the batch:

    _vmap_increment_nesting(8)                                     unsqueeze = unsqueeze(i, 1)
    a = _add_batch_dim(i, 0, 1)                            ->      le = le(unsqueeze, j)
    le = le(a, j)
    y = _remove_batch_dim(le, 1, 8, 0)
    _vmap_decrement_nesting()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxshard.errors import CaptureError
from fxshard.ir.origins import SOURCE_META
from fxshard.torch_internals import ENTER_VMAP, LAZY_LOAD, LEAVE_VMAP, MODE_MARKS, Graph, leave_vmaps, vmap_level

__all__ = ["unmap"]


def unmap(graph: fx.Graph) -> None:
    """Replace, in ``graph``, every region of ``torch.vmap``.

    Raises:
        CaptureError: a region holds what cannot be traced again.
    """
    for region in list(_regions(graph)):
        _replace(graph, region)
    for node in reversed(graph.nodes):
        if node.target is LAZY_LOAD and not node.users:
            graph.erase_node(node)


def _regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes of each outermost region, in order."""
    depth, region = 0, []
    for node in graph.nodes:
        depth += node.target is ENTER_VMAP
        if depth:
            region.append(node)
        depth -= node.target is LEAVE_VMAP
        if not depth and region:
            yield region
            region = []


def _replace(graph: fx.Graph, region: Sequence[fx.Node]) -> None:
    inside = set(region)
    operands = [node for node in region if node.op == "get_attr"]  # constants are not of the region
    inside -= set(operands)
    body = [node for node in region if node in inside]
    inputs = list(dict.fromkeys(o for node in body for o in node.all_input_nodes if o not in inside))
    outputs = [node for node in body if any(user not in inside for user in node.users)]
    if any(node.target in MODE_MARKS for node in body):
        raise _refused(region[0], "turns gradients or autocast on or off")
    traced = _trace(region[0], _function(body, inputs, outputs), [node.meta["val"] for node in inputs])
    env: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    source = {key: region[-1].meta[key] for key in SOURCE_META if key in region[-1].meta}
    origin = next((node.meta for node in body if "stack_trace" in node.meta), {})
    source = {key: origin[key] for key in SOURCE_META if key in origin} | source
    with graph.inserting_before(region[0]):
        for constant in operands:
            region[0].prepend(constant)
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                raise _refused(region[0], "makes a constant tensor")
            if node.op == "call_function":
                env[node] = new = graph.node_copy(node, env.__getitem__)
                new.meta = {**source, "val": node.meta["val"]}
    (results,) = next(iter(reversed(traced.graph.nodes))).args
    for node, result in zip(outputs, results, strict=True):
        node.replace_all_uses_with(env[result], delete_user_cb=lambda user: user not in inside)
    for node in reversed(body):
        graph.erase_node(node)


def _function(body: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """The region as a function of what it reads from outside."""
    alone = Graph()
    env = {node: alone.placeholder(node.name) for node in inputs}
    for node in body:
        env[node] = alone.node_copy(node, env.__getitem__)
    alone.output(tuple(env[node] for node in outputs))
    return fx.GraphModule({}, alone)


def _trace(first: fx.Node, function: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule:
    modes = [mode for value in values if (mode := getattr(value, "fake_mode", None)) is not None]
    if not modes:
        raise _refused(first, "reads no tensor from outside")
    level = vmap_level()
    try:
        with modes[0], torch.no_grad():
            return make_fx(fx.Interpreter(function).run)(*values)
    except Exception as error:
        leave_vmaps(level)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _refused(first, f"cannot be traced again: {reason}") from None


def _refused(node: fx.Node, why: str) -> CaptureError:
    return CaptureError(
        f"the model calls torch.vmap with a function that {why}",
        op="torch.vmap",
        fix="write the mapped dims out with broadcasting",
    )

"""fold: what depends on no input and no weight is computed once, at compile time.

In: a local graph, after all other rewrites.   Out: an equal one, with constants in place of such calls.

    %at  = arange(64)                       %mask = get_attr "_folded_mask"
    %row = unsqueeze(%at, 0)          ->    %y    = attention(%q, %k, %v, %mask)
    %mask = le(%row, unsqueeze(%at, 1))
    %y   = attention(%q, %k, %v, %mask)

Only integers and booleans, such as positions and masks: floats may differ by device in the last bit. Only what is
small. Not what the program returns, or a view of which it might: its caller may write to it. Not what a rank computes
from its place in the mesh: all ranks share one graph.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx

from fxshard.ir.info import copy_graph, is_float
from fxshard.rules.effects import is_dead, is_mutating, is_pure
from fxshard.runtime.collectives import chunk
from fxshard.runtime.module import place
from fxshard.torch_internals import OpOverload, has_kernel

aten = torch.ops.aten

COPIES = {aten.scaled_dot_product_attention.default, aten.linear.default, aten.matmul.default}
"""Operators made of others that give new tensors."""

LIMIT_BYTES = 2**20
"""The largest constant that is kept."""

PREFIX = "_folded_"
"""How the names of these constants begin."""


def fold(graph: fx.Graph, root: torch.nn.Module) -> fx.Graph:
    """Applies the rewrite of the module's text to a copy; the constants become buffers of ``root``."""
    values = _values(graph)
    kept = [node for node in values if node.op == "call_function" and _is_worth(node, values)]
    if not kept:
        return graph
    names = {node.name: values[node].clone(memory_format=torch.contiguous_format) for node in kept}
    graph = copy_graph(graph)
    for node in list(graph.nodes):
        if node.name in names:
            value = names[node.name]
            target = f"{PREFIX}{node.name}_{_digest(value)}"
            place(root, target, value, persistent=False)
            with graph.inserting_before(node):
                made = graph.create_node("get_attr", target, name=node.name + "_constant")
            made.meta = {**node.meta, "is_parameter": False, "requires_grad": False}
            node.replace_all_uses_with(made)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and is_dead(node):
            graph.erase_node(node)
    return graph


def _digest(value: torch.Tensor) -> str:
    """Tells constants of other captures from this one: a rank's module holds those of all."""
    text = f"{value.dtype}{tuple(value.shape)}{value.tolist()}"
    return hashlib.sha1(text.encode()).hexdigest()[:8]


def _values(graph: fx.Graph) -> dict[fx.Node, Any]:
    """The calls that depend on nothing but literals, and what each gives."""
    found: dict[fx.Node, Any] = {}
    with torch.no_grad(), torch.device("cpu"):
        for node in graph.nodes:
            if _is_foldable(node) and all(n in found for n in node.all_input_nodes):
                args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda x: _given(x, found))
                found[node] = node.target(*args, **kwargs)
    return found


def _given(x: Any, found: dict[fx.Node, Any]) -> Any:
    if isinstance(x, fx.Node):
        return found[x]
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _is_foldable(node: fx.Node) -> bool:
    """Whether a call gives one small tensor of integers or booleans, and always the same one."""
    if not is_pure(node):
        return False
    value = node.meta["val"]
    return not is_float(value) and bool(value.numel() * value.element_size() <= LIMIT_BYTES)


def _is_worth(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether a value is read by what stays, and never given away."""
    return any(user not in values for user in node.users) and all(u in values or _keeps(u) for u in node.users)


def _keeps(node: fx.Node) -> bool:
    """Whether a call does not give what it reads, or a view of it, to the caller of the program."""
    if node.op != "call_function" or (isinstance(node.target, OpOverload) and is_mutating(node.target)):
        return False
    return _copies(node) or (_may_view(node) and all(map(_keeps, node.users)))


def _may_view(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) or node.target is chunk


def _copies(node: fx.Node) -> bool:
    """Whether an operator surely gives new tensors. Of one that is made of others its schema says nothing."""
    target = node.target
    if target is aten.to.dtype:
        return bool(node.meta["val"].dtype != node.all_input_nodes[0].meta["val"].dtype)
    if not isinstance(target, OpOverload) or any(r.alias_info is not None for r in target._schema.returns):
        return False
    return target in COPIES or not has_kernel(target.name(), "CompositeImplicitAutograd")

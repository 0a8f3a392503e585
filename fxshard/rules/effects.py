"""What a call does beside giving a result: whether it writes, draws, or always gives the same."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from fxshard.rules.lookup import draws
from fxshard.rules.recipe import written
from fxshard.torch_internals import OpOverload

_COPY = torch.ops.aten.clone.default


@functools.cache
def is_mutating(target: Any) -> bool:
    """Say whether the schema of an operator writes to an operand, or changes its shape in place."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(
        argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments
    )


@functools.cache
def may_view(target: Any) -> bool:
    """Say whether an operator returns its first operand, or a view of it."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.arguments or is_mutating(target):
        return False
    return schema.arguments[0].alias_info is not None


def shown_operand(node: fx.Node) -> Any:
    """The operand whose memory the result of a call may show; None if it has memory of its own.

    The schema says which; some are silent (``einsum("ij->ji")``, ``atleast_1d``), where the values tell.
    """
    if may_view(node.target) or is_mutating(node.target):
        return node.args[0]
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten" or node.target is _COPY:
        return None  # what the compiler makes may have the value of what it stands for
    return next((operand for operand in node.all_input_nodes if shares_memory(node, operand)), None)


def shares_memory(node: fx.Node, other: fx.Node) -> bool:
    """Say whether the values of two nodes lie in one memory."""
    one, two = node.meta.get("val"), other.meta.get("val")
    if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor):
        return False
    if one.layout != torch.strided or two.layout != torch.strided:
        return False
    return bool(one.untyped_storage()._cdata == two.untyped_storage()._cdata)


def base_of(node: Any) -> Any:
    """The value whose memory a node shows: itself, or what it is a view of, or writes to and returns."""
    while isinstance(node, fx.Node) and (operand := shown_operand(node)) is not None:
        node = operand
    return node


@functools.cache
def _is_effect(target: Any) -> bool:
    return isinstance(target, OpOverload) and (is_mutating(target) or not target._schema.returns)


def has_effect(node: fx.Node) -> bool:
    """Say whether a call must stay though nobody reads it: it writes, draws random numbers, or returns nothing.

    Running statistics are written by norms in training, whose schemas do not say so.
    """
    return _is_effect(node.target) or bool(written(node)) or draws(node)


def is_dead(node: fx.Node) -> bool:
    """Say whether a node may go: nobody reads what it gives, and it does nothing else."""
    return not node.users and node.op in ("call_function", "get_attr") and not has_effect(node)


def is_pure(node: fx.Node) -> bool:
    """Say whether a call gives one tensor, of a size that is known, and the same whenever its operands are."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or has_effect(node):
        return False
    if not isinstance(value, torch.Tensor) or "empty" in node.target._schema.name:
        return False
    return all(isinstance(size, int) for size in value.shape)

"""What a call does beside giving a result: whether it writes, draws, or always gives the same."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from fxshard.torch_internals import OpOverload


@functools.cache
def is_mutating(target: Any) -> bool:
    """Say whether the schema of an operator writes to an operand, or changes its shape in place."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(
        argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments
    )


@functools.cache
def is_effect(target: Any) -> bool:
    """Say whether a node must stay though nobody reads it: it writes, draws random numbers, or returns nothing."""
    if not isinstance(target, OpOverload):
        return False
    return is_mutating(target) or torch.Tag.nondeterministic_seeded in target.tags or not target._schema.returns


def is_pure(node: fx.Node) -> bool:
    """Say whether a call gives one tensor, of a size that is known, and the same whenever its operands are."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or is_effect(node.target):
        return False
    if not isinstance(value, torch.Tensor) or "empty" in node.target._schema.name:
        return False
    return all(isinstance(size, int) for size in value.shape)

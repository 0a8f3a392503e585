"""Where context parallelism splits: the inputs along the sequence, and the heads of every attention.

Everything between attentions works on each position alone, so it follows the inputs. An attention needs all positions
of a head: its queries, keys and values are exchanged from parts of the sequence to parts of the heads, and its result
back.

Reference: DeepSpeed Ulysses (Jacobs et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxshard.plan.graph import Graph, shapes_of
from fxshard.rules.lookup import WEIGHT_VIEWS
from fxshard.rules.recipe import bind
from fxshard.rules.table import name_of

HEADS, POSITIONS = -3, -2
"""The dims of the queries of an attention: ``[..., heads, positions, features]``."""

SEQUENCE = 1
"""The dim of the inputs, and of what is computed from them, that is the sequence: ``[batch, sequence, ...]``."""


@dataclass(frozen=True)
class Attention:
    """One attention, as context parallelism sees it.

    Attributes:
        node: the call.
        query: its queries.
        shared: its keys and values, before they are repeated for the queries that share them.
        heads: how many heads the queries have.
        key_heads: how many the keys and values have.
    """

    node: fx.Node
    query: fx.Node
    shared: tuple[fx.Node, fx.Node]
    heads: int
    key_heads: int


def attentions(facts: Graph) -> Iterator[Attention]:
    """The attentions of a graph whose operands have heads."""
    for node in facts.order:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default and node in facts.learned:
            arguments = bind(node)
            query, key, value = (arguments[name] for name in ("query", "key", "value"))
            shapes = [shapes_of(x)[0] for x in (query, key, value)]
            if any(len(shape) < 4 or not isinstance(shape[HEADS], int) for shape in shapes):
                continue
            shared = _before_repeat(key, facts), _before_repeat(value, facts)
            heads, key_heads = shapes[0][HEADS], min(shapes_of(x)[0][HEADS] for x in shared)
            assert isinstance(heads, int)
            assert isinstance(key_heads, int)
            yield Attention(node, query, shared, heads, key_heads)


def _before_repeat(value: fx.Node, facts: Graph) -> fx.Node:
    """Keys or values before their heads were repeated: ``[b, k, s, d] -> [b, k, 1, s, d] -> [b, k, r, s, d] -> ..``."""
    shape, found = shapes_of(value)[0], value
    while len(facts.operands.get(value, ())) == 1 and name_of(value.target)[1] in REPEATS:
        (value,) = facts.operands[value]
        before = shapes_of(value)[0]
        if len(before) == len(shape) and before[HEADS + 1 :] == shape[HEADS + 1 :] and len(value.users) == 1:
            found = value
    return found


REPEATS = WEIGHT_VIEWS | {"aten.expand", "aten.slice", "aten.clone", "aten.contiguous", "aten.flatten"}
REPEATS |= {"aten.repeat_interleave", "aten._unsafe_view"}


def sequences(facts: Graph, inputs: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    """The inputs that hold the sequence along dim 1: what tables look up, or what features of 3 dims are made of."""
    found = {name: node for name, node in inputs.items() if _is_sequence(node, facts)}
    length = shapes_of(next(iter(found.values())))[0][SEQUENCE] if found else 0
    return {name: node for name, node in found.items() if shapes_of(node)[0][SEQUENCE] == length}


def _is_sequence(node: fx.Node, facts: Graph) -> bool:
    shape = shapes_of(node)[0]
    for user in node.users:
        operands = facts.operands.get(user, [])
        if len(shape) == SEQUENCE + 1 and user.target is torch.ops.aten.embedding.default and operands[1] is node:
            return True
        if len(shape) == SEQUENCE + 2 and any(o in facts.weights for o in operands) and "conv" not in str(user.target):
            return True
        alike = len(operands) == 1 and shapes_of(user)[0] == shape  # a cast, dropout
        if alike and _is_sequence(user, facts):
            return True
    return False

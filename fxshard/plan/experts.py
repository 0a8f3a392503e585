"""Finds the weights of experts in the dataflow, without knowing any name.

Experts are matrices of one shape, stacked in one weight, of which each row of the activations takes one. Models compute
them in three ways, and in each one dim of the weight counts the experts:

    grouped    rows sorted by expert, each group with its own matrix: the groups of the product
    picked     w[positions], positions that a router computed, and then a product: the dim that is picked from
    batched    bmm, einsum "ted, edf -> tef": a batch dim that is the weight's too, through two such products in a row

Reference: GShard (Lepikhin et al., 2020).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from fxshard.placement import Shard, shard
from fxshard.plan.detect import of_base
from fxshard.plan.graph import Graph, contraction, shapes_of, shares_among
from fxshard.rules.recipe import Factor

MATRICES = 3
"""The least dims of a weight that holds matrices of experts."""

FURTHER = 24
"""How many calls may lie between the two products of an expert."""


def find_experts(facts: Graph, size: int) -> dict[fx.Node, Shard]:
    """How an axis of ``size`` ranks deals out the weights of experts, and biases that are picked with them."""
    found: dict[fx.Node, Shard] = {}
    picked_by: set[fx.Node] = set()
    for node in facts.order:
        if node.op != "call_function" or node not in facts.operands:
            continue
        for call, factor, position in _of_experts(node, facts):
            found |= _dealt_out(call, factor, position, facts, size)
            if factor.lowering == "picked":
                picked_by.add(facts.operands[call][1])
    for node in facts.order:
        picks = _picks(node, facts) if node.op == "call_function" else None
        if picks is not None and facts.operands[node][1] in picked_by:
            found |= _dealt_out(node, picks, 0, facts, size)
    return found


def _dealt_out(node: fx.Node, factor: Factor, position: int, facts: Graph, size: int) -> dict[fx.Node, Shard]:
    """The weight behind an operand of a call, split along the experts; nothing where it cannot be."""
    view, at = facts.operands[node][position], factor.inputs[position]
    shares = shares_among(factor.size, size)
    if shares is None or at is None or at.blocks != (1,):
        return {}
    placement = of_base(view, shard(at.dim, shares=shares), facts, size)
    return {} if placement is None else {facts.weights[view]: placement}


def _of_experts(node: fx.Node, facts: Graph) -> Iterator[tuple[fx.Node, Factor, int]]:
    """The factors that count experts, of a call or of the next product, and the operand that holds their matrices."""
    picks = _picks(node, facts)
    if picks is not None and _matrices(facts.operands[node][0], facts) and _multiplied(node, facts):
        yield node, picks, 0
    recipe = facts.recipe(node)
    for factor in recipe.factors if recipe is not None else ():
        if factor.lowering == "experts" and facts.operands[node][1] in facts.weights:
            yield node, factor, 1
    for factor, position in _batched(node, facts):
        after = _next_product(node, factor, facts)
        if after is not None:
            further, at, where = after
            yield node, factor, position
            yield from ((further, f, p) for f, p in _batched(further, facts) if f.inputs[at] == where)


def _matrices(operand: fx.Node, facts: Graph) -> bool:
    return operand in facts.weights and len(shapes_of(facts.weights[operand])[0]) >= MATRICES


def _picks(node: fx.Node, facts: Graph) -> Factor | None:
    """The factor along which a call picks from a weight, at positions that the model computed."""
    operands = facts.operands.get(node, [])
    if len(operands) != 2 or operands[0] not in facts.weights or operands[1] not in facts.learned:
        return None
    recipe = facts.recipe(node)
    return next((f for f in recipe.factors if f.lowering == "picked"), None) if recipe is not None else None


def _multiplied(node: fx.Node, facts: Graph) -> bool:
    """Whether what is picked, or a view of it, is multiplied with activations."""
    return any(
        contraction(user, facts) is not None or (user in facts.weights and _multiplied(user, facts))
        for user in node.users
        if user.op == "call_function" and user in facts.operands
    )


def _batched(node: fx.Node, facts: Graph) -> list[tuple[Factor, int]]:
    """The factors of a product over which the matrices of a weight are a batch, and which operand these are."""
    recipe, operands = facts.recipe(node), facts.operands[node]
    found = []
    for summed in recipe.factors if recipe is not None else ():
        at = [i for i, a in enumerate(summed.inputs) if a is not None]
        matrices = [i for i in at if _matrices(operands[i], facts)]
        if any(summed.outputs) or len(at) != 2 or len(matrices) != 1:
            continue
        (position,) = matrices
        for factor in recipe.factors if recipe is not None else ():
            where = factor.inputs[position]
            if where is not None and all(factor.outputs) and factor.lowering is None:
                base = of_base(operands[position], Shard(where.dim), facts, 1)
                if base is not None and base.dim == 0:
                    found.append((factor, position))
    return found


def _next_product(node: fx.Node, factor: Factor, facts: Graph) -> tuple[fx.Node, int, object] | None:
    """The next product that has other matrices of its own for each unit of the factor: the node, the operand that
    carries the factor, and where it sits in it.
    """
    at = factor.outputs[0]
    queue, seen = [(node, at)], {node}
    for value, where in queue:
        for user in value.users:
            if user in seen or user.op != "call_function" or user not in facts.operands or len(seen) > FURTHER:
                continue
            seen.add(user)
            operands = facts.operands[user]
            position = operands.index(value) if value in operands else None
            recipe = facts.recipe(user)
            if position is None or recipe is None:
                queue += [(user, where)] if user.target is operator.getitem else []
                continue
            if any(f.inputs[position] == where for f, p in _batched(user, facts) if p != position):
                return user, position, where
            queue += [(user, f.outputs[0]) for f in recipe.factors if f.inputs[position] == where and all(f.outputs)]
    return None

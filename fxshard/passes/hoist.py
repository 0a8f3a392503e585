"""Cuts move up: what every reader wants split is computed split.

``propagate`` looks forward only: a value computed from whole operands is whole, and where a split reader meets it, it
is cut, for free, but its gradient must then be gathered. Where *every* reader cuts it alike, its own call may be split
instead, and its operands cut. Going through the graph from the end, a position bias that all layers read is cut in
front of the first of them, and a small embedding is looked up for this rank's ids only:

    %e = embedding(%w, %ids)      Replicate, %e1 = chunk(%e)      backward: all_gather of %e's gradient
    %e = embedding(%w, %ids1)     Shard(0),  %ids1 = chunk(%ids)  backward: all_reduce of %w's gradient

A call is changed only if that moves no more bytes in the backward pass than before.

``hoist_varies`` does the same for values whose readers all need them Varying, that is, whose gradients the ranks must
sum: it is cheaper to sum the gradient of what they were made of, where that is smaller, or summed already.

    %r = index(%x, %rows), %r1 = vary(%r)     backward: all_reduce of a row for each of a token's experts
    %x1 = vary(%x), %r = index(%x1, %rows)    backward: all_reduce of a row for each token
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from fxshard.ir.facts import Facts, recipe_of, split_choice
from fxshard.ir.info import Choice
from fxshard.lowerings.split_experts import before
from fxshard.placement import REPLICATE, VARYING, Placement, Varying, cut_of, is_shard, same
from fxshard.rules.lookup import draws
from fxshard.rules.recipe import At, written
from fxshard.torch_internals import OpOverload

CHAIN = 4
"""How many calls in a row may be passed by the sum of a gradient."""


def hoist_cuts(facts: Sequence[Facts], size: int, sizes: Sequence[int]) -> None:
    """Splits calls whose readers all cut their result alike, on the latest axis; ``sizes``: of the outer ones."""
    order = {fact.node.name: (at, fact.node) for at, fact in enumerate(facts)}
    for fact in reversed(facts):
        if fact.node.op != "call_function" or not fact.differentiable or fact.stored or not _is_whole(fact):
            continue
        wanted = _wanted_by_all(fact)
        if wanted is None or fact.is_list or any(o.is_list for o in fact.operands):
            continue
        choice = _split(fact, wanted, size, sizes)
        if choice is not None and _moves(fact, choice) <= fact.num_bytes and _may_follow(fact, wanted, order):
            fact.replace(choice)


def _is_whole(fact: Facts) -> bool:
    choice = fact.choices[-1]
    return choice is None or (choice.kind == "whole" and fact.current[0] is REPLICATE)


def _may_follow(fact: Facts, wanted: Placement, order: Mapping[str, tuple[int, fx.Node]]) -> bool:
    """Whether a call may come behind what says where groups end, if it is by groups that its result is cut."""
    groups = cut_of(wanted).groups
    if groups is None:
        return True
    _, ends = order[groups.ends]
    at = order[fact.node.name][0]
    later = [node for node in before(ends) if order[node.name][0] >= at]  # these must be moved in front of the call
    return all(node is not fact.node and not draws(node) and not written(node) for node in later)


def hoist_varies(facts: Sequence[Facts]) -> None:
    """Lets calls give Varying results, on the latest axis, where every reader wants such, and the backward pass moves
    less for it: every rank runs the same call, so its gradients sum before the call as well as behind it.
    """
    for fact in reversed(facts):
        if not fact.differentiable or fact.is_list or fact.current[0] is not REPLICATE:
            continue
        readers = list(dict.fromkeys(fact.readers))
        found = [chain for r in readers if (chain := _varied(r, fact, CHAIN)) is not None]
        ends = [end for _, each in found for end in each]
        moved = sum(end.num_bytes for end in ends)
        already = any(isinstance(w, Varying) for r in readers for w in _wants(r, fact))
        if ends and (already or moved > fact.num_bytes or (moved == fact.num_bytes and len(ends) > 1)):
            calls = [call for each, _ in found for call in each]
            for call in calls:
                inputs = tuple(VARYING if o is fact or o in calls else REPLICATE for o in call.operands)
                call.replace(Choice("vary", inputs, (VARYING,), reason="every reader sums its gradient"))


def _varied(call: Facts, operand: Facts, depth: int) -> tuple[list[Facts], list[Facts]] | None:
    """The calls that turn ``operand``, and nothing else that has a gradient, into values that all their readers vary;
    and those of them that are varied themselves. None where another reader needs one of them as it is.
    """
    if not _may_vary(call, operand):
        return None
    calls: list[Facts] = [call]
    ends: list[Facts] = []
    for reader in dict.fromkeys(call.readers):
        if all(isinstance(w, Varying) for w in _wants(reader, call)):
            ends = [call, *(end for end in ends if end is not call)]
            continue
        further = _varied(reader, call, depth - 1) if depth else None
        if further is None:
            return None
        calls += further[0]
        ends = [*ends, *further[1]]
    return calls, ends


def _may_vary(call: Facts, operand: Facts) -> bool:
    if call.choices[-1:] != [None] or call.node.op != "call_function" or not call.differentiable or call.stored:
        return False
    if call.is_list or len(call.readers) < len(call.node.users) or not call.readers:
        return False
    if draws(call.node) or written(call.node) or not isinstance(call.node.target, OpOverload):
        return False
    if any(o.current[0] is not REPLICATE or (o.differentiable and o is not operand) for o in call.operands):
        return False
    return bool(call.node.meta["val"].dtype == operand.node.meta["val"].dtype)  # sums are rounded as they were


def _wants(reader: Facts, fact: Facts) -> list[Placement | None]:
    choice = reader.choices[-1]
    return [
        None if choice is None else choice.inputs[i] if i < len(choice.inputs) else None
        for i, operand in enumerate(reader.operands)
        if operand is fact
    ]


def _wanted_by_all(fact: Facts) -> Placement | None:
    found: Placement | None = None
    if len(fact.readers) < len(fact.node.users):
        return None
    for reader in fact.readers:
        for wanted in _wants(reader, fact):
            if wanted is None or not is_shard(wanted) or (found is not None and not same(found, wanted)):
                return None
            found = wanted
    return found


def _split(fact: Facts, wanted: Placement, size: int, sizes: Sequence[int]) -> Choice | None:
    current = [REPLICATE] * len(fact.operands)
    recipe = recipe_of(fact, sizes, current)
    for factor in recipe.factors if recipe is not None else ():
        cut = factor.cut_for(factor.outputs[0], At.of(wanted), size)
        if cut is not None and factor.lowering is None:
            flows = [o.differentiable for o in fact.operands]
            return split_choice(factor, cut, flows, recipe.unread, 0)  # type: ignore[union-attr]
    return None


def _moves(fact: Facts, choice: Choice) -> int:
    """The bytes that the backward pass would move for the operands of a split call."""
    moved = 0
    for operand, wanted in zip(fact.operands, choice.inputs, strict=True):
        if wanted is None or wanted is REPLICATE or not operand.differentiable:
            continue
        others = [w for r in operand.readers if r is not fact for w in _wants(r, operand)]
        if not any(w is not None and same(w, wanted) for w in others):
            sums = isinstance(wanted, Varying) and operand.current[0] is REPLICATE
            moved += operand.num_bytes * (2 if sums else 1)
    return moved

"""propagate: gives every node its placements, and the factor that each mesh axis splits, with the reason.

In: a graph whose parameters and constraints carry what the plan asked for (``Info.given``).
Out: the same graph, where every node has an ``Info``: what each operand must be, and what each result is.

The policy is *follow*: axis by axis, node by node. A call whose operands are all replicated stays whole. Otherwise one
of the factors that an operand already carries is followed; where they conflict, the one whose conversions move the
fewest bytes, and a weight stays where it is stored. A partial sum passes through linear operators and is reduced at
the first reader that needs more. Where nothing can be followed, the operands are gathered.

    linear(x: Replicate, w: Shard(0))    -> factor o: x Varying,  result Shard(-1)
    linear(x: Shard(-1), w: Shard(1))    -> factor i: as they are, result Partial(sum)

Each axis sees the shapes that the outer axes left: a compound dim that ``dp`` cut is smaller for ``tp``.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from fxshard.ir.facts import Facts, may_lower, recipe_of, split_choice
from fxshard.ir.info import Choice, Info, copy_graph, set_info
from fxshard.mesh import Mesh
from fxshard.passes.hoist import hoist_cuts, hoist_varies
from fxshard.passes.lookahead import LOOK_AHEAD, read_whole
from fxshard.placement import (
    PARTIAL,
    REPLICATE,
    VARYING,
    Cut,
    Placement,
    is_grouped,
    is_partial,
    is_shard,
    placement_key,
    same,
)
from fxshard.rules.lookup import WEIGHT_VIEWS, is_constant, likeness
from fxshard.rules.recipe import At, Factor, Recipe, operands_of, written
from fxshard.rules.table import find_rule, name_of
from fxshard.torch_internals import OpOverload

WEIGHT_STAYS = 1000.0
"""How much dearer it is to move a weight than an activation of its size: weights stay where they are stored."""

MAY_BE_EMPTY = frozenset({None, "groups", "mean", "dropout", "attention", "causal", "heads", "loss"}) | {
    "experts",
    "picked",
    "added",
    "ring",
}
"""Lowerings that hold on an empty part too; others are of no use there: a maximum of nothing, a table without rows."""

LOOKS_AHEAD = frozenset({"norm", "picked", "experts"})
"""Lowerings for which it matters what readers do with the result, or what operands are called."""

METADATA = {
    torch.ops.aten.sym_size.int,
    torch.ops.aten.sym_numel.default,
    torch.ops.aten.sym_stride.int,
    torch.ops.aten.sym_storage_offset.default,
}
"""Operators that read sizes only. Whatever the operand's placement, they give the whole tensor's."""


def constrain(value: torch.Tensor) -> torch.Tensor:
    """Marks a place where the plan fixes a value's placements; it is gone after ``insert_collectives``."""
    return value


def propagate(graph: fx.Graph, mesh: Mesh, rings: Collection[int] = ()) -> fx.Graph:
    """Decides every node's placements on every axis. See the module's text.

    ``rings``: the axes along which attention may pass keys and values round.

    Reference: GSPMD (Xu et al., 2021), sharding completion; Megatron-LM (Shoeybi et al., 2019).
    """
    graph = copy_graph(graph)
    facts = [Facts.of(node) for node in graph.nodes]
    by_node = {fact.node: fact for fact in facts}
    for fact in facts:
        fact.operands = [by_node[o] for o in operands_of(fact.node)] if fact.node.op == "call_function" else []
        for operand in fact.operands:
            operand.readers.append(fact)
        fact.differentiable = _differentiable(fact)
        fact.stored = fact.node.op == "get_attr" or (
            bool(fact.operands)
            and fact.operands[0].stored
            and (fact.node.target is constrain or name_of(fact.node.target)[1] in WEIGHT_VIEWS)
        )
    for axis in range(mesh.ndim):
        if mesh.sizes[axis] > 1:
            _propagate_axis(facts, axis, mesh, rings)
            hoist_cuts(facts, mesh.sizes[axis], mesh.sizes[:axis])
            hoist_varies(facts)
        else:
            for fact in facts:
                fact.close(None)
    for fact in facts:
        outputs = tuple(tuple(axes) for axes in zip(*(fact.per_axis), strict=True)) if fact.per_axis else ()
        set_info(fact.node, Info(outputs, tuple(fact.choices), fact.differentiable, fact.given))
    return graph


def _differentiable(fact: Facts) -> bool:
    node = fact.node
    if node.op == "placeholder":
        return fact.is_float
    if node.op == "get_attr":
        return fact.is_float and bool(node.meta.get("is_parameter") or node.meta.get("requires_grad"))
    if node.op != "call_function" or not fact.is_float:
        return False
    if is_constant(node.target):
        return False
    return any(o.differentiable for o in fact.operands)


def _propagate_axis(facts: Sequence[Facts], axis: int, mesh: Mesh, rings: Collection[int]) -> None:
    size = mesh.sizes[axis]
    sizes = mesh.sizes[:axis]
    known: Known = {}
    for fact in facts:
        node = fact.node
        if node.op in ("placeholder", "get_attr"):
            at = (fact.given[axis] if fact.given else None) or REPLICATE
            fact.close(Choice("given", (), (at,), reason="the plan") if at is not REPLICATE else None)
        elif node.op == "output":
            fact.close(None)
        elif node.target is operator.getitem and fact.operands and fact.operands[0].is_list:
            at = fact.operands[0].current[node.args[1]]  # type: ignore[index]
            fact.close(Choice("split", (None,), (at,)) if at is not REPLICATE else None)
        elif node.target is constrain and fact.given is not None:
            at = fact.given[axis] or fact.operands[0].current[0]
            fact.close(Choice("given", (at,), (at,), reason="the plan"))
        elif node.target in METADATA or all(o.current[0] is REPLICATE for o in fact.operands):
            fact.close(None)
        elif node.target is torch.ops.aten.copy_.default:
            at = fact.operands[0].current[0]
            fact.close(Choice("given", (at, at), (at,), reason="it updates a buffer in place"))
        else:
            fact.close(_choose_once(fact, size, sizes, axis, rings, known))


Known: TypeAlias = dict[Any, tuple[Choice, tuple[Choice | None, ...]]]
"""The choices on one axis, by what decided them, each with those of the outer axes."""


def _choose_once(
    fact: Facts, size: int, sizes: Sequence[int], axis: int, rings: Collection[int], known: Known
) -> Choice:
    """The choice for a call; calls that look alike share one, so layers that repeat are analysed once.

    Not where the choice follows from more than the call itself: from what its readers do, or from names.
    """
    current = [o.current[0] for o in fact.operands]
    if any(is_partial(p) or is_grouped(p) for p in current) or not isinstance(fact.node.target, OpOverload):
        return _choose(fact, size, sizes, axis, rings)
    key = (
        likeness(fact.node),
        fact.shapes,
        tuple([(o.shapes, o.differentiable, o.stored) for o in fact.operands]),
        tuple(map(placement_key, current)),
        tuple(map(id, fact.choices)),
    )
    if key in known:
        return known[key][0]
    choice = _choose(fact, size, sizes, axis, rings)
    lists = any(o.is_list for o in fact.operands)
    recipe = None if lists else recipe_of(fact, sizes, current)
    ahead = recipe is not None and any(factor.lowering in LOOKS_AHEAD for factor in recipe.factors)
    if not ahead and not written(fact.node):
        known[key] = choice, tuple(fact.choices)  # kept, so that their ids stay theirs
    return choice


def _choose(fact: Facts, size: int, sizes: Sequence[int], axis: int, rings: Collection[int]) -> Choice:
    current = [o.current[0] for o in fact.operands]
    if any(o.is_list for o in fact.operands):
        return _whole(fact, frozenset(), "reads a list of tensors")
    recipe = recipe_of(fact, sizes, current)
    if recipe is None:
        return _whole(fact, frozenset(), "has no rule")
    if not recipe.factors and (rule := find_rule(fact.node.target)) is not None and rule.whole:
        return _whole(fact, recipe.unread, f"stays whole: {rule.whole}")
    partial = frozenset(i for i, p in enumerate(current) if is_partial(p) and i not in recipe.unread)
    if partial in recipe.linear and _floats(fact, partial, sizes):
        return _pass_partial(fact, recipe, partial)
    best: tuple[float, Factor, Cut, int] | None = None
    for factor in recipe.factors:
        if not may_lower(fact.choices, factor) or (factor.lowering == "ring" and axis not in rings):
            continue
        for i, at in enumerate(factor.inputs):
            found = factor.cut_for(at, At.of(current[i]), size)
            if found is None or i in recipe.unread or _would_lose_update(fact, factor, found, current):
                continue
            if 0 in found.shares and not may_be_empty(factor):
                continue
            if factor.lowering == "norm" and read_whole(fact, factor.outputs[0].cut(found), size, sizes):  # type: ignore[union-attr]
                continue
            if factor.lowering == "picked" and not _worth_picking(fact, found, sizes):
                continue
            cost = _cost(fact, factor, found, current)
            if best is None or cost < best[0]:
                best = (cost, factor, found, i)
    if best is None and partial:
        ahead = _scatter_ahead(fact, recipe, partial, size, axis, sizes)
        if ahead is not None and may_lower(fact.choices, ahead[0]):
            return split_choice(*ahead, [o.differentiable for o in fact.operands], recipe.unread, min(partial))
    if best is None:
        return _whole(fact, recipe.unread, "no factor that an operand carries can be split")
    _, factor, cut, leader = best
    return split_choice(factor, cut, [o.differentiable for o in fact.operands], recipe.unread, leader)


def _worth_picking(fact: Facts, cut: Cut, sizes: Sequence[int]) -> bool:
    """Whether every rank picks of its own part, and the picks sum: of weights, and of rows in groups, of which one rank
    may have most; of other values where the sum moves fewer bytes than gathering them.
    """
    source = fact.operands[0]
    return source.stored or cut.groups is not None or 2 * _smallest_ahead(fact, sizes) < source.num_bytes


def may_be_empty(factor: Factor) -> bool:
    """Whether a rank may have nothing of the factor."""
    return factor.lowering in MAY_BE_EMPTY and (factor.lowering, factor.name) != ("loss", "v")


def _would_lose_update(fact: Facts, factor: Factor, cut: Cut, current: Sequence[Placement]) -> bool:
    """Whether a tensor that the call updates in place would have to be converted: the update would go to the copy."""
    updated = set(written(fact.node).values())
    for operand, at, now in zip(fact.operands, factor.inputs, current, strict=True):
        if operand.node in updated:
            wanted = REPLICATE if at is None else at.placement(cut)
            if not same(now, wanted):
                return True
    return False


def _scatter_ahead(
    fact: Facts, recipe: Recipe, partial: frozenset[int], size: int, axis: int, sizes: Sequence[int]
) -> tuple[Factor, Cut] | None:
    """The factor over which to scatter a sum, where a reader further on will want it split.

    A row-sharded product adds its bias before it meets a residual stream that is split along the sequence: reducing it
    whole for the bias, and cutting it afterwards, would move twice the bytes.
    """
    chain: list[tuple[Recipe, int]] = [(recipe, min(partial))]
    at = fact
    for _ in range(LOOK_AHEAD):
        reader, position = _only_reader(at)
        if reader is None:
            return None
        if reader.node.target is constrain:
            asked = (reader.given[axis] if reader.given else None) or REPLICATE
            wanted = At.of(asked)
            return _back_through(chain, wanted, size) if wanted else None
        if any(o.is_list for o in reader.operands):
            return None
        current = [o.current[0] if o.current else REPLICATE for o in reader.operands]
        found = recipe_of(reader, sizes, current)
        if found is None:
            return None
        for factor in found.factors:
            mine = factor.inputs[position]
            for other, theirs in enumerate(factor.inputs):
                cut = factor.cut_for(theirs, At.of(current[other]), size) if other != position else None
                if cut is not None and mine is not None and not reader.operands[other].stored:
                    return _back_through(chain, mine.cut(cut), size)
        chain.append((found, position))
        at = reader
    return None


def _only_reader(fact: Facts) -> tuple[Facts | None, int]:
    if len(fact.node.users) != 1 or fact.is_list:
        return None, 0
    reader = fact.readers[0]
    if reader.node.op != "call_function":
        return None, 0
    return reader, reader.operands.index(fact)


def _back_through(chain: Sequence[tuple[Recipe, int]], wanted: At, size: int) -> tuple[Factor, Cut] | None:
    """From what is wanted of the last result of a chain to the factor of its first call; None where that breaks."""
    for index, (recipe, position) in reversed(list(enumerate(chain))):
        for factor in recipe.factors:
            source = factor.inputs[position]
            cut = factor.cut_for(factor.outputs[0], wanted, size)
            if source is not None and cut is not None and factor.lowering != "ring":
                if index == 0:
                    return factor, cut
                wanted = source.cut(cut)
                break
        else:
            return None
    return None


def _whole(fact: Facts, unread: frozenset[int], reason: str) -> Choice:
    inputs = tuple(None if i in unread else REPLICATE for i in range(len(fact.operands)))
    return Choice("whole", inputs, (REPLICATE,) * len(fact.shapes), reason=reason)


def _pass_partial(fact: Facts, recipe: Recipe, partial: frozenset[int]) -> Choice:
    inputs: list[Placement | None] = []
    for i, operand in enumerate(fact.operands):
        other = VARYING if operand.differentiable else REPLICATE
        inputs.append(PARTIAL if i in partial else None if i in recipe.unread else other)
    return Choice("partial", tuple(inputs), (PARTIAL,) * len(fact.shapes))


def _floats(fact: Facts, partial: frozenset[int], sizes: Sequence[int]) -> bool:
    """Whether it is worth to leave a sum unreduced: it does not grow, nor fall in pieces; or what follows makes it so
    much smaller that it pays to sum the gradients of the other operands instead, as those of the weights of a token's
    experts.
    """
    if fact.is_list:
        return False
    sources = [fact.operands[i] for i in partial]
    waiting = sum(s.num_bytes for s in sources)
    if any(len(s.node.users) != 1 for s in sources) or fact.num_bytes > waiting:
        return False
    others = [o for i, o in enumerate(fact.operands) if i not in partial and o.differentiable]
    return not others or _smallest_ahead(fact, sizes) + sum(o.num_bytes for o in others) < waiting


def _smallest_ahead(fact: Facts, sizes: Sequence[int]) -> int:
    """The fewest bytes that a sum has on its way through linear operators whose other operands carry no gradient.

    None at all, where it is added to another unreduced sum.
    """
    smallest = fact.num_bytes
    for _ in range(LOOK_AHEAD):
        reader, position = _only_reader(fact)
        if reader is None or any(o.is_list for o in reader.operands):
            break
        current = [o.current[0] if o.current else REPLICATE for o in reader.operands]
        recipe = recipe_of(reader, sizes, current)
        others = [o for i, o in enumerate(reader.operands) if i != position]
        waiting = frozenset({position} | {i for i, p in enumerate(current) if is_partial(p)})
        if recipe is not None and len(waiting) > 1 and waiting in recipe.linear:
            return 0
        if recipe is None or frozenset({position}) not in recipe.linear or any(o.differentiable for o in others):
            break
        fact = reader
        smallest = min(smallest, fact.num_bytes)
    return smallest


def _cost(fact: Facts, factor: Factor, cut: Cut, current: Sequence[Placement]) -> float:
    cost = 0.0
    for operand, at, now in zip(fact.operands, factor.inputs, current, strict=True):
        target = REPLICATE if at is None else at.placement(cut)
        if same(now, target):
            continue
        if is_shard(now):
            cost += operand.num_bytes * (WEIGHT_STAYS if operand.stored else 1.0)
        elif is_partial(now):
            cost += operand.num_bytes * (2.0 if at is None else 1.0)
        elif at is not None and operand.differentiable:
            cost += operand.num_bytes * 0.5  # cut for free, gathered in the backward pass
    return cost

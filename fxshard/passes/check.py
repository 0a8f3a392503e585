"""check: an independent reading of the rewritten graph, which is refused where it is not sound.

Nothing is taken from ``propagate``'s choices. For every call and every axis the checker looks at what the operands
*are* and what the result *is said to be*, and asks the operator's rule whether the one follows from the other:

1. all operands replicated, result replicated; or the same with all that carry a gradient Varying, and the result; or
2. some factor of the rule, cut in some blocks: each operand that has it is split there, each operand that lacks it is
   Varying where a gradient flows through it, and the result is split there, or Partial where the factor is missing
   (replicated, where the factor's lowering reduces it); or
3. the Partial operands are one of the rule's linear sets, the others are replicated, and Varying where a gradient
   flows through them, and the result is Partial.

Conversions are checked against ``ir.conversions``; a Varying value is only made by one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from fxshard.errors import PlanError, SoundnessError
from fxshard.ir.conversions import CONVERSIONS, REPLICATE, Conversion, kind_of, options_of
from fxshard.ir.facts import recipe_on_parts
from fxshard.ir.info import Info, info_of, values_of
from fxshard.ir.origins import where
from fxshard.ir.paths import inside
from fxshard.lowerings.split_experts import names_groups
from fxshard.mesh import Mesh
from fxshard.passes.propagate import METADATA
from fxshard.placement import (
    Cut,
    Placement,
    Shard,
    Varying,
    cut_of,
    cut_within,
    describe,
    is_grouped,
    is_partial,
    is_shard,
    placement_key,
    same,
)
from fxshard.rules.effects import may_view
from fxshard.rules.lookup import draws, likeness
from fxshard.rules.recipe import At, Factor, is_list, operands_of, shape_of, written
from fxshard.runtime.row_groups import group_rows
from fxshard.torch_internals import OpOverload

REPORT = "this is a bug of fxshard, or of a rule registered for this operator: please report the model and the plan"


def check(graph: fx.Graph, mesh: Mesh) -> None:
    """Raises ``SoundnessError`` at the first call whose placements do not follow from its operator's rule."""
    graph.lint()
    checked: set[Any] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target in METADATA:
            continue
        if node.target is operator.getitem:
            _check_getitem(node)
            continue
        if node.target in CONVERSIONS:
            _check_conversion(node, mesh)
            continue
        if node.target is group_rows:
            if any(map(_interesting, info_of(node.all_input_nodes[0]).placements)):
                raise _refused(node, f"%{node.name} reads ends of groups that are not whole", REPORT)
            continue
        info = info_of(node)
        operands = operands_of(node)
        _check_updates(node, mesh)
        facts = [info_of(o) for o in operands]
        for axis in range(mesh.ndim):
            now = [f.placements[axis] for f in facts]
            after = [output[axis] for output in info.outputs]
            if not any(map(_interesting, now)) and not any(map(_interesting, after)):
                continue
            if node.target is torch.ops.aten.copy_.default and same(now[0], now[1]) and same(now[0], after[0]):
                continue
            key = _likeness(node, operands, facts, info, axis)
            if key is not None and key in checked:
                continue
            if not _follows(node, operands, facts, now, after, axis, mesh):
                raise _unsound(node, operands, now, after, mesh.names[axis])
            checked.add(key)


def _check_getitem(node: fx.Node) -> None:
    """What is taken from a list of tensors is placed as it is there."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    if is_list(source):
        there, here = info_of(source).outputs[index], info_of(node).placements  # type: ignore[index]
        if not all(map(same, there, here)):
            raise _refused(node, f"%{node.name} is not placed as result {index} of %{source.name}", REPORT)


def _likeness(node: fx.Node, operands: Sequence[fx.Node], facts: Sequence[Info], info: Info, axis: int) -> Any:
    """All that decides whether a call is sound on an axis: layers that repeat are read once. None where names do."""
    placed = [placement for fact in (*facts, info) for output in fact.outputs for placement in output[: axis + 1]]
    if any(map(is_grouped, placed)) or not isinstance(node.target, OpOverload):
        return None
    values = [value for each in (*operands, node) for value in values_of(each)]
    return (
        likeness(node),
        tuple(map(shape_of, values)),
        tuple(map(placement_key, placed)),
        tuple([fact.differentiable for fact in facts]),
        axis,
    )


def _check_updates(node: fx.Node, mesh: Mesh) -> None:
    """What a call writes must be the buffer (or input) itself, not a converted copy of it: or one written back."""
    copy = torch.ops.aten.copy_.default
    for name, value in written(node).items():
        is_written_back = any(user.target is copy and user.args[1] is value for user in value.users)
        if _is_copy(value) and not is_written_back:
            what = f"%{node.name} would update a copy (%{value.name}) of its argument {name!r}, and lose the update"
            raise PlanError(
                what, **where(node), fix="replicate what the model changes in place, in the plan: zero splits it"
            )


def _is_copy(value: fx.Node) -> bool:
    """Whether it is converted from, or shows a part of, what is read later: a buffer, or a value that others read."""
    while value.target in CONVERSIONS or may_view(value.target):
        value = value.all_input_nodes[0]
        if value.op in ("get_attr", "placeholder") or len(value.users) > 1:
            return True
    return False


def _interesting(placement: Placement) -> bool:
    return is_shard(placement) or is_partial(placement) or isinstance(placement, Varying)


def _cut(placement: Placement) -> bool:
    return is_shard(placement) or is_partial(placement)


def _follows(
    node: fx.Node,
    operands: Sequence[fx.Node],
    facts: Sequence[Info],
    now: Sequence[Placement],
    after: Sequence[Placement],
    axis: int,
    mesh: Mesh,
) -> bool:
    if any(map(is_list, operands)):
        return False
    inputs = [(shape_of(o.meta["val"]), f.placements[:axis]) for o, f in zip(operands, facts, strict=True)]
    outputs = [(shape_of(v), o[:axis]) for v, o in zip(values_of(node), info_of(node).outputs, strict=True)]
    recipe = recipe_on_parts(node, inputs, outputs, mesh.sizes[:axis], now)
    if recipe is None:
        return False
    read = [i for i in range(len(now)) if i not in recipe.unread]
    if not any(_interesting(now[i]) for i in read):
        return not any(map(_interesting, after))
    if all(isinstance(p, Varying) for p in after):
        varied = [isinstance(now[i], Varying) == facts[i].differentiable and not _cut(now[i]) for i in read]
        return all(varied) and not recipe.unread and not draws(node)
    partial = frozenset(i for i in read if is_partial(now[i]))
    if partial:
        others = [i for i in read if i not in partial]
        fits = partial in recipe.linear and all(is_partial(p) for p in after)
        return fits and all(_interesting(now[i]) == facts[i].differentiable and not is_shard(now[i]) for i in others)
    return any(_fits(f, facts, now, after, read, mesh.sizes[axis]) for f in recipe.factors)


def _fits(
    factor: Factor, facts: Sequence[Info], now: Sequence[Placement], after: Sequence[Placement], read: list[int], n: int
) -> bool:
    found = (factor.cut_for(factor.inputs[i], At.of(now[i]), n) for i in read)
    cut = next((c for c in found if c is not None), None)
    if cut is None:
        return False
    for i in read:
        at = factor.inputs[i]
        if at is not None:
            if not same(now[i], at.placement(cut)):
                return False
        elif _interesting(now[i]) != facts[i].differentiable or is_shard(now[i]):
            return False
    expected = (None if at is None else at.placement(cut) for at in factor.outputs)
    lacks = _is_replicated if factor.reduced else is_partial
    return all(lacks(p) if e is None else same(p, e) for p, e in zip(after, expected, strict=True))


def _is_replicated(placement: Placement) -> bool:
    return kind_of(placement) == REPLICATE


def _check_conversion(node: fx.Node, mesh: Mesh) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = info_of(source).placements, info_of(node).placements
    changed = [a for a in range(mesh.ndim) if not same(before[a], after[a])]
    if len(changed) != 1 or mesh.names[changed[0]] != node.args[1]:
        raise _unsound(node, [source], before, after, str(node.args[1]))
    have, want = before[changed[0]], after[changed[0]]
    within = inside(before, changed[0], mesh.sizes)
    if any(is_shard(p) and cut_within(p, within) is None for p in (have, want)):
        raise _unsound(node, [source], before, after, mesh.names[changed[0]])
    if not _is_as_told(CONVERSIONS[node.target], have, want, node, within):
        raise _unsound(node, [source], [have], [want], mesh.names[changed[0]])


Within: TypeAlias = Sequence[tuple[Placement, int]]
"""The placements on the axes inside of the one at hand, with these axes' sizes."""


def _is_as_told(row: Conversion, have: Placement, want: Placement, node: fx.Node, within: Within) -> bool:
    """Whether a conversion leads from the one placement to the other, along one axis, by what it is told."""
    if kind_of(have) != row.source or kind_of(want) not in row.targets or not node.kwargs.keys() <= TOLD:
        return False
    told = options_of(node)
    if told.get("summed", False) != isinstance(want, Varying) and len(row.targets) > 1:
        return False
    ends = [(p, told[dim]) for p, dim in ((have, row.source_dim), (want, row.target_dim)) if is_shard(p)]
    if any(p.dim != dim for p, dim in ends):
        return False
    if len(ends) == 2:
        return _exchanges([p for p, _ in ends], told["lengths"], within)
    return all(_cuts_as(p, str(node.args[1]), told, within) for p, _ in ends)


TOLD = {"summed", "dim", "source", "target", "blocks", "lengths"}
"""What a conversion may be told before the graph is one rank's."""


def _cuts_as(placement: Shard, axis: str, told: Mapping[str, Any], within: Within) -> bool:
    """Whether a conversion's arguments cut, of what the inner axes leave of a dim, what the placement says."""
    cut, lengths = cut_within(placement, within), told["lengths"]
    if cut is None or cut.groups is None:
        return cut == Cut(told["blocks"], lengths)
    return isinstance(lengths, fx.Node) and names_groups(lengths, cut.groups.ends, axis, cut.groups.rows, cut.shares)


def _exchanges(ends: Sequence[Shard], lengths: Any, within: Within) -> bool:
    found = [cut_within(p, within) for p in ends]
    whole = all(cut is not None and cut.blocks == (1,) and cut.groups is None for cut in found)
    return whole and lengths == tuple(cut_of(p).shares for p in ends)


def _unsound(
    node: fx.Node, operands: Sequence[fx.Node], now: Sequence[Placement], after: Sequence[Placement], axis: str
) -> SoundnessError:
    given = ", ".join(f"%{o.name}: {describe(p)}" for o, p in zip(operands, now, strict=False))
    result = ", ".join(map(describe, after))
    return _refused(
        node,
        f"%{node.name} does not follow from its operands on mesh axis {axis!r}: ({given}) -> {result}",
        REPORT,
    )


def _refused(node: fx.Node, what: str, fix: str) -> SoundnessError:
    return SoundnessError(what, **where(node), fix=fix)

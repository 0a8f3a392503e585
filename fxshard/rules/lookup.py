"""From a node of the graph to its recipe. Calls that look alike share one: repeated layers are analysed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxshard.placement import Placement
from fxshard.rules.recipe import At, Call, Factor, Operand, Recipe, Shape, bind, operands_of, shape_of, signature_of
from fxshard.rules.table import find_rule, generation, name_of
from fxshard.runtime.autocast import operator_named, under_autocast
from fxshard.runtime.collectives import draw_apart, dropout_mask
from fxshard.runtime.draws import draw_in_place
from fxshard.torch_internals import OpOverload

_CUTS = {"aten.split", "aten.split_with_sizes", "aten.chunk", "aten.slice", "aten.narrow", "aten.tensor_split"}
_LITERAL = _CUTS | {"aten.embedding", "aten.group_norm"}
_LITERAL |= {"aten.cross_entropy_loss", "aten.nll_loss", "aten.nll_loss_nd"}
_LITERAL |= {"aten.argmax", "aten.argmin", "aten.max", "aten.min", "aten.scaled_dot_product_attention"}
"""Operators whose arguments or lowerings speak of the whole tensor."""
_LAYOUT = {"aten.cat", "aten.concat", "aten.concatenate"} | _CUTS
"""Operators whose rules follow how the operands are cut."""
WEIGHT_VIEWS = {"aten.t", "aten.transpose", "aten.permute", "aten.numpy_T", "aten.view", "aten.reshape", "aten.to"}
WEIGHT_VIEWS |= {"aten.unsqueeze"}
"""Operators whose result, given a weight, is that weight in another shape or dtype."""
_CONSTANT = {"aten.detach", "aten.ones_like", "aten.zeros_like", "aten.full_like", "aten.empty_like"}
_CONSTANT |= {"aten.rand_like", "aten.randn_like", "aten.new_ones", "aten.new_zeros", "aten.new_full", "aten.new_empty"}
_cache: dict[Any, Recipe] = {}


def recipe_for(
    node: fx.Node,
    inputs: tuple[Shape, ...],
    outputs: tuple[Shape, ...],
    current: Sequence[Placement] = (),
    whole_inputs: tuple[Shape, ...] | None = None,
) -> Recipe | None:
    """The recipe of a call at these shapes; None where the operator has no rule.

    Calls that look alike share one recipe: repeated layers are analysed once.
    """
    rule = find_rule(node.target)
    if rule is None or not isinstance(node.target, OpOverload):
        return None
    packet = name_of(node.target)[1]
    ats: tuple[At | None, ...] = ()
    if packet in _LAYOUT:
        ats = tuple(at and At(at.dim, at.blocks) for at in map(At.of, current))
    whole: tuple[Shape, ...] = ()
    if packet in _LITERAL:
        whole = whole_inputs or tuple(shape_of(o.meta["val"]) for o in operands_of(node))
    key = (likeness(node), inputs, outputs, ats, whole, len(generation))
    found = _cache.get(key)
    if found is None:
        counter = [0]
        arguments = {name: _template(value, counter) for name, value in bind(node).items()}
        call = Call(packet, inputs, outputs, arguments, whole, ats, _affine(node))
        found = rule.function(call)
        if draws(node) and any(f.lowering is None for f in found.factors):
            found = Recipe(unread=found.unread)  # a part of the draw is not a draw of the part
        if any((len(f.inputs), len(f.outputs)) != (len(inputs), len(outputs)) for f in found.factors):
            found = Recipe()  # another form of the operator, of lists of tensors
        factors = (_with_dims(f, inputs, outputs) for f in found.factors)
        _cache[key] = found = replace(found, factors=tuple(factors))
    return found


def likeness(node: fx.Node) -> tuple[Any, ...]:
    """What calls of an operator have in common that differ in nothing but the shapes and values of their operands.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> x.meta["val"] = torch.ones(2)
    >>> one, other = (graph.call_function(torch.ops.aten.sum.dim_IntList, (x, [dim])) for dim in (0, -1))
    >>> likeness(one) == likeness(one), likeness(one) == likeness(other)
    (True, False)
    """
    args = tuple([_alike(value) for value in node.args])
    if not node.kwargs:
        return node.target, args
    return node.target, args, tuple([(name, _alike(value)) for name, value in node.kwargs.items()])


def _alike(value: Any) -> Any:
    """A hashable picture of an argument, of tensors no more than the dtype; numbers of two types are two."""
    kind = type(value)
    if kind is fx.Node:
        meta = value.meta.get("val")
        if isinstance(meta, torch.Tensor):
            return Operand(-1, meta.dtype)
        if isinstance(meta, (list, tuple)):
            return Operand(-1)
        return getattr(getattr(meta, "node", None), "expr", meta)
    if kind is int or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return tuple([_alike(item) for item in value])
    return (kind, value) if kind in (bool, float, complex) else value


def _with_dims(factor: Factor, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> Factor:
    """A factor that knows of its dims: whether the size of one is known when the program runs, and whether all are made
    of it alone.
    """
    placed = zip((*factor.inputs, *factor.outputs), (*inputs, *outputs), strict=True)
    sizes = [shape[at.dim] for at, shape in placed if at is not None]
    dynamic = any(type(size) is not int for size in sizes)
    return replace(factor, even=dynamic, alone=all(size == factor.size for size in sizes))


_DRAWING = (dropout_mask, draw_apart, draw_in_place)
"""What ``localize`` writes in the place of operators that draw."""


def is_constant(target: Any) -> bool:
    """Whether no gradient flows through an operator, though a float comes in and goes out."""
    return name_of(target)[1] in _CONSTANT


def draws(node: fx.Node) -> bool:
    """Whether the call draws random numbers: then only a lowering may split it."""
    if node.target in _DRAWING:
        return True
    target = operator_named(str(node.args[1])) if node.target is under_autocast else node.target
    if not isinstance(target, OpOverload):
        return False
    chances = [name for name in ("dropout_p", "dropout") if name in signature_of(target).names]
    if chances and target is node.target:  # an operator with a dropout inside: an attention, an lstm
        arguments = bind(node)
        return bool(arguments[chances[0]]) and bool(arguments.get("train", True))
    return torch.Tag.nondeterministic_seeded in target.tags


def _affine(node: fx.Node) -> bool:
    assert isinstance(node.target, OpOverload)
    sig = signature_of(node.target)
    numbers = (t and isinstance(a, (int, float, complex)) for t, a in zip(sig.tensor, bind(node).values(), strict=True))
    return any(numbers) or "Scalar" in node.target._overloadname


def _template(value: Any, counter: list[int]) -> Any:
    """A hashable picture of an argument: tensors become ``Operand``, symbolic sizes their expressions."""
    if isinstance(value, fx.Node):
        meta = value.meta.get("val")
        if isinstance(meta, (torch.Tensor, list, tuple)):
            counter[0] += 1
            return Operand(counter[0] - 1, meta.dtype if isinstance(meta, torch.Tensor) else None)
        return getattr(getattr(meta, "node", None), "expr", meta)
    if isinstance(value, (list, tuple)):
        return tuple(_template(v, counter) for v in value)
    return value

"""The facts of a graph that detection needs: what is a weight, what is computed from weights, what contracts what."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxshard.placement import REPLICATE, chunk_shares
from fxshard.rules.lookup import WEIGHT_VIEWS, recipe_for
from fxshard.rules.recipe import Dim, Factor, Recipe, Shape, divides, is_list, operands_of, shape_of, written
from fxshard.rules.table import name_of

CUTS = {"aten.split", "aten.split_with_sizes", "aten.chunk", "aten.slice", "aten.narrow"}


@dataclass
class Graph:
    """The facts of a graph that detection needs, gathered once.

    Attributes:
        order: the place of each node.
        weights: each weight, and each view of one -> the weight.
        unpacked: each weight that is unpacked from integers -> the buffers and parameters that it is made of.
        learned: what is computed from weights.
    """

    order: dict[fx.Node, int] = field(default_factory=dict)
    weights: dict[fx.Node, fx.Node] = field(default_factory=dict)
    unpacked: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    learned: set[fx.Node] = field(default_factory=set)
    operands: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    shapes: dict[fx.Node, tuple[Shape, ...]] = field(default_factory=dict)
    recipes: dict[fx.Node, Recipe | None] = field(default_factory=dict)
    contractions: dict[fx.Node, tuple[Factor, int, int] | None] = field(default_factory=dict)

    @staticmethod
    def of(graph: fx.Graph) -> Graph:
        """Reads a graph: its order, the weights (with their views), and what is computed from weights."""
        facts = Graph()
        weights, learned = facts.weights, facts.learned
        for i, node in enumerate(graph.nodes):
            facts.order[node] = i
            facts.shapes[node] = shapes_of(node)
            if node.op == "call_function":
                facts.operands[node] = operands_of(node)
                if node.target is not torch.ops.aten.copy_.default:  # running statistics lie as the features do
                    weights.update({held: held for held in written(node).values() if held.op == "get_attr"})
        facts._unpack()
        for node in graph.nodes:
            if node.op == "get_attr" and is_parameter(node):
                weights[node] = node
            elif node.op == "call_function" and node not in learned and node not in weights:
                ops = facts.operands[node]
                if any(o in learned or o in weights for o in ops):
                    if ops[0] in weights and facts._is_of_weight(node):
                        weights[node] = weights[ops[0]]
                    elif (base := facts._reshaped(node)) is not None:
                        weights[node] = weights[base]
                    else:
                        learned.add(node)
        return facts

    def _unpack(self) -> None:
        """Finds weights that are unpacked from integers, and marks what they are made of, and on the way.

        Quantized layers keep numbers of a few bits in buffers of integers, beside scales, and make the matrix of them
        at each call. It is a weight where a product takes it; what is split is what it is made of.
        """
        made: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.order:
            operands = self.operands.get(node, [])
            if node.op == "get_attr":
                made[node] = frozenset({node})
            elif node.op == "call_function" and all(o in made for o in operands):
                made[node] = frozenset().union(*(made[o] for o in operands))
        for node, sources in made.items():
            is_made = node.op == "call_function" and any(map(_holds_integers, sources))
            if is_made and self._is_product_operand(node, made):
                self.unpacked[node] = sources
        for node in reversed(self.order):
            if node in made and any(u in self.learned or u in self.unpacked for u in node.users):
                if node.op == "get_attr":
                    self.weights[node] = node
                else:
                    self.learned.add(node)
        self.weights.update({node: node for node in self.unpacked})

    def _is_product_operand(self, node: fx.Node, constants: Mapping[fx.Node, object]) -> bool:
        """Whether a call contracts a floating-point matrix with what is no constant."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or not value.is_floating_point():
            return False
        for user in node.users:
            recipe = self.recipe(user) if user.op == "call_function" and user not in constants else None
            at = [i for i, o in enumerate(self.operands.get(user, ())) if o is node]
            for factor in recipe.factors if recipe is not None and len(at) == 1 else ():
                others = [i for i, each in enumerate(factor.inputs) if each is not None and i != at[0]]
                if not any(factor.outputs) and factor.inputs[at[0]] is not None and others:
                    return True
        return False

    def _reshaped(self, node: fx.Node) -> fx.Node | None:
        """The weight that a call makes another of, element for element: standardized, scaled, cast, added to.

        What is made of weights alone, and has the shape of the largest of them, dim for dim.
        """
        ops, shapes = self.operands[node], self.shapes[node]
        if len(shapes) != 1 and name_of(node.target)[1] not in ("aten.native_layer_norm", "aten.native_batch_norm"):
            return None
        made = [o for o in ops if o in self.weights]
        if any(o.op == "placeholder" or o in self.learned for o in ops) or len(shapes[0]) < 2:
            return None
        largest = max(made, key=lambda each: elements(self.shapes[each][0]))
        recipe = self.recipe(node)
        if recipe is None or self.shapes[largest][0] != shapes[0]:
            return None
        at = ops.index(largest)
        moved = [f for f in recipe.factors if f.inputs[at] is not None and f.inputs[at] != f.outputs[0]]
        return None if moved else largest

    def _is_of_weight(self, node: fx.Node) -> bool:
        """Whether a call gives a weight in another form: a view, or the matrices of it that positions pick.

        The experts' matrices that a router picks for each token are weights; the vectors of a table are activations.
        """
        ops = self.operands[node]
        if len(ops) == 1 and (name_of(node.target)[1] in WEIGHT_VIEWS | CUTS or node.target is operator.getitem):
            return True
        if any(o.meta["val"].is_floating_point() for o in ops[1:]):
            return False
        recipe = self.recipe(node)
        if recipe is None or frozenset({0}) not in recipe.linear:
            return False
        kept = [f.inputs[0].dim for f in recipe.factors if f.inputs[0] and all(f.outputs) and not any(f.inputs[1:])]
        return len(set(kept)) > 1

    def recipe(self, node: fx.Node) -> Recipe | None:
        """The recipe of a call on whole operands; None where it has no rule."""
        if node not in self.recipes:
            shapes = [self.shapes[o] for o in self.operands[node]]
            lists = any(map(is_list, self.operands[node]))
            inputs = () if lists else tuple(s[0] for s in shapes)
            current = (REPLICATE,) * len(inputs)
            self.recipes[node] = None if lists else recipe_for(node, inputs, self.shapes[node], current)
        return self.recipes[node]


def _holds_integers(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype.is_complex:
        return False
    return value.dtype != torch.bool and value.dim() > 1


def elements(shape: Shape) -> int:
    """How many elements a shape has, as far as its sizes are known."""
    return math.prod(size for size in shape if isinstance(size, int))


def is_parameter(node: fx.Node) -> bool:
    """Whether a node reads a parameter of the model."""
    return bool(node.meta.get("is_parameter"))


def shapes_of(node: fx.Node) -> tuple[Shape, ...]:
    """The shapes of a node's results."""
    value: Any = node.meta.get("val")
    return tuple(map(shape_of, value)) if is_list(node) else (shape_of(value),)


def contraction(node: fx.Node, facts: Graph) -> tuple[Factor, int, int] | None:
    """The factor that a call contracts between an activation and a weight, and the positions of the two."""
    if node not in facts.contractions:
        facts.contractions[node] = _contraction(node, facts)
    return facts.contractions[node]


def _contraction(node: fx.Node, facts: Graph) -> tuple[Factor, int, int] | None:
    operands = facts.operands[node]
    if len(operands) < 2 or not any(o in facts.weights for o in operands):
        return None
    recipe = facts.recipe(node)
    for factor in recipe.factors if recipe is not None else ():
        if any(at is not None for at in factor.outputs) or factor.lowering not in (None, "share"):
            continue
        at = [i for i, a in enumerate(factor.inputs) if a is not None]
        weights = [i for i in at if operands[i] in facts.weights]
        values = [i for i in at if operands[i] not in facts.weights]
        if len(weights) == 1 and len(values) == 1:
            return factor, values[0], weights[0]
    return None


def shares_among(count: Dim, size: int) -> tuple[int, ...] | None:
    """How ``count`` units fall to the ranks; None where that is not known, or all would fall to one.

    >>> shares_among(8, 2), shares_among(3, 2), shares_among(1, 2)
    ((), (2, 1), None)
    """
    if isinstance(count, int):
        return chunk_shares(count, size) if count > 1 or size == 1 else None
    return () if divides(count, size) else None

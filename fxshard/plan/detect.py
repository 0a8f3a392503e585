"""Finds column/row pairs in the dataflow: what tensor parallelism splits, without knowing any name.

A *row* is a contraction of an activation with a weight: ``down_proj``, ``o_proj``. Splitting the contracted factor
needs the activation split along it. Walking back from there, each operator's rule says which dim of its operands must
be split, until the walk ends in the output features of other weights: the *columns* (``gate_proj`` and ``up_proj``; q,
k and v). A value that others read too stays whole and is cut where the region reads it; so is, for free, what is not
computed from weights (masks, rotary tables). A walk that meets a norm, or a residual stream, ends there without a
column: no pair.

A packed projection is cut in pieces on the way (q, k, v). The pieces' demands meet at its output: there, and in the
weight, each piece is a block that is split on its own.

Reference: Megatron-LM (Shoeybi et al., 2019), section 3.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from fxshard.placement import REPLICATE, Cut, Shard, chunk_shares, normalize_blocks, shard
from fxshard.rules.lookup import WEIGHT_VIEWS, recipe_for
from fxshard.rules.recipe import At, Dim, Factor, Recipe, Shape, divides, operands_of, shape_of, uncombine, units
from fxshard.rules.table import find_rule, name_of
from fxshard.rules.views import segments_of
from fxshard.torch_internals import OperatorBase

Demand = dict[tuple[int, int], tuple[int, ...]]
"""What is asked of one value along one dim: [start, end) of a segment -> the blocks within it that are cut alike."""

_CUTS = {"aten.split", "aten.split_with_sizes", "aten.chunk", "aten.slice", "aten.narrow"}
_SIZES = {"aten.sym_size", "aten.sym_numel"}
SHARING = {"norm", "softmax", "reduction", "extreme", "position", "cumsum"}
"""Lowerings by which the ranks share statistics of a split dim."""

STATISTIC = 4
"""How many calls lead from a value to its sum at most: a cast, a square, a mean."""


@dataclass
class Graph:
    """The facts of a graph that detection needs, gathered once."""

    order: dict[fx.Node, int] = field(default_factory=dict)
    weights: dict[fx.Node, fx.Node] = field(default_factory=dict)
    learned: set[fx.Node] = field(default_factory=set)
    operands: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    shapes: dict[fx.Node, tuple[Shape, ...]] = field(default_factory=dict)
    recipes: dict[fx.Node, Recipe | None] = field(default_factory=dict)

    @staticmethod
    def of(graph: fx.Graph) -> Graph:
        """Reads a graph: its order, the weights (with their views), and what is computed from weights."""
        facts = Graph()
        weights, learned = facts.weights, facts.learned
        for i, node in enumerate(graph.nodes):
            facts.order[node] = i
            facts.shapes[node] = shapes_of(node)
            if node.op == "get_attr" and is_parameter(node):
                weights[node] = node
            elif node.op == "call_function":
                ops = facts.operands[node] = operands_of(node)
                if any(o in learned or o in weights for o in ops):
                    if ops[0] in weights and facts._is_of_weight(node):
                        weights[node] = weights[ops[0]]
                    else:
                        learned.add(node)
        return facts

    def _is_of_weight(self, node: fx.Node) -> bool:
        """Whether a call gives a weight in another form: a view, or the matrices of it that positions pick.

        The experts' matrices that a router picks for each token are weights; the vectors of a table are activations.
        """
        ops = self.operands[node]
        if len(ops) == 1 and (name_of(node.target)[1] in WEIGHT_VIEWS | _CUTS or node.target is operator.getitem):
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
            single = all(len(s) == 1 for s in shapes)
            inputs = tuple(s[0] for s in shapes)
            current = (REPLICATE,) * len(inputs)
            self.recipes[node] = recipe_for(node, inputs, self.shapes[node], current) if single else None
        return self.recipes[node]


def is_parameter(node: fx.Node) -> bool:
    """Whether a node reads a parameter of the model."""
    return bool(node.meta.get("is_parameter"))


@dataclass
class Pair:
    """One row, and what must be split for it."""

    row: fx.Node
    weights: dict[fx.Node, Shard] = field(default_factory=dict)


def shapes_of(node: fx.Node) -> tuple[Shape, ...]:
    """The shapes of a node's results."""
    value = node.meta.get("val")
    return tuple(map(shape_of, value)) if isinstance(value, (list, tuple)) else (shape_of(value),)


@dataclass(frozen=True)
class Split:
    """What tensor parallelism splits.

    Attributes:
        pairs: the column/row pairs, in the order of the rows.
        vocabulary: the table of the words, and the heads that score them.
        alone: products whose weight no pair splits, and that weight: columns whose results are gathered.
        without_rule: calls that no pair goes through, since their operator has no rule.
    """

    pairs: tuple[Pair, ...]
    vocabulary: Mapping[fx.Node, Shard]
    alone: Mapping[fx.Node, tuple[fx.Node, Shard]]
    without_rule: tuple[fx.Node, ...] = ()

    @property
    def weights(self) -> dict[fx.Node, Shard]:
        """Every weight that is split."""
        return self.paired | dict(self.vocabulary) | dict(self.alone.values())

    @property
    def paired(self) -> dict[fx.Node, Shard]:
        """The weights that pairs split."""
        return {weight: placement for pair in self.pairs for weight, placement in pair.weights.items()}


def find_split(facts: Graph, size: int) -> Split:
    """What of a graph an axis of ``size`` ranks splits.

    A weight is split one way only: a pair that would split it another way than an earlier pair is left out. A pair
    with a norm over the split dim inside, whose ranks share statistics, is one only where there is none without.
    """
    taken: dict[fx.Node, Shard] = {}
    pairs: dict[fx.Node, Pair] = {}
    behind_norms: list[fx.Node] = []
    without_rule: set[fx.Node] = set()

    def find(row: fx.Node, through_norms: bool) -> None:
        met = _Met()
        pair = _pair(row, facts, size, through_norms, met)
        without_rule.update(met.without_rule)
        if met.norm:
            behind_norms.append(row)
        have = pairs[row].weights if row in pairs else {}
        if pair is None or pair.weights.keys() <= have.keys():
            return
        if all(_agree(taken.get(w), p) for w, p in pair.weights.items()):
            taken.update(pair.weights)
            pairs[row] = pair

    for node in facts.order:
        if node.op == "call_function" and node in facts.learned:
            find(node, through_norms=False)
    words = vocabulary(facts, size, taken)
    taken |= words
    for node in tuple(behind_norms):
        find(node, through_norms=True)
    rows = sorted(pairs, key=facts.order.__getitem__)
    return Split(
        tuple(pairs[row] for row in rows),
        words,
        columns_alone(facts, size, taken),
        tuple(sorted(without_rule, key=facts.order.__getitem__)),
    )


def _agree(have: Shard | None, want: Shard) -> bool:
    return have is None or repr(have) == repr(want)


def contraction(node: fx.Node, facts: Graph) -> tuple[Factor, int, int] | None:
    """The factor that a call contracts between an activation and a weight, and the positions of the two."""
    operands = facts.operands[node]
    if len(operands) < 2 or not any(o in facts.weights for o in operands):
        return None
    recipe = facts.recipe(node)
    for factor in recipe.factors if recipe is not None else ():
        if any(at is not None for at in factor.outputs) or factor.lowering:
            continue
        at = [i for i, a in enumerate(factor.inputs) if a is not None]
        weights = [i for i in at if operands[i] in facts.weights]
        values = [i for i in at if operands[i] not in facts.weights]
        if len(weights) == 1 and len(values) == 1:
            return factor, values[0], weights[0]
    return None


@dataclass
class _Met:
    """What stood in the way of columns: a norm, and operators without a rule."""

    norm: bool = False
    without_rule: set[fx.Node] = field(default_factory=set)


def _pair(row: fx.Node, facts: Graph, size: int, through_norms: bool, met: _Met) -> Pair | None:
    """The pair of a row, if it is one."""
    found = contraction(row, facts)
    if found is None:
        return None
    if not _Walk(facts, Cut(), size, {row}, set(), split={facts.operands[row][found[1]]}).closed():
        return None  # its input is read by others: a norm's result, a residual stream
    tried: set[tuple[int, ...]] = set()
    obstacles = [found[0].size]
    while obstacles:  # uneven shares only where even ones lead to no column, and then of the most units
        shares = _shares(obstacles.pop(0), size)
        if shares is None or shares in tried:
            continue
        tried.add(shares)
        pair, walk = _walk_from(row, found, facts, Cut((1,), shares), size, through_norms)
        met.norm |= walk.met_norm
        met.without_rule |= walk.without_rule
        if pair is not None:
            return pair
        obstacles = sorted({*obstacles, *walk.obstacles}, reverse=True)
    return None


def _shares(count: Dim, size: int) -> tuple[int, ...] | None:
    """How ``count`` units fall to the ranks; None where that is not known."""
    if isinstance(count, int):
        return chunk_shares(count, size) if count > 0 else None
    return () if divides(count, size) else None


def _walk_from(
    row: fx.Node, found: tuple[Factor, int, int], facts: Graph, cut: Cut, size: int, through_norms: bool
) -> tuple[Pair | None, _Walk]:
    """The pair of a row whose contracted factor is cut so, and the walk that found it, or did not."""
    whole: set[fx.Node] = set()
    rows = {row: found}
    met_norm = False
    while True:
        walk = _Walk(facts, cut, size, set(rows), whole, through_norms, met_norm)
        for each, (along, *positions) in rows.items():
            for position in positions:
                at = along.inputs[position]
                assert at is not None
                walk.ask(facts.operands[each][position], 0, at.dim, at.blocks)
        walk.run()
        if not walk.sound:
            return None, walk
        read_outside = walk.read_outside()
        met_norm = walk.met_norm
        if not read_outside:
            break
        more = walk.narrow_rows(read_outside)
        rows |= more
        # what is shared with others, as a position bias is by all layers, is whole, and cut where it is read
        whole |= read_outside - {facts.operands[each][at] for each, (_, at, _) in more.items()}
    own = {facts.weights[facts.operands[each][position]] for each, (_, _, position) in rows.items()}
    columns = [w for w in walk.leaves if w not in own and sum(s != 1 for s in facts.shapes[w][0]) > 1]
    return (Pair(row, walk.leaves) if columns else None), walk


@dataclass
class _Walk:
    """One walk back from a row."""

    facts: Graph
    cut: Cut
    size: int
    region: set[fx.Node]
    whole: set[fx.Node]
    through_norms: bool = False
    met_norm: bool = False
    queue: list[tuple[int, int]] = field(default_factory=list)
    nodes: dict[int, fx.Node] = field(default_factory=dict)
    asked: dict[fx.Node, dict[tuple[int, int], Demand]] = field(default_factory=dict)
    leaves: dict[fx.Node, Shard] = field(default_factory=dict)
    split: set[fx.Node] = field(default_factory=set)
    obstacles: set[int] = field(default_factory=set)
    without_rule: set[fx.Node] = field(default_factory=set)
    sound: bool = True

    def ask(self, node: fx.Node, result: int, dim: int, blocks: tuple[int, ...]) -> None:
        """Asks that dim ``dim`` of a value be split."""
        self.ask_segment(node, result, dim, 0, self.facts.shapes[node][result][dim], blocks)

    def ask_segment(self, node: fx.Node, result: int, dim: int, start: int, end: Dim, blocks: tuple[int, ...]) -> None:
        """Asks that [start, end) of a dim be split as a block of its own."""
        order = self.facts.order[node]
        if order not in self.nodes:
            self.nodes[order] = node
            heapq.heappush(self.queue, (-order, order))
        demands = self.asked.setdefault(node, {}).setdefault((result, dim), {})
        key = (start, end)
        if demands.setdefault(key, blocks) != blocks:
            self.sound = False

    def run(self) -> None:
        """Walks until nothing is asked any more; later nodes first, so all readers of a value have spoken."""
        while self.queue and self.sound:
            node = self.nodes[heapq.heappop(self.queue)[1]]
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        asked = self.asked[node]
        if node in self.whole:
            return
        if len({dim for _, dim in asked}) > 1:
            self.sound = False
            return
        if node.target is operator.getitem:
            parent, index = node.args
            for (_, dim), demand in asked.items():
                for (start, end), blocks in demand.items():
                    self.ask_segment(parent, index, dim, start, end, blocks)  # type: ignore[arg-type]
            self.split.add(node)
            return
        if node in self.facts.weights and node.op == "get_attr":
            ((_, dim), demand), *_ = asked.items()
            size = self.facts.shapes[node][0][dim]
            merged = _merge(demand, size)
            if merged is None or not units(size, merged, self.cut.pieces(self.size)):
                self.sound = False
            else:
                self.leaves[node] = shard(dim, merged, self.cut.shares)
            return
        if node.op != "call_function" or (node not in self.facts.learned and node not in self.facts.weights):
            return  # not computed from weights: cut for free
        self._through(node, asked)

    def _through(self, node: fx.Node, asked: Mapping[tuple[int, int], Demand]) -> None:
        """From what is asked of a call's results to what that asks of its operands."""
        name = name_of(node.target)[1]
        dim = next(iter(asked))[1]
        if name in _CUTS and self._through_cut(node, asked, dim):
            return
        recipe = self.facts.recipe(node)
        shapes = self.facts.shapes[node]
        found = None
        merged = {_merge(demand, shapes[result][dim]) for (result, _), demand in asked.items()}
        if recipe is not None and len(merged) == 1:
            (blocks,) = merged
            results = [result for result, _ in asked]
            found = blocks and self._factor(recipe, results, At(dim, blocks, self.cut.shares))
        if isinstance(node.target, OperatorBase) and find_rule(node.target) is None:
            self.without_rule.add(node)
        if not found:
            return  # it cannot be split: it stays whole, and is cut where it is read
        factor, inner = found
        self.split.add(node)
        self.region.add(node)
        for operand, at in zip(self.facts.operands[node], factor.inputs, strict=True):
            if at is not None:
                self.ask(operand, 0, at.dim, at.cut(inner).blocks)

    def _factor(self, recipe: Recipe, results: Sequence[int], wanted: At) -> tuple[Factor, Cut] | None:
        """The factor that cuts results as ``wanted``, and how it is cut; what only its size forbids is an obstacle."""
        for factor in recipe.factors:
            at = factor.outputs[results[0]]
            if len({factor.outputs[result] for result in results}) != 1 or at is None or at.dim != wanted.dim:
                continue
            if factor.lowering in SHARING and not self.through_norms:
                self.met_norm = True
                continue
            inner = factor.cut_for(at, wanted, self.size)
            if inner is not None:
                return factor, inner
            if isinstance(factor.size, int) and uncombine(wanted.blocks, at.blocks) is not None:
                self.obstacles.add(factor.size)
        return None

    def _through_cut(self, node: fx.Node, asked: Mapping[tuple[int, int], Demand], dim: int) -> bool:
        (operand,) = self.facts.operands[node]
        parts = segments_of(node, dim)
        if parts is None or (len(parts) == 1 and parts[0] == (0, self.facts.shapes[operand][0][dim])):
            return False
        if len(asked) != len(parts):
            return False
        for (result, _), demand in asked.items():
            blocks = _merge(demand, parts[result][1] - parts[result][0])
            if blocks is None:
                return False
            self.ask_segment(operand, 0, dim, parts[result][0], parts[result][1], blocks)
        self.split.add(node)
        self.region.add(node)
        return True

    def read_outside(self) -> set[fx.Node]:
        """The split values that are read by others than the region, and not just handed out."""
        return {
            node
            for node in self.split
            if not all(self._inside(u) or self._unread(node, u) or self._is_statistic(node, u) for u in node.users)
        }

    def narrow_rows(self, values: set[fx.Node]) -> dict[fx.Node, tuple[Factor, int, int]]:
        """Products by which alone split values are read outside, and which make fewer features of them: more rows.

        A state-space mixer computes its steps from the very features that it scans; their sum is small.
        """
        out: dict[fx.Node, tuple[Factor, int, int]] = {}
        for node in values:
            found = {}
            for user in node.users:
                if self._inside(user) or self._unread(node, user):
                    continue
                row = contraction(user, self.facts) if user.op == "call_function" else None
                if row is None or self.facts.operands[user][row[1]] is not node:
                    break
                at, (result, dim) = row[0].inputs[row[1]], next(iter(self.asked[node]))
                size, made = self.facts.shapes[node][result], self.facts.shapes[user][0]
                if at is None or at.dim != dim or at.blocks != (1,) or not _narrower(made, size):
                    break
                found[user] = row
            else:
                out |= found
        return out

    def closed(self) -> bool:
        """Whether no split value is read outside."""
        return not self.read_outside()

    def _is_statistic(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a call begins a sum over the split dim, such as a norm's mean square: the ranks share a small one."""
        asked = self.asked.get(node, {})
        found = len(asked) == 1 and self._sums(node, user, next(iter(asked))[1])
        self.met_norm |= found
        return found and self.through_norms

    def _sums(self, node: fx.Node, user: fx.Node, dim: int, depth: int = STATISTIC) -> bool:
        if user.op != "call_function" or len(self.facts.operands[user]) != 1 or not depth:
            return False
        recipe = self.facts.recipe(user)
        for factor in recipe.factors if recipe is not None else ():
            at, out = factor.inputs[0], factor.outputs[0]
            if at is None or at.dim != dim or at.blocks != (1,) or len(factor.outputs) > 1:
                continue
            if out is None:
                return factor.lowering in (None, "mean")
            return factor.lowering is None and all(self._sums(user, u, out.dim, depth - 1) for u in user.users)
        return False

    def _unread(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a call takes no more than shape or dtype of a value."""
        recipe = self.facts.recipe(user) if user.op == "call_function" else None
        at = {i for i, o in enumerate(self.facts.operands.get(user, ())) if o is node}
        return recipe is not None and at <= recipe.unread

    def _inside(self, user: fx.Node) -> bool:
        if user in self.region or user in self.split or user.op == "output":
            return True
        name = name_of(user.target)[1]
        if name in _SIZES:
            return True
        handed_out = name in WEIGHT_VIEWS or name in _CUTS or name in ("aten.cat", "aten.clone", "aten.contiguous")
        return (handed_out or user.target is operator.getitem) and all(self._inside(u) for u in user.users)


def _narrower(made: Shape, source: Shape) -> bool:
    """Whether a product has at most half the features of what it is made of."""
    few, many = made[-1], source[-1]
    return made[:-1] == source[:-1] and isinstance(few, int) and isinstance(many, int) and few * 2 <= many


def _merge(demand: Demand, size: Dim) -> tuple[int, ...] | None:
    """Segments that tile a dim become its blocks; None where they do not.

    >>> _merge({(0, 4): (1,), (4, 6): (1,), (6, 8): (1,)}, 8)
    (2, 1, 1)
    """
    ordered = sorted(demand.items(), key=lambda item: item[0][0])
    if len(ordered) == 1 and ordered[0][0] == (0, size):
        return ordered[0][1]
    position: Dim = 0
    blocks: list[int] = []
    scale = 1
    for _, inner in ordered:
        scale *= sum(inner)
    for (start, end), inner in ordered:
        if start != position or not isinstance(end, int):
            return None
        blocks += [(end - start) * b * (scale // sum(inner)) for b in inner]
        position = end
    return normalize_blocks(blocks) if position == size else None


ALONE = 1 / 16
"""The least size of a weight, beside the largest one of a pair, for which its product's result is gathered."""


def columns_alone(facts: Graph, size: int, taken: Mapping[fx.Node, Shard]) -> dict[fx.Node, tuple[fx.Node, Shard]]:
    """Products whose weight is split though no pair splits it: by its output features, the result gathered at once.

    That costs a gather of the result, and saves the memory of the weight: so it is done for large weights only, of
    which the model has several alike, or which lie in a list of layers. The keys of a single head that all queries
    share are such.
    """
    found: dict[fx.Node, tuple[fx.Node, Shard]] = {}
    for node in facts.order:
        product = contraction(node, facts) if node.op == "call_function" and node in facts.learned else None
        weight = product and facts.weights[facts.operands[node][product[2]]]
        if product and weight and weight not in taken:
            placement = _output_features(node, product, facts, size)
            if placement is not None:
                found[node] = weight, placement
    beside = [w for w in taken or (w for w, _ in found.values()) if len(shapes_of(w)[0]) > 1]
    least = ALONE * max(map(_matrix, beside), default=0)
    shapes = Counter((shapes_of(w)[0], p) for w, p in dict(found.values()).items())
    return {
        node: (weight, placement)
        for node, (weight, placement) in found.items()
        if _numel(weight) >= least and (shapes[shapes_of(weight)[0], placement] > 1 or _is_listed(weight))
    }


def _is_listed(weight: fx.Node) -> bool:
    """Whether a weight belongs to one of a list of modules."""
    return any(part.isdigit() for part in str(weight.target).split("."))


def _numel(weight: fx.Node) -> int:
    return math.prod(size for size in shapes_of(weight)[0] if isinstance(size, int))


def _matrix(weight: fx.Node) -> int:
    """The elements of a weight; of matrices in a row, as experts are, those of one."""
    shape = shapes_of(weight)[0]
    return _numel(weight) // (shape[0] if len(shape) == 3 and isinstance(shape[0], int) else 1)


def _output_features(node: fx.Node, product: tuple[Factor, int, int], facts: Graph, size: int) -> Shard | None:
    """How the weight of a product is split by its output features; None where it cannot be."""
    _, value, position = product
    recipe = facts.recipe(node)
    for factor in recipe.factors if recipe is not None else ():
        at = factor.inputs[position]
        if at is None or factor.inputs[value] is not None or factor.outputs[0] is None or factor.lowering:
            continue
        shares = _shares(factor.size, size)
        if at.blocks != (1,) or shares is None or 0 in shares:
            return None
        return _of_base(facts.operands[node][position], shard(at.dim, shares=shares), facts, size)
    return None


def _of_base(view: fx.Node, placement: Shard, facts: Graph, size: int) -> Shard | None:
    """How a weight is split where a view of it is split so; None where it cannot be."""
    while view.op == "call_function":
        recipe = facts.recipe(view)
        wanted = At.of(placement)
        for factor in recipe.factors if recipe is not None else ():
            cut = factor.cut_for(factor.outputs[0], wanted, size)
            if cut is not None and factor.inputs[0] is not None:
                placement = factor.inputs[0].placement(cut)
                break
        else:
            return None
        view = facts.operands[view][0]
    return placement


def vocabulary(facts: Graph, size: int, taken: Iterable[fx.Node]) -> dict[fx.Node, Shard]:
    """The vocabulary's table, and the head that scores it: split along the vocabulary.

    The table is the largest one that the model's inputs look up; heads are contractions with as many output features.
    """
    skip = set(taken)
    tables: dict[fx.Node, Dim] = {}
    for node in facts.order:
        if node.target is torch.ops.aten.embedding.default and node.args[0] in facts.weights and _given(node.args[1]):
            weight = facts.weights[node.args[0]]  # type: ignore[index]
            tables[weight] = shapes_of(weight)[0][0]
    if not tables:
        return {}
    largest = max(tables.values(), key=lambda s: s if isinstance(s, int) else 0)
    shares = _shares(largest, size)
    if shares is None or 0 in shares:
        return {}
    chosen = {w: v for w, v in tables.items() if v == largest and w not in skip}
    out = {w: shard(0, shares=shares) for w in chosen}
    for node in facts.order:
        found = contraction(node, facts) if node.op == "call_function" and node in facts.learned else None
        shape = facts.shapes[node][0]
        if found is None or not chosen or not shape or shape[-1] != largest:
            continue
        weight = facts.weights[facts.operands[node][found[2]]]
        recipe = facts.recipe(node)
        for factor in recipe.factors if recipe is not None else ():
            at = factor.inputs[found[2]]
            last = factor.outputs[0]
            if at is None or last is None or last.dim != len(shape) - 1 or weight in skip:
                continue
            if weight in out and out[weight].dim != at.dim:
                continue
            out[weight] = shard(at.dim, shares=shares)
            out |= {bias: shard(0, shares=shares) for bias in _biases(node, facts) if bias not in skip}
    return out


def _given(node: object) -> bool:
    """Whether a value is an input of the model, reshaped at most: the ids of words, not positions made in the graph."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(operands_of(node)) == 1:
        (node,) = operands_of(node)
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _biases(node: fx.Node, facts: Graph) -> Iterator[fx.Node]:
    for user in node.users:
        for operand in facts.operands.get(user, ()) if name_of(user.target)[1] == "aten.add" else ():
            if operand in facts.weights and len(shapes_of(operand)[0]) == 1:
                yield facts.weights[operand]


def residuals(facts: Graph, rows: Iterable[fx.Node]) -> list[fx.Node]:
    """The values to which the results of ``rows`` are added: the residual streams, at every place they are read."""
    fresh = set(rows)
    found: dict[fx.Node, None] = {}
    for node in facts.order:
        if node.op != "call_function":
            continue
        shape = facts.shapes[node]
        sources = [o for o in facts.operands[node] if o not in facts.weights]
        sources = [o for o in sources if o in facts.learned or facts.shapes[o] == shape]
        new = [o for o in sources if o in fresh]
        if not new:
            continue
        old = [o for o in sources if o not in fresh]
        if _passes_on(node, facts, new, old):
            fresh.add(node)
        elif name_of(node.target)[1] == "aten.add" and facts.shapes[old[0]] == shape:
            found[old[0]] = None
    return list(found)


def _passes_on(node: fx.Node, facts: Graph, new: list[fx.Node], old: list[fx.Node]) -> bool:
    """Whether a call hands on what is computed from ``new``: it is linear in these alone, and contracts nothing."""
    if name_of(node.target)[1] in ("aten.add", "aten.dropout"):
        return not old
    recipe = facts.recipe(node)
    if recipe is None or frozenset(i for i, o in enumerate(facts.operands[node]) if o in new) not in recipe.linear:
        return False
    return all(sum(at is not None for at in f.inputs) < 2 for f in recipe.factors if None in f.outputs)

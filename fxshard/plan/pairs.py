"""Finds column/row pairs in the dataflow, without knowing any name.

A *row* is a contraction of an activation with a weight: ``down_proj``, ``o_proj``. Splitting the contracted factor
needs the activation split along it. Walking back from there, each operator's rule says which dim of its operands must
be split, until the walk ends in the output features of other weights: the *columns* (``gate_proj`` and ``up_proj``; q,
k and v). A value that others read too stays whole and is cut where the region reads it; so is, for free, what is not
computed from weights (masks, rotary tables). A walk that meets a norm, or a residual stream, ends there without a
column: no pair.

A packed projection is cut in pieces on the way (q, k, v). The pieces' demands meet at its output: there, and in the
weight, each piece is a block that is split on its own. Pieces of which nothing is asked, such as the one key head that
all queries share, are stored in parts too where they are the smaller half, and gathered by who reads them.

Reference: Megatron-LM (Shoeybi et al., 2019), section 3.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from fxshard.placement import Cut, Shard, cut_of, normalize_blocks, shard
from fxshard.plan.graph import CUTS, Graph, contraction, elements, shapes_of, shares_among
from fxshard.rules.lookup import WEIGHT_VIEWS
from fxshard.rules.recipe import At, Dim, Factor, Recipe, Shape, uncombine, units
from fxshard.rules.table import find_rule, name_of
from fxshard.rules.views import segments_of
from fxshard.torch_internals import OperatorBase

Demand = dict[tuple[int, int], tuple[int, ...]]
"""What is asked of one value along one dim: [start, end) of a segment -> the blocks within it that are cut alike."""

_SIZES = {"aten.sym_size", "aten.sym_numel"}

SHARING = {"norm", "softmax", "reduction", "extreme", "position", "cumsum"}
"""Lowerings by which the ranks share statistics of a split dim."""

STATISTIC = 4
"""How many calls lead from a value to its sum at most: a cast, a square, a mean."""


@dataclass
class Pair:
    """One row, and what must be split for it."""

    row: fx.Node
    weights: dict[fx.Node, Shard] = field(default_factory=dict)


@dataclass
class Met:
    """What stood in the way of columns: a norm, and operators without a rule."""

    norm: bool = False
    without_rule: set[fx.Node] = field(default_factory=set)


def find_pair(row: fx.Node, facts: Graph, size: int, through_norms: bool, met: Met) -> Pair | None:
    """The pair of a row, if it is one."""
    found = contraction(row, facts)
    if found is None:
        return None
    if not _Walk(facts, Cut(), size, {row}, set(), split={facts.operands[row][found[1]]}).closed():
        return None  # its input is read by others: a norm's result, a residual stream
    tried: set[tuple[int, ...]] = set()
    obstacles = [found[0].size]
    candidates: list[tuple[bool, float, Pair]] = []
    while obstacles:  # uneven shares only where they spare more than even ones, and those of the most units first
        shares = shares_among(obstacles.pop(0), size)
        if shares is None or shares in tried:
            continue
        tried.add(shares)
        pair, walk = _walk_from(row, found, facts, Cut((1,), shares), size, through_norms)
        met.norm |= walk.met_norm
        met.without_rule |= walk.without_rule
        if pair is not None:
            candidates.append((not walk.packed, _saved(pair, size), pair))
        obstacles = sorted({*obstacles, *walk.obstacles}, reverse=True)
    # rather without pieces that are gathered
    return max(candidates, key=lambda each: each[:2])[2] if candidates else None


def _saved(pair: Pair, size: int) -> float:
    """How many elements of weights the rank that holds most of them is spared."""

    def spared(placement: Shard) -> float:
        shares = cut_of(placement).shares or (1,) * size
        return 1 - max(shares) / sum(shares)

    return sum(elements(shapes_of(weight)[0]) * spared(placement) for weight, placement in pair.weights.items())


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
        narrow = {node: more for node, more in walk.narrow_rows(read_outside).items() if more.keys() - rows.keys()}
        more = {each: found for rows_of in narrow.values() for each, found in rows_of.items()}
        rows |= more
        # what is shared with others, as a position bias is by all layers, is whole, and cut where it is read
        whole |= read_outside - narrow.keys()
    own = {facts.weights[facts.operands[each][position]] for each, (_, _, position) in rows.items()}
    own = own.union(*(facts.unpacked.get(weight, ()) for weight in own))
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
    packed: set[fx.Node] = field(default_factory=set)
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
        if name in CUTS and self._through_cut(node, asked, dim):
            return
        recipe = self.facts.recipe(node)
        shapes = self.facts.shapes[node]
        found = None
        merged = {_merge(demand, shapes[result][dim]) for (result, _), demand in asked.items()}
        if merged == {None} and len(asked) == 1 and not self.cut.shares:
            ((_, demand),) = asked.items()
            merged = {_merge(_filled(demand, shapes[0][dim], self.size), shapes[0][dim])}
            self.packed.add(node)
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
        pieces = {result for result, _ in asked}
        for (result, _), demand in asked.items():
            blocks = _merge(demand, parts[result][1] - parts[result][0])
            if blocks is None:
                return False
            self.ask_segment(operand, 0, dim, parts[result][0], parts[result][1], blocks)
        if len(pieces) < len(parts):
            self.packed.add(node)
        self.split.add(node)
        self.region.add(node)
        return True

    def read_outside(self) -> set[fx.Node]:
        """The split values that are read by others than the region, and not just handed out."""
        return {
            node
            for node in self.split - self.packed
            if not all(self._inside(u) or self._unread(node, u) or self._is_statistic(node, u) for u in node.users)
        }

    def narrow_rows(self, values: set[fx.Node]) -> dict[fx.Node, dict[fx.Node, tuple[Factor, int, int]]]:
        """Values that are read outside only by products that make fewer features of them, and these: more rows.

        A state-space mixer computes its steps from the very features that it scans; their sum is small. So is what a
        squeeze-and-excitation makes of the features that it weighs, first meaned over all places.
        """
        out: dict[fx.Node, dict[fx.Node, tuple[Factor, int, int]]] = {}
        for node in values:
            found: dict[fx.Node, tuple[Factor, int, int]] = {}
            result, dim = next(iter(self.asked[node]))
            if all(self._narrows(node, user, result, dim, found) for user in node.users):
                out[node] = found
        return out

    def _narrows(
        self,
        node: fx.Node,
        user: fx.Node,
        result: int,
        dim: int,
        found: dict[fx.Node, tuple[Factor, int, int]],
        depth: int = STATISTIC,
    ) -> bool:
        """Whether a reader is inside, or leads to such products, which are added to ``found``."""
        if self._inside(user) or self._unread(node, user):
            return True
        if user.op != "call_function" or not depth:
            return False
        row = contraction(user, self.facts)
        if row is not None and self.facts.operands[user][row[1]] is node:
            at = row[0].inputs[row[1]]
            narrower = _narrower(self.facts.shapes[user][0], self.facts.shapes[node][result])
            if at is None or at.dim != dim or at.blocks != (1,) or not narrower:
                return False
            found[user] = row
            return True
        recipe = self.facts.recipe(user)
        if recipe is None or len(self.facts.operands[user]) != 1 or len(self.facts.shapes[user]) != 1:
            return False
        for factor in recipe.factors:
            at, out = factor.inputs[0], factor.outputs[0]
            if at is not None and at.dim == dim and at.blocks == (1,) and out is not None and factor.lowering is None:
                return all(self._narrows(user, u, 0, out.dim, found, depth - 1) for u in user.users)
        return False

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
        handed_out = name in WEIGHT_VIEWS or name in CUTS or name in ("aten.cat", "aten.clone", "aten.contiguous")
        return (handed_out or user.target is operator.getitem) and all(self._inside(u) for u in user.users)


def _filled(demand: Demand, size: Dim, parts: int) -> Demand:
    """A demand for pieces of a dim, and for what lies between them: if that is the smaller half, and can be cut.

    >>> _filled({(0, 4): (1,)}, 6, 2)
    {(0, 4): (1,), (4, 6): (1,)}
    """
    out, position, missing = dict(demand), 0, 0
    ends = sorted(demand)
    for start, end in [*ends, (size, size)]:
        if not isinstance(start, int) or not isinstance(end, int):
            return demand
        if start > position:
            out[position, start] = (1,)
            missing += start - position
            if (start - position) % parts:
                return demand
        position = end
    return dict(sorted(out.items())) if isinstance(size, int) and missing * 2 <= size else demand


def _narrower(made: Shape, source: Shape) -> bool:
    """Whether a product has at most half the elements of what it is made of."""
    return len(made) == len(source) and elements(made) * 2 <= elements(source)


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

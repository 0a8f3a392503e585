"""What tensor parallelism splits: the column/row pairs, the vocabulary, and the large weights that neither covers.

Reference: Megatron-LM (Shoeybi et al., 2019), section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxshard.placement import Shard, shard
from fxshard.plan.graph import Graph, contraction, elements, shapes_of, shares_among
from fxshard.plan.pairs import Met, Pair, find_pair
from fxshard.rules.recipe import At, Dim, Factor, Shape, operands_of
from fxshard.rules.table import name_of


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

    A weight is split one way only: of two pairs that would split it in two ways, the first one is left, unless the
    other is far larger, as an attention is beside a small MLP that makes its position bias. A pair with a norm over the
    split dim inside, whose ranks share statistics, is one only where there is none without.
    """
    taken: dict[fx.Node, Shard] = {}
    pairs: dict[fx.Node, Pair] = {}
    behind_norms: list[fx.Node] = []
    without_rule: set[fx.Node] = set()

    def find(rows: Iterable[fx.Node], through_norms: bool) -> None:
        for row in rows:
            met = Met()
            pair = find_pair(row, facts, size, through_norms, met)
            without_rule.update(met.without_rule)
            if met.norm:
                behind_norms.append(row)
            have = pairs[row].weights if row in pairs else {}
            if pair is None or pair.weights.keys() <= have.keys():
                continue
            apart = {w for w, p in pair.weights.items() if not _agree(taken.get(w), p)}
            others = [each for each in pairs.values() if apart & each.weights.keys()]
            beside = sum(sum(map(_numel, each.weights)) for each in others)
            of_pairs = apart <= {weight for each in others for weight in each.weights} and not through_norms
            if not apart or (of_pairs and sum(map(_numel, pair.weights)) >= FAR_LARGER * beside):
                for each in others:
                    del pairs[each.row]
                pairs[pair.row] = pair
                if others:
                    taken.clear()
                    taken.update(words)
                    for each in pairs.values():
                        taken.update(each.weights)
                taken.update(pair.weights)

    words: dict[fx.Node, Shard] = {}
    find([n for n in facts.order if n.op == "call_function" and n in facts.learned], through_norms=False)
    words |= vocabulary(facts, size, taken)
    taken |= words
    find(tuple(behind_norms), through_norms=True)
    rows = sorted(pairs, key=facts.order.__getitem__)
    return Split(
        tuple(pairs[row] for row in rows),
        words,
        columns_alone(facts, size, taken),
        tuple(sorted(without_rule, key=facts.order.__getitem__)),
    )


def _agree(have: Shard | None, want: Shard) -> bool:
    return have is None or repr(have) == repr(want)


FAR_LARGER = 4
"""How many times the elements of the pairs that it contradicts a pair must have to take their place."""
WHOLE, WHOLE_BESIDE = 1 / 20, 1 / 4
"""What part of the matrices may be whole on every rank, and how much that may be beside a rank's own part."""
CHEAP = 8
"""How many times the elements of a result a weight must have for which it is gathered, though it stands alone."""
ALONE = 1 / 16
"""The least size of a weight, beside the largest one of a pair, for which its product's result is gathered."""


def columns_alone(facts: Graph, size: int, taken: Mapping[fx.Node, Shard]) -> dict[fx.Node, tuple[fx.Node, Shard]]:
    """Products whose weight is split though no pair splits it: by its output features, the result gathered at once.

    That costs a gather of the result, and saves the memory of the weight: so it is done for large weights only, of
    which the model has several alike, or which lie in a list of layers, or beside which the result is small, and only
    while too much of the model would be whole. The keys of a single head that all queries share may be such, and the
    head of a classifier.
    """
    found: dict[fx.Node, tuple[fx.Node, Shard]] = {}
    for node in facts.order:
        product = contraction(node, facts) if node.op == "call_function" and node in facts.learned else None
        weight = product and facts.weights[facts.operands[node][product[2]]]
        if product and weight and weight not in taken and weight not in facts.unpacked:
            placement = _output_features(node, product, facts, size)
            if placement is not None:
                found[node] = weight, placement
    beside = [w for w in taken or (w for w, _ in found.values()) if len(shapes_of(w)[0]) > 1]
    least = ALONE * max(map(_matrix, beside), default=0)
    shapes = Counter((shapes_of(w)[0], p) for w, p in dict(found.values()).items())
    groups: dict[tuple[Shape, Shard], dict[fx.Node, tuple[fx.Node, Shard]]] = {}
    for node, (weight, placement) in found.items():
        alike = shapes_of(weight)[0], placement
        cheap = _numel(node) * CHEAP <= _numel(weight)
        if _numel(weight) >= least and (shapes[alike] > 1 or _is_listed(weight) or cheap):
            groups.setdefault(alike, {})[node] = weight, placement
    matrices = {w for w in facts.weights.values() if len(shapes_of(w)[0]) > 1 and w not in facts.unpacked}
    whole = sum(map(_numel, matrices - set(taken)))
    may_be = sum(map(_numel, matrices)) * min(WHOLE, WHOLE_BESIDE / size)
    out: dict[fx.Node, tuple[fx.Node, Shard]] = {}
    for group in sorted(groups.values(), key=lambda each: -sum(map(_numel, {w for w, _ in each.values()}))):
        if whole > may_be:
            out |= group
            whole -= sum(map(_numel, {w for w, _ in group.values()}))
    return out


def _is_listed(weight: fx.Node) -> bool:
    """Whether a weight belongs to one of a list of modules."""
    return any(part.isdigit() for part in str(weight.target).split("."))


def _numel(node: fx.Node) -> int:
    return elements(shapes_of(node)[0])


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
        shares = shares_among(factor.size, size)
        if at.blocks != (1,) or shares is None or 0 in shares:
            return None
        return of_base(facts.operands[node][position], shard(at.dim, shares=shares), facts, size)
    return None


def of_base(view: fx.Node, placement: Shard, facts: Graph, size: int) -> Shard | None:
    """How a weight is split where a view of it is split so; None where it cannot be."""
    while view.op == "call_function":
        recipe, operands = facts.recipe(view), facts.operands[view]
        at = next(i for i, o in enumerate(operands) if facts.weights.get(o) is facts.weights.get(view))
        wanted = At.of(placement)
        for factor in recipe.factors if recipe is not None else ():
            cut = factor.cut_for(factor.outputs[0], wanted, size)
            where = factor.inputs[at]
            if cut is not None and where is not None:
                placement = where.placement(cut)
                break
        else:
            return None
        view = facts.operands[view][at]
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
    shares = shares_among(largest, size)
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
            if at is None or last is None or last.dim != len(shape) - 1 or weight in skip or weight in facts.unpacked:
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

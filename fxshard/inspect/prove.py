"""check_rule: proves an operator's rule by running it.

A rule claims three things of a call, and each is tried on sample calls, forward and backward:

    a factor      cut the operands along it, run every rank's part, join the results (sum them where the factor is
                  missing): they are the whole call's. Gradients by the conversion table: an operand that has the factor
                  has its part of the gradient; of one that lacks it, the ranks' gradients sum; a Partial result hands
                  the whole cotangent to every rank.
    linear sets   f(P1) + f(P2) == f(P1 + P2), the other operands equal; their gradients sum.
    unread        an operand that is not read may hold anything, in any local shape.

What a rank runs is what the compiler would write: the call stands in a graph of one node, which ``localize`` makes
local. Every factor is tried on several rank counts, plain and in blocks, and on two axes at once. float64 keeps
differences of rounding below the tolerance.

It lies here and not with the rules, because it needs the passes and the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxshard.codegen.spelling import is_ours
from fxshard.errors import RuleError
from fxshard.ir.conversions import CONVERSIONS
from fxshard.ir.facts import may_lower, recipe_on_parts, split_choice
from fxshard.ir.info import Choice, Info, set_info, values_of
from fxshard.mesh import Mesh
from fxshard.passes.localize import localize
from fxshard.passes.propagate import may_be_empty
from fxshard.placement import (
    PARTIAL,
    REPLICATE,
    VARYING,
    Placement,
    Placements,
    Varying,
    chunk_shares,
    cut_all,
    cut_of,
    describe,
    is_partial,
    is_shard,
    is_uneven,
    join,
    local_shape,
    shard,
)
from fxshard.ruler import compare
from fxshard.rules.recipe import At, Recipe, RuleFunction, operands_of, shape_of, units
from fxshard.rules.table import find_rule, temporary_rule
from fxshard.runtime import collectives as run
from fxshard.runtime.lockstep import Turns, lockstep_axes, run_ranks
from fxshard.runtime.ring import ring_attention
from fxshard.runtime.row_groups import group_rows
from fxshard.torch_internals import OpOverload

DOUBLE, SINGLE = 1e-12, 1e-5
"""How far a result may be off, where all types are double ones and otherwise: what rounds to zero has no scale."""
BLOCKS = ((1,), (1, 1), (2, 1), (1, 1, 1))
MESHES = ((2,), (3,), (4,), (2, 2), (2, 3))
_MEET = {*CONVERSIONS, ring_attention}


@dataclass(frozen=True)
class Sample:
    """One call to try a rule on.

    Attributes:
        args: the positional arguments, tensors among them.
        kwargs: the others.
        values: whether the results' values are defined (those of ``empty_like`` are not).
        gradients: whether to differentiate.
        constants: operands to which the operator has no gradient.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    values: bool = True
    gradients: bool = True
    constants: tuple[int, ...] = ()


@dataclass(frozen=True)
class Proof:
    """What was tried, and held.

    Attributes:
        calls: the number of sample calls.
        splits: how many ways to split one of them were run.
        factors: the names of the factors that were split at least once.
        untried: factors that no sample could be split along; empty in a full proof.
        linear: how many times a Partial was passed through.
    """

    calls: int
    splits: int
    factors: frozenset[str]
    untried: frozenset[str]
    linear: int


def check_rule(
    operator: OpOverload,
    calls: Sequence[Sample | tuple[Any, ...]],
    rule: str | RuleFunction | None = None,
    *,
    linear: str = "",
    meshes: Sequence[tuple[int, ...]] = MESHES,
) -> Proof:
    """Tries a rule on calls of its operator; see the module's text for what is tried.

    Args:
        operator: an overload, such as ``torch.ops.aten.linear.default``.
        calls: arguments to call it with; sizes that 2, 3 and 4 divide can be split. Use float64.
        rule: as in ``register_rule``; by default the one that is registered.
        linear: as in ``register_rule``, where ``rule`` is given.
        meshes: the sizes of the meshes to try.

    Raises:
        RuleError: with the first call that does not do what the rule says.

    >>> x, w = torch.randn(12, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    >>> sorted(check_rule(torch.ops.aten.linear.default, [(x, w)]).factors)
    ['d0', 'i', 'o']
    >>> check_rule(torch.ops.aten.softmax.int, [(x, -1)], "... d -> ... d")
    Traceback (most recent call last):
        ...
    fxshard.errors.RuleError: the rule of aten.softmax.int is wrong: split over 'd', ...
    """
    if rule is not None:
        with temporary_rule(operator, rule, linear=linear):
            return check_rule(operator, calls, meshes=meshes)
    if find_rule(operator) is None:
        raise RuleError(f"there is no rule for {operator}", fix="give one, or register it first")
    proofs = [_Trial.of(operator, c if isinstance(c, Sample) else Sample(c)).prove(meshes) for c in calls]
    factors = frozenset[str]().union(*(p.factors for p in proofs))
    untried = frozenset[str]().union(*(p.untried for p in proofs)) - factors
    return Proof(len(calls), sum(p.splits for p in proofs), factors, untried, sum(p.linear for p in proofs))


@dataclass
class _Trial:
    """One sample call, and what it gives on one device."""

    operator: OpOverload
    sample: Sample
    node: fx.Node
    operands: list[torch.Tensor]
    outputs: list[Any]
    cotangents: list[torch.Tensor | None]
    grads: list[torch.Tensor | None]
    whole: tuple[tuple[Any, ...], ...]

    @property
    def tolerance(self) -> float:
        """How far results may be off: more where a single-precision sum is rounded."""
        made = [v for v in (*self.operands, *self.outputs) if _is_float(v)]
        return DOUBLE if all(v.dtype in (torch.float64, torch.complex128) for v in made) else SINGLE

    @staticmethod
    def of(operator: OpOverload, sample: Sample) -> _Trial:
        node, operands = _graph_of(operator, sample)
        leaves = [_leaf(x, i, sample) for i, x in enumerate(operands)]
        torch.default_generator.manual_seed(0)
        results = _flat(_interpret(node.graph, leaves, {}))
        node.meta["val"] = _detached(_interpret(node.graph, operands, {}))
        cotangents = [_cotangent(out) for out in results]
        (grads,) = _gradients([results], [leaves], [cotangents])
        outputs = [out.detach() if isinstance(out, torch.Tensor) else out for out in results]
        return _Trial(operator, sample, node, operands, outputs, cotangents, grads, tuple(map(shape_of, operands)))

    def recipe(self, placements: Sequence[Placement], outer: Sequence[Choice], sizes: Sequence[int]) -> Recipe:
        """What the rule says once the axes of ``outer`` have cut the call."""
        inputs = [(shape, tuple(c.inputs[i] or REPLICATE for c in outer)) for i, shape in enumerate(self.whole)]
        results = enumerate(values_of(self.node))
        outputs = [(shape_of(v), tuple(c.outputs[k] for c in outer)) for k, v in results]
        found = recipe_on_parts(self.node, inputs, outputs, sizes, placements)
        assert found is not None
        return found

    def prove(self, meshes: Sequence[tuple[int, ...]]) -> Proof:
        names: set[str] = set()
        splits = 0
        for sizes in meshes:
            for choices in self._splits(sizes):
                names |= {str(c.factor) for c in choices}
                splits += 1
                self._check_split(choices, sizes)
        plain = self.recipe([REPLICATE] * len(self.operands), (), ())
        self._check_unread(plain)
        linear = sum(self._check_linear(members) for members in plain.linear)
        return Proof(1, splits, frozenset(names), frozenset(f.name for f in plain.factors) - names, linear)

    def _splits(self, sizes: tuple[int, ...], outer: tuple[Choice, ...] = ()) -> Iterator[tuple[Choice, ...]]:
        """Every way to split the call over axes of ``sizes``: one factor an axis."""
        if len(outer) == len(sizes):
            yield outer
            return
        size = sizes[len(outer)]
        shapes = [
            local_shape(shape, tuple(c.inputs[i] or REPLICATE for c in outer), sizes[: len(outer)])
            for i, shape in enumerate(self.whole)
        ]
        seen = set()
        for current in _layouts(shapes, size, plain=len(sizes) > 1):
            recipe = self.recipe(current, outer, sizes[: len(outer)])
            for factor in recipe.factors:
                if not may_lower(outer, factor):
                    continue
                for i, at in enumerate(factor.inputs):
                    cut = factor.cut_for(at, At.of(current[i]), size)
                    if cut is None or i in recipe.unread or (0 in cut.shares and not may_be_empty(factor)):
                        continue
                    differentiable = [_is_float(x) for x in self.operands]
                    choice = split_choice(factor, cut, differentiable, recipe.unread, 0)
                    key = (choice.factor, choice.lowering, tuple(map(repr, (choice.inputs, choice.outputs))))
                    if key not in seen:
                        seen.add(key)
                        yield from self._splits(sizes, (*outer, choice))

    def _check_split(self, choices: tuple[Choice, ...], sizes: tuple[int, ...]) -> None:
        unread = self.recipe([REPLICATE] * len(self.operands), (), ()).unread
        free = [i for i in unread if any(c.inputs[i] is None for c in choices)]
        for shapes in (False, True) if free else (False,):
            inputs = [
                tuple((c.inputs[i] or self._any_form(i, math.prod(sizes), shapes)) for c in choices)
                for i in range(len(self.operands))
            ]
            outputs = [tuple(c.outputs[k] for c in choices) for k in range(len(self.outputs))]
            self._compare(choices, sizes, inputs, outputs, unread)

    def _any_form(self, index: int, size: int, split: bool) -> Placement:
        """A form that an operand which is not read may have: whole, or split where ``size`` divides a dim."""
        dims = [d for d, s in enumerate(self.whole[index]) if s % size == 0 and s]
        return shard(dims[-1]) if split and dims else REPLICATE

    def _check_unread(self, recipe: Recipe) -> None:
        for i in recipe.unread:
            forms = [shard(d) for d, s in enumerate(self.whole[i]) if s and s % 2 == 0]
            for form in (REPLICATE, *forms):
                inputs = [(form if k == i else REPLICATE,) for k in range(len(self.operands))]
                asked = tuple(None if k in recipe.unread else REPLICATE for k in range(len(self.operands)))
                choice = Choice("whole", asked, (REPLICATE,) * len(self.outputs))
                outputs = [(REPLICATE,)] * len(self.outputs)
                self._compare((choice,), (2,), inputs, outputs, recipe.unread)

    def _check_linear(self, members: frozenset[int]) -> int:
        if any(self.operands[i].dtype == torch.bool for i in members):
            return 0
        for size in (2, 3):
            others = [VARYING if _is_float(x) else REPLICATE for x in self.operands]
            inputs = [(PARTIAL if i in members else other,) for i, other in enumerate(others)]
            choice = Choice("partial", tuple(p for (p,) in inputs), (PARTIAL,) * len(self.outputs))
            self._compare((choice,), (size,), inputs, [(PARTIAL,)] * len(self.outputs), frozenset())
        return 1

    def _compare(
        self,
        choices: tuple[Choice, ...],
        sizes: tuple[int, ...],
        inputs: Sequence[Placements],
        outputs: Sequence[Placements],
        unread: frozenset[int],
    ) -> None:
        mesh = Mesh(tuple(f"axis{a}" for a in range(len(sizes))), sizes)
        ranks = [mesh.coordinate(r) for r in range(mesh.world_size)]
        parts = []
        known_inputs, known_outputs = ([self._counted(p, sizes) for p in side] for side in (inputs, outputs))
        for i, operand in enumerate(self.operands):
            summands = _summands(operand, sizes[0]) if is_partial(inputs[i][0]) else None
            values = _garbage(operand) if i in unread else operand
            parts.append([summands[at[0]] if summands else cut_all(values, known_inputs[i], sizes, at) for at in ranks])
        try:
            leaves = [[_leaf(p[r], i, self.sample) for i, p in enumerate(parts)] for r in range(len(ranks))]
            results = self._run(mesh, choices, inputs, outputs, leaves)
            if any(len(result) != len(outputs) for result in results):
                raise RuleError(f"a rank gives {len(results[0])} results, not {len(outputs)}")
            cotangents = [
                [None if g is None else cut_all(g, known_outputs[k], sizes, at) for k, g in enumerate(self.cotangents)]
                for at in ranks
            ]
            for k, expected in enumerate(self.outputs):
                made = [result[k] for result in results]
                if isinstance(expected, torch.Tensor):
                    made = [m.detach() if self.sample.values else torch.zeros_like(m) for m in made]
                    whole = self._join(made, known_outputs[k], sizes)
                    _same(whole, expected, f"result {k}", self.tolerance, self.sample.values)
            grads = _gradients(results, leaves, cotangents)
            for i in range(len(self.grads)):
                if i not in unread:
                    self._compare_grad(i, [g[i] for g in grads], known_inputs[i], sizes, leaves)
        except Exception as error:
            raise self._wrong(choices, sizes, inputs, outputs, error) from error

    def _counted(self, placements: Placements, sizes: Sequence[int]) -> Placements:
        """The placements, where rows in groups are cut by how many of them the ranks have in this sample."""
        out = []
        for placement, size in zip(placements, sizes, strict=True):
            groups = cut_of(placement).groups
            if groups is not None:
                (ends,) = (
                    o for o, n in zip(self.operands, operands_of(self.node), strict=True) if n.name == groups.ends
                )
                shares = cut_of(placement).shares
                lengths = tuple(len(ends) * share // sum(shares) for share in shares)
                axis = run.Axis("axis", size, 0, None)  # type: ignore[arg-type]
                placement = shard(placement.dim, shares=group_rows(ends, axis, groups.rows, lengths))  # type: ignore[attr-defined]
            out.append(placement)
        return tuple(out)

    def _compare_grad(
        self,
        i: int,
        made: list[torch.Tensor | None],
        placements: Placements,
        sizes: tuple[int, ...],
        leaves: Sequence[Sequence[torch.Tensor]],
    ) -> None:
        expected = self.grads[i]
        if not leaves[0][i].requires_grad or (expected is None and all(m is None for m in made)):
            return
        values = [torch.zeros_like(leaves[r][i]).detach() if m is None else m for r, m in enumerate(made)]
        whole = torch.zeros_like(self.operands[i]) if expected is None else expected
        if is_partial(placements[0]):
            for value in values:
                _same(value, whole, f"gradient of operand {i}", self.tolerance)
        else:
            _same(self._join(values, placements, sizes), whole, f"gradient of operand {i}", self.tolerance)

    def _join(self, parts: Sequence[torch.Tensor], placements: Placements, sizes: Sequence[int]) -> torch.Tensor:
        return _join_all(parts, placements, sizes, self.tolerance)

    def _run(
        self,
        mesh: Mesh,
        choices: tuple[Choice, ...],
        inputs: Sequence[Placements],
        outputs: Sequence[Placements],
        leaves: Sequence[Sequence[torch.Tensor]],
    ) -> list[list[Any]]:
        for operand, placements in zip(operands_of(self.node), inputs, strict=True):
            set_info(operand, Info((placements,), differentiable=_is_float(operand.meta["val"])))
        set_info(self.node, Info(tuple(outputs), choices, any(g is not None for g in self.cotangents)))
        set_info(next(iter(reversed(self.node.graph.nodes))), Info(()))
        graphs = [localize(self.node.graph, mesh)]
        if any(map(is_uneven, (*inputs, *outputs))):
            graphs += [localize(self.node.graph, mesh, rank) for rank in range(1, mesh.world_size)]
        for graph in graphs:
            graph.lint()
        meets = any(n.target in _MEET for n in graphs[0].nodes)
        turns = Turns(mesh.world_size)
        axes = lockstep_axes(mesh, turns)

        def one(rank: int) -> list[Any]:
            torch.default_generator.manual_seed(0)
            return _flat(_interpret(graphs[rank % len(graphs)], leaves[rank], axes[rank]))

        ranks = range(mesh.world_size)
        return run_ranks(mesh.world_size, turns, one) if meets else [one(rank) for rank in ranks]

    def _wrong(
        self,
        choices: tuple[Choice, ...],
        sizes: tuple[int, ...],
        inputs: Sequence[Placements],
        outputs: Sequence[Placements],
        error: Exception,
    ) -> RuleError:
        how = " and ".join(repr(c.factor) if c.factor else f"{c.kind} operands" for c in choices)
        lines = [f"the rule of {self.operator} is wrong: split over {how}, {' x '.join(map(str, sizes))} ranks"]
        text = str(error) if isinstance(error, RuleError) else f"{type(error).__name__}: {error}"
        lines.append(f"  found   {text.strip().splitlines()[0] if text.strip() else text}")
        lines.append(f"  call    {self.describe()}")
        for i, (shape, placements) in enumerate(zip(self.whole, inputs, strict=True)):
            lines.append(f"  operand {i} {list(shape)}: {', '.join(map(describe, placements))}")
        for k, placements in enumerate(outputs):
            lines.append(f"  result  {k} {list(shape_of(self.outputs[k]))}: {', '.join(map(describe, placements))}")
        return RuleError("\n".join(lines))

    def describe(self) -> str:
        """The sample call, tensors by type and shape."""
        args = [_text(a) for a in self.sample.args] + [f"{k}={_text(v)}" for k, v in self.sample.kwargs.items()]
        return f"{self.operator}({', '.join(args)})"


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return repr(value)


def _graph_of(operator: OpOverload, sample: Sample) -> tuple[fx.Node, list[torch.Tensor]]:
    """A graph of one call; every placeholder knows which operand it is (``meta["operand"]``)."""
    graph = fx.Graph()

    def lift(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            node = graph.placeholder(f"x{len(graph.nodes)}")
            node.meta["val"] = value
            return node
        return type(value)(map(lift, value)) if isinstance(value, (list, tuple)) else value

    args, kwargs = tuple(map(lift, sample.args)), {k: lift(v) for k, v in sample.kwargs.items()}
    node = graph.call_function(operator, args, kwargs)
    graph.output(node)
    operands = operands_of(node)
    for i, operand in enumerate(operands):
        operand.meta["operand"] = i
    return node, [operand.meta["val"] for operand in operands]


def _interpret(graph: fx.Graph, operands: Sequence[torch.Tensor], axes: Mapping[str, run.Axis]) -> Any:
    """Runs a graph of one call, or what ``localize`` made of it."""
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = operands[node.meta["operand"]]
        elif node.op == "output":
            return fx.map_arg(node.args[0], env.__getitem__)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            if is_ours(node.target):
                args = tuple(axes.get(a, a) if isinstance(a, str) else a for a in args)
            env[node] = node.target(*args, **kwargs)
    raise AssertionError("the graph has no output")


def _layouts(shapes: Sequence[tuple[Any, ...]], size: int, plain: bool) -> Iterator[list[Placement]]:
    """How an axis may already cut the operands: one of them, or all alike, plain and in blocks, evenly or not."""
    count = len(shapes)
    for blocks in BLOCKS[:1] if plain else BLOCKS:
        for d in range(max(map(len, shapes), default=0)):
            forms = [_form(d, shape[d], blocks, size) if d < len(shape) else None for shape in shapes]
            for i, form in enumerate(forms):
                if form is not None:
                    yield [form if k == i else REPLICATE for k in range(count)]
            if count > 1 and forms[0] is not None and all(form == forms[0] for form in forms):
                yield [forms[0]] * count
                yield [forms[0] if k else shard(d, shares=cut_of(forms[0]).shares) for k in range(count)]


def _form(dim: int, length: int, blocks: tuple[int, ...], size: int) -> Placement | None:
    """A dim cut in ``blocks``, with uneven shares where its length does not divide; None where it cannot be."""
    if length == 0 or length % sum(blocks):
        return None
    if units(length, blocks, size):
        return shard(dim, blocks)
    return shard(dim, blocks, chunk_shares(length // sum(blocks), size))


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _detached(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_detached, value)) if type(value) in (list, tuple) else tuple(map(_detached, value))
    return value.detach() if isinstance(value, torch.Tensor) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _leaf(value: torch.Tensor, index: int, sample: Sample) -> torch.Tensor:
    return value.detach().requires_grad_(sample.gradients and _is_float(value) and index not in sample.constants)


def _cotangent(value: Any) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return None
    return _like(value.detach())


def _like(value: torch.Tensor) -> torch.Tensor:
    """Other values of the same type and shape."""
    if _is_float(value):
        return torch.randn(value.shape, dtype=value.dtype)
    if value.dtype == torch.bool:
        return torch.rand(value.shape) < 0.5
    return torch.randint(0, 9, value.shape).to(value.dtype)


def _garbage(value: torch.Tensor) -> torch.Tensor:
    return torch.full_like(value, float("nan")) if _is_float(value) else _like(value)


def _summands(value: torch.Tensor, size: int) -> list[torch.Tensor]:
    torch.default_generator.manual_seed(1)
    out = [_like(value) for _ in range(size - 1)]
    return [value - sum(out), *out]


def _join_all(
    parts: Sequence[torch.Tensor], placements: Placements, sizes: Sequence[int], tolerance: float
) -> torch.Tensor:
    """The whole value from all ranks' parts: the inverse of ``cut_all``; what replicates must be equal everywhere."""
    if not sizes:
        return parts[0]
    step = len(parts) // sizes[0]
    rows = [_join_all(parts[i * step : (i + 1) * step], placements[1:], sizes[1:], tolerance) for i in range(sizes[0])]
    placement = placements[0]
    if isinstance(placement, Varying):
        placement = PARTIAL
    if not is_shard(placement) and not is_partial(placement):
        for row in rows[1:]:
            _same(row, rows[0], "a replicated value on another rank", tolerance)
    whole = list(rows[0].shape)
    if is_shard(placement):
        dim = placement.dim
        whole[dim] = sum(row.shape[dim] for row in rows)
    expected = [local_shape(whole, (placement,), sizes[:1], (i,)) for i in range(sizes[0])]
    if [tuple(row.shape) for row in rows] != expected:
        raise RuleError(f"the ranks' results have the shapes {[list(row.shape) for row in rows]}")
    return join(rows, placement)


def _gradients(
    results: Sequence[Sequence[Any]],
    leaves: Sequence[Sequence[torch.Tensor]],
    cotangents: Sequence[Sequence[torch.Tensor | None]],
) -> list[list[torch.Tensor | None]]:
    """For every rank the gradients of its operands; all ranks in one backward pass, as real ranks run theirs."""
    outs, given = [], []
    for result, row in zip(results, cotangents, strict=True):
        for out, cotangent in zip(result, row, strict=True):
            if cotangent is not None and out.requires_grad:
                outs.append(out)
                given.append(cotangent)
    wanted = [leaf for row in leaves for leaf in row if leaf.requires_grad]
    found: Iterator[torch.Tensor | None] = iter(())
    if outs and wanted:
        found = iter(torch.autograd.grad(outs, wanted, given, allow_unused=True))
    return [[next(found, None) if leaf.requires_grad else None for leaf in row] for row in leaves]


def _same(made: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float, values: bool = True) -> None:
    if made.shape != expected.shape:
        raise RuleError(f"{what} has the shape {list(made.shape)}, not {list(expected.shape)}")
    if made.dtype != expected.dtype:
        raise RuleError(f"{what} is {made.dtype}, not {expected.dtype}")
    if not values:
        return
    (row,) = compare([(what, made, expected)], tolerance, floor=tolerance)
    if not row.ok:
        raise RuleError(f"{what} differs from the whole call's by {row.error:.3g}")

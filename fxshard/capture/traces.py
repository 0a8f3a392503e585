"""Several traces of one model, side by side: where they are equal, and what only one of them computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxshard.capture.decisions import is_mark
from fxshard.errors import CaptureError
from fxshard.ir.origins import module_of, source_of
from fxshard.ir.root import Root
from fxshard.runtime.module import find
from fxshard.torch_internals import pytree

__all__ = ["Meeting", "Trace", "alike", "check_drawn", "operands", "refused", "same_leaves"]


@dataclass
class Trace:
    """One trace of a model.

    Attributes:
        root: the graph.
        count: how many decisions it met.
        same: what must not depend on a decision, such as the tree of the outputs.
    """

    root: Root
    count: int
    same: Any
    segments: list[list[fx.Node]] = field(default_factory=list)
    marks: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        segment: list[fx.Node] = []
        for node in self.root.graph.nodes:
            if is_mark(node):
                self.segments.append(segment)
                self.marks.append(node)
                segment = []
            elif node.op in ("call_function", "output"):
                segment.append(node)
        self.segments.append(segment)


class Meeting:
    """Two traces side by side.

    Attributes:
        own: decision -> what only the base computes behind it.
        other: decision -> what only the other trace computes.
        match: node of the other trace -> the base's.
        joins: decision -> what only the base computes and others read, with what they read on the other way.
    """

    def __init__(self, base: Trace, other: Trace, flips: frozenset[int]) -> None:
        self.flips, self._base, self._traced = flips, base, other
        mark = base.marks[min(flips)]
        if other.count != base.count:
            raise refused(mark, "the ways that it takes make other decisions")
        if other.same != base.same:
            raise refused(mark, "the ways that it takes return values of other kinds")
        self.match = same_leaves(base, other, mark)
        self._rest: dict[int, tuple[list[fx.Node], list[fx.Node]]] = {}
        self.own: dict[int, list[fx.Node]] = {}
        self.other: dict[int, list[fx.Node]] = {}
        self.joins: dict[int, dict[fx.Node, fx.Node]] = {number: {} for number in flips}
        self._made: dict[fx.Node, int] = {}
        self._away: dict[fx.Node, int] = {}
        self._place = {node: i for i, node in enumerate(other.root.graph.nodes)}
        for number, (ours, theirs) in enumerate(zip(base.segments, other.segments, strict=True), -1):
            shared = _common_end(ours, theirs, self.match) if number in flips else len(ours)
            own, rest = ours[: len(ours) - shared], ours[len(ours) - shared :]
            away, more = theirs[: len(theirs) - shared], theirs[max(len(theirs) - shared, 0) :]
            if len(rest) != len(more) or (number not in flips and len(ours) != len(theirs)):
                raise refused(mark, "what follows depends on it")
            if number >= 0:
                self.own[number], self.other[number] = own, away
                self._made |= dict.fromkeys(own, number)
                self._away |= dict.fromkeys(away, number)
            self._rest[number] = rest, more

    @property
    def shorter(self) -> set[int]:
        """The decisions behind which only the other trace computes."""
        return {number for number in self.flips if not self.own[number] and self.other[number]}

    def join(self) -> None:
        """Finds where the ways meet."""
        mark = self._base.marks[min(self.flips)]
        for node, number in self._away.items():
            for read in operands(node):
                self._check_alone(read, number)
        for number, (rest, more) in self._rest.items():
            for a, b in zip(rest, more, strict=True):
                self._join(a, b, mark)
            if number + 1 < self._base.count:
                self.match[self._traced.marks[number + 1]] = self._base.marks[number + 1]

    def _join(self, a: fx.Node, b: fx.Node, mark: fx.Node) -> None:
        if not alike(a, b):
            raise refused(mark, "what follows depends on it")
        self.match[b] = a
        for x, there in zip(operands(a), operands(b), strict=True):
            y = self.match.get(there, there)
            if x is y:
                continue
            number = self._made.get(x)
            if number is not None:
                self._check_alone(there, number)
            if number is None or self.joins[number].setdefault(x, y) is not y:
                raise refused(mark, "what follows depends on it")
            if not _same_kind(x, y):
                raise refused(mark, "the two ways give values of other shapes or dtypes")

    def _check_alone(self, there: fx.Node, number: int) -> None:
        """Raises where what is read behind a decision may be read because of an earlier one, that is turned as well.

        What was there before that one, or was made on its other way, may be the value of a name that it decides.
        """
        before = max((k for k in self.flips if k < number), default=None)
        if before is None or there.op == "get_attr":
            return
        if self._away.get(there, number) != number or self._place[there] < self._place[self._traced.marks[before]]:
            raise refused(self._base.marks[number], "which way is taken decides what an earlier decision gives")


def refused(mark: fx.Node, why: str) -> CaptureError:
    """What to say of a decision that is not one between two ways."""
    return CaptureError(
        f"the forward decides by values inside a tensor, and {why}",
        module=module_of(mark),
        source=source_of(mark),
        fix="use torch.where or torch.cond, or pass the value as a number",
    )


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, each as often as it stands there."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def _constants(node: fx.Node) -> list[Any]:
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return [spec, *("" if isinstance(leaf, fx.Node) else leaf for leaf in leaves)]


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    return all(map(_equal_values, *(pytree.tree_leaves(n.meta.get("val")) for n in (a, b))))


def _equal_values(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return list(map(str, a.shape)) == list(map(str, b.shape)) and (a.dtype, a.device) == (b.dtype, b.device)
    return type(a) is type(b)


def alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes do the same with what they are given."""
    return a.op == b.op and (a.op == "output" or a.target == b.target) and _constants(a) == _constants(b)


def _common_end(ours: Sequence[fx.Node], theirs: Sequence[fx.Node], leaves: Mapping[fx.Node, fx.Node]) -> int:
    """How many of the last nodes are alike, and read the same weights and inputs."""
    count = 0
    for a, b in zip(reversed(ours), reversed(theirs), strict=False):
        pairs = zip(operands(a), operands(b), strict=False)
        others = any("call_function" not in (x.op, y.op) and leaves.get(y) is not x for x, y in pairs)
        if others or not alike(a, b) or not _same_kind(a, b):
            break
        count += 1
    return count


def _unify(trace: Trace) -> None:
    """Let a graph read each of several equal constants as the first of them: which is which depends on their number."""
    constants = [n for n in trace.root.graph.find_nodes(op="get_attr") if _is_made_up(n)]
    values = [find(trace.root, str(node.target)) for node in constants]
    for place, node in enumerate(constants):
        first = next(i for i, value in enumerate(values) if _is_equal(value, values[place]))
        if first < place:
            node.replace_all_uses_with(constants[first])


def _is_made_up(node: fx.Node) -> bool:
    return "lifted_tensor_" in str(node.target) or "_tensor_constant" in str(node.target)


def same_leaves(base: Trace, other: Trace, mark: fx.Node | None) -> dict[fx.Node, fx.Node]:
    """What two graphs read: by name, or where export made a constant, by value.

    Raises:
        CaptureError: they are given other inputs; without a ``mark`` such an input is left out.
    """
    _unify(base)
    _unify(other)
    ours: dict[Any, fx.Node] = {}
    for node in base.root.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            ours[node.op, node.target] = node
    out: dict[fx.Node, fx.Node] = {}
    for node in other.root.graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            continue
        found = ours.get((node.op, node.target))
        if node.op == "get_attr":
            value = find(other.root, str(node.target))
            if found is None or find(base.root, str(found.target)) is not value:
                constants = (n for n in ours.values() if n.op == "get_attr")
                found = next((n for n in constants if _is_equal(find(base.root, str(n.target)), value)), None)
        if found is None:
            if mark is None or (node.users and node.op == "get_attr"):
                continue  # read on the other way alone
            raise refused(mark, "what follows depends on it")
        out[node] = found
    return out


def _is_equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or isinstance(a, torch.nn.Parameter):
        return False
    return a.shape == b.shape and a.dtype == b.dtype and not a.is_meta and not b.is_meta and torch.equal(a, b)


def check_drawn(trace: Trace, other: Trace, drew: Sequence[str]) -> None:
    """Raises where a model computes something else once other numbers are drawn outside of torch.

    Args:
        trace: one trace.
        other: one with other numbers.
        drew: where they are drawn from.
    """
    first, second = ([n for segment in each.segments for n in segment] for each in (trace, other))
    leaves = same_leaves(trace, other, None) if trace.count == other.count else None
    for a, b in zip(first, second, strict=False):
        if leaves is None or not alike(a, b) or any(leaves.get(y) is not x for x, y in _operand_pairs(a, b)):
            break
        leaves[b] = a
    else:
        if len(first) == len(second) and trace.same == other.same:
            return
    here = next((n for n in first if leaves is None or n not in leaves.values()), first[-1])
    raise CaptureError(
        f"what the model computes depends on numbers drawn from {' and '.join(drew)}: those drawn at capture would be "
        "frozen into the graph",
        module=module_of(here),
        source=source_of(here),
        fix="draw with torch instead (torch.rand), pass in what depends on the draw (a mask, say), or use eval()",
    )


def _operand_pairs(a: fx.Node, b: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    ours, theirs = operands(a), operands(b)
    return list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else []

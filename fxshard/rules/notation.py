"""The notation of rules: one line an operator, in the manner of einsum.

    rule     =  tensors "->" tensors              operands in the order of the schema, results
    tensors  =  tensor { "," tensor }
    tensor   =  { dim }                           separated by spaces; nothing for a scalar
    dim      =  factor | "(" factor ... ")" | "..." | "1"
    factor   =  name [ "+" | "!" | "~" ]

``"... i+, o i+ -> ... o"`` is ``aten.linear``. The marks: ``+`` the factor sums (it is missing from the results,
which become ``Partial(sum)``); ``!`` it must stay whole; ``~`` it is split through a lowering. A factor without a mark
that is missing from a result must stay whole too: nothing says that its parts may be added.

``...`` stands for any number of dims, aligned from the right as broadcasting does. ``(h d)`` is one dim made of
two factors, ``h`` the major one; only the major one may be split. An operand dim of size 1 whose factor is larger
elsewhere is broadcast: it lacks the factor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from fxshard.errors import RuleError
from fxshard.rules.recipe import At, Call, Dim, Factor, Recipe, Shape

_TOKEN = re.compile(r"\(([^()]*)\)|(\.\.\.)|([A-Za-z_]\w*[+!~]?|1)")


@dataclass(frozen=True)
class Notation:
    """A parsed rule: for each tensor its dims, each a tuple of factor names."""

    text: str
    inputs: tuple[tuple[tuple[str, ...], ...], ...]
    outputs: tuple[tuple[tuple[str, ...], ...], ...]
    marks: tuple[tuple[str, str], ...]

    def mark(self, name: str) -> str:
        """The mark of a factor: ``+``, ``!``, ``~`` or nothing."""
        return dict(self.marks).get(name, "")


@cache
def parse(text: str) -> Notation:
    """Parses one rule.

    >>> parse("... i+, o i+ -> ... o").inputs
    ((('...',), ('i',)), (('o',), ('i',)))

    Raises:
        RuleError: with the place where the text is malformed.
    """
    if text.count("->") != 1:
        raise RuleError(f"rule {text!r} needs exactly one '->'", fix="write it as 'operands -> results'")
    marks: dict[str, str] = {}
    left, right = (tuple(_tensor(part, text, marks) for part in side.split(",")) for side in text.split("->"))
    known = {name for tensor in left for dim in tensor for name in dim}
    for tensor in right:
        for dim in tensor:
            for name in dim:
                if name not in known and name != "1":
                    marks[name] = "!"
                if marks.get(name) == "+":
                    raise RuleError(f"rule {text!r}: factor {name!r} sums, yet it is in a result")
    return Notation(text, left, right, tuple(marks.items()))


def _tensor(part: str, text: str, marks: dict[str, str]) -> tuple[tuple[str, ...], ...]:
    rest = _TOKEN.sub("", part).strip()
    if rest:
        raise RuleError(f"rule {text!r}: cannot read {rest!r}", fix="see the grammar in fxshard.rules.notation")
    dims = []
    for group, dots, single in _TOKEN.findall(part):
        if dots:
            dims.append(("...",))
            continue
        names = []
        for token in group.split() if group else [single]:
            name = token.rstrip("+!~")
            if token != name and marks.setdefault(name, token[-1]) != token[-1]:
                raise RuleError(f"rule {text!r}: factor {name!r} has two marks")
            names.append(name)
        dims.append(tuple(names))
    if dims.count(("...",)) > 1:
        raise RuleError(f"rule {text!r}: a tensor may have one '...'")
    return tuple(dims)


def apply(notation: Notation, call: Call) -> Recipe:
    """The recipe of one call under a parsed rule.

    Raises:
        RuleError: when the shapes do not fit the rule.
    """
    if len(notation.inputs) != len(call.inputs) or len(notation.outputs) != len(call.outputs):
        raise RuleError(
            f"rule {notation.text!r} has {len(notation.inputs)} operands and {len(notation.outputs)} results, "
            f"the call of {call.name} has {len(call.inputs)} and {len(call.outputs)}"
        )
    inputs = [_expand(p, s, notation, call) for p, s in zip(notation.inputs, call.inputs, strict=True)]
    outputs = [_expand(p, s, notation, call) for p, s in zip(notation.outputs, call.outputs, strict=True)]
    return Recipe(make_factors(inputs, outputs, call, dict(notation.marks)))


def fits(notation: Notation, call: Call) -> bool:
    """Whether a call has as many operands, results and dims as the rule."""

    def fit(patterns: Sequence[tuple[tuple[str, ...], ...]], shapes: Sequence[Shape]) -> bool:
        return len(patterns) == len(shapes) and all(
            len(shape) >= len(p) - 1 if ("...",) in p else len(shape) == len(p)
            for p, shape in zip(patterns, shapes, strict=True)
        )

    return fit(notation.inputs, call.inputs) and fit(notation.outputs, call.outputs)


def _expand(
    pattern: tuple[tuple[str, ...], ...], shape: Shape, notation: Notation, call: Call
) -> list[tuple[str, ...]]:
    """Names every dim of a shape; the dims of ``...`` are named by their distance from its right end."""
    extra = len(shape) - (len(pattern) - (("...",) in pattern))
    if extra < 0 or (extra and ("...",) not in pattern):
        raise RuleError(f"rule {notation.text!r}: {call.name} got a tensor of {len(shape)} dims for {pattern}")
    out: list[tuple[str, ...]] = []
    for dim in pattern:
        out += [(f".{extra - 1 - i}",) for i in range(extra)] if dim == ("...",) else [dim]
    return out


def make_factors(
    inputs: Sequence[Sequence[tuple[str, ...]]],
    outputs: Sequence[Sequence[tuple[str, ...]]],
    call: Call,
    marks: dict[str, str],
) -> tuple[Factor, ...]:
    """The factors of a call whose dims are named: those that may be split.

    A compound dim takes part by its first factor only, whose size is not needed: the dim is cut as a whole.
    A factor that has different sizes in different tensors is left whole.
    """
    sizes: dict[str, Dim] = {}
    unequal: set[str] = set()
    for compound in (False, True):
        for names, shape in zip((*inputs, *outputs), (*call.inputs, *call.outputs), strict=True):
            for dim, size in zip(names, shape, strict=True):
                known = sizes.get(dim[0], 1)
                if (len(dim) > 1) == compound and known == 1:
                    sizes[dim[0]] = size
                elif len(dim) == 1 and size not in (1, known):
                    unequal.add(dim[0])
    where: dict[str, tuple[list[At | None], list[At | None]]] = {}
    for side, tensors, shapes in ((0, inputs, call.inputs), (1, outputs, call.outputs)):
        for index, (names, shape) in enumerate(zip(tensors, shapes, strict=True)):
            for position, dim in enumerate(names):
                name = dim[0]
                if marks.get(name) == "!" or name == "1" or shape[position] == 1:
                    continue
                entry = where.setdefault(name, ([None] * len(inputs), [None] * len(outputs)))
                entry[side][index] = At(position)
    factors = []
    for name, (ins, outs) in where.items():
        mark = marks.get(name, "")
        if (
            sizes[name] == 1
            or name in unequal
            or ins.count(None) == len(ins)
            or (None in outs and mark not in ("+", "~"))
        ):
            continue
        factors.append(Factor(name, sizes[name], tuple(ins), tuple(outs), name if mark == "~" else None))
    return tuple(factors)

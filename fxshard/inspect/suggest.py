"""Suggests a rule for an operator that has none, by trying how a call of it may be split.

The call is made anew on random values, in small sizes if it allows that. A factor is guessed: a dim of the result, and
dims of equal size of the operands. ``check_rule`` then runs the parts and compares; what holds, forward and backward,
is kept, and every other dim is marked whole. So a suggestion is a rule that was seen to hold for one call:

    mylib::scale(f32[4, 16, 64], f32[64])      "... d, d -> ... d", linear="0;1"

Whether it holds for all calls of the operator, only its author knows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxshard.inspect.prove import Sample, check_rule
from fxshard.ir.info import values_of
from fxshard.rules.recipe import Shape, shape_of
from fxshard.torch_internals import OpOverload

MOST_ELEMENTS = 2**16
MOST_GUESSES = 48
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SMALL = (4, 6, 8, 10, 12, 14, 16, 18)
_DRAWS = torch.Tag.nondeterministic_seeded
_known: dict[Any, tuple[str, str] | None] = {}


@dataclass(frozen=True)
class _Guess:
    """One factor: its dim in every operand and result, None where it is missing."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]

    @property
    def mark(self) -> str:
        return "+" if None in self.outputs else ""


def suggest(node: fx.Node) -> tuple[str, str] | None:
    """A rule for the call of ``node``: its notation, and through which operands it is linear.

    None where no way to split the call was found, or where it cannot be tried.
    """
    operator = node.target
    if not isinstance(operator, OpOverload) or operator._schema.is_mutable or _DRAWS in operator.tags:
        return None
    key = operator, _text(node)
    if key not in _known:
        with torch.random.fork_rng([]), torch.device("cpu"):
            torch.default_generator.manual_seed(0)
            _known[key] = next((found for sample in _samples(node) if (found := _search(operator, sample))), None)
    return _known[key]


def _text(node: fx.Node) -> str:
    """A call's arguments, tensors by type and shape."""
    return repr(fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"]))


def _samples(node: fx.Node) -> Iterator[Sample]:
    """The call on random values: in small sizes, and in its own; in double precision, and in its own."""
    values = [value for n in node.all_input_nodes for value in values_of(n)]
    if any(not isinstance(value, torch.Tensor) for value in values):
        return  # a dynamic number, or a list of tensors
    sizes = sorted({size for value in values for size in shape_of(value) if size != 1}, key=str)
    small = dict(zip(sizes, _SMALL, strict=False)) if len(sizes) <= len(_SMALL) else {}
    own = {size: size for size in sizes if isinstance(size, int)}
    for named in (small, own):
        if any(size not in named for size in sizes):
            continue
        if sum(math.prod(named.get(s, 1) for s in shape_of(value)) for value in values) > MOST_ELEMENTS:
            continue
        for double in (True, False):
            yield _sample(node, named, double)


def _sample(node: fx.Node, sizes: dict[Any, int], double: bool) -> Sample:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _random(n.meta["val"], sizes, double))
    return Sample(tuple(args), kwargs)


def _random(value: torch.Tensor, sizes: dict[Any, int], double: bool) -> torch.Tensor:
    shape = [sizes.get(size, 1) for size in shape_of(value)]
    if value.is_floating_point():
        return torch.randn(shape, dtype=torch.float64 if double else value.dtype)
    if value.is_complex():
        return torch.randn(shape, dtype=torch.complex128 if double else value.dtype)
    return torch.randint(0, 2, shape).to(value.dtype)


def _search(operator: OpOverload, sample: Sample) -> tuple[str, str] | None:
    """The rule that holds for a sample call; None where none does, or the call fails."""
    try:
        made = operator(*sample.args, **sample.kwargs)
    except Exception:  # of a user's operator: whatever it says, it cannot be tried so
        return None
    sample = replace(sample, gradients=_differentiates(operator, sample))
    operands = [x for x in _flat((sample.args, sample.kwargs)) if isinstance(x, torch.Tensor)]
    inputs = [shape_of(x) for x in operands]
    outputs = [shape_of(x) for x in _flat(made)]

    def holds(factors: Sequence[_Guess], linear: str = "") -> bool:
        try:
            proof = check_rule(
                operator, [sample], _notation(factors, inputs, outputs), linear=linear, meshes=((2,), (3,))
            )
        except Exception:  # a wrong guess fails in any way
            return False
        return len(proof.factors) >= len(factors)

    factors: list[_Guess] = []
    for guesses in _guesses(inputs, outputs):
        fresh = [g for g in guesses if not any(_overlap(g, have) for have in factors)]
        factors += next(([g] for g in fresh if holds([g])), [])
    if not factors or not holds(factors):
        return None
    floats = [i for i, x in enumerate(operands) if x.is_floating_point() or x.is_complex()]
    sets = [",".join(map(str, floats)), *map(str, floats)] if len(floats) > 1 else list(map(str, floats))
    linear = ";".join(sorted(s for s in sets if holds(factors, s)))
    return _notation(factors, inputs, outputs), linear


def _differentiates(operator: OpOverload, sample: Sample) -> bool:
    """Whether the operator has a backward pass."""
    ready = [x for x in _flat((sample.args, sample.kwargs)) if isinstance(x, torch.Tensor)]
    ready = [x.requires_grad_() for x in ready if x.is_floating_point() or x.is_complex()]
    try:
        made = [x for x in _flat(operator(*sample.args, **sample.kwargs)) if x.requires_grad]
        torch.autograd.grad(made, ready, [torch.ones_like(x) for x in made], allow_unused=True)
    except Exception:  # whatever a user's operator raises
        return False
    finally:
        for x in ready:
            x.requires_grad_(False)
    return bool(made)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return _flat(list(value.values()))
    return [x for item in value for x in _flat(item)] if isinstance(value, (list, tuple)) else [value]


def _overlap(one: _Guess, other: _Guess) -> bool:
    pairs = zip((*one.inputs, *one.outputs), (*other.inputs, *other.outputs), strict=True)
    return any(a is not None and a == b for a, b in pairs)


def _guesses(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> Iterator[list[_Guess]]:
    """For every dim of the first result what it may be, the likeliest first; then the sums, by each operand's dims."""
    first = outputs[0]
    for dim, size in enumerate(first):
        found = [
            _Guess(p[: len(inputs)], (dim, *p[len(inputs) :])) for p in _places(size, dim, first, inputs, outputs[1:])
        ]
        yield [g for g in found if g.inputs.count(None) < len(inputs)][:MOST_GUESSES]
    whole = (None,) * len(outputs)
    for operand, shape in enumerate(inputs):
        for dim, size in enumerate(shape):
            found = [_Guess(p, whole) for p in _places(size, dim, shape, inputs, ())]
            yield [g for g in found if g.inputs[operand] == dim][:MOST_GUESSES]


def _places(
    size: Any, dim: int, shape: Shape, inputs: Sequence[Shape], others: Sequence[Shape]
) -> list[tuple[int | None, ...]]:
    """Where a factor may sit in each tensor: at dims of its size, those first that stand where it stands."""
    if size == 1:
        return []
    choices = []
    for each in (*inputs, *others):
        equal = [d for d, s in enumerate(each) if s == size]
        right = len(each) - (len(shape) - dim)  # where it stands if dims are aligned from the right
        likely = [d for d in dict.fromkeys((right, dim)) if d in equal]
        choices.append([*dict.fromkeys([*likely, *equal]), None])
    return list(itertools.product(*choices))


def _notation(factors: Sequence[_Guess], inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """The rule with these factors; every other dim is whole."""
    letters = iter(LETTERS)
    tensors: list[list[str]] = [[""] * len(shape) for shape in (*inputs, *outputs)]
    lead = _leading(factors)
    for k, factor in enumerate(factors):
        letter = "..." if k < lead else next(letters) + factor.mark
        for names, dim in zip(tensors, (*factor.inputs, *factor.outputs), strict=True):
            if dim is not None:
                names[dim] = letter
    rest = iter(f"{a}{b}" for a in LETTERS[::-1] for b in ("", *LETTERS))
    texts = []
    for names in tensors:
        named = [name or next(rest) + "!" for name in names]
        texts.append(" ".join(n for i, n in enumerate(named) if n != "..." or i == 0))
    return f"{', '.join(texts[: len(inputs)])} -> {', '.join(texts[len(inputs) :])}"


def _leading(factors: Sequence[_Guess]) -> int:
    """How many of the first factors are the first dims of all tensors that have any of them: there may be others."""
    for count, factor in enumerate(factors):
        places, first = (*factor.inputs, *factor.outputs), (*factors[0].inputs, *factors[0].outputs)
        alike = all((place is None) == (other is None) for place, other in zip(places, first, strict=True))
        if factor.mark or not alike or any(place not in (None, count) for place in places):
            return count
    return len(factors)

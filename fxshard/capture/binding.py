"""A call of a captured model, held against the capture in plain numbers: what ``calls`` does, for a tracer to follow.

``torch.compile`` traces through this. So no signature binds here, and there is no algebra: sizes are compared with
numbers or with each other, and what else must hold of dynamic sizes is one Python expression. Where sizes are dynamic
for the tracer too, each comparison becomes a guard of what it compiles.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from fxshard.capture.calls import is_default
from fxshard.capture.captured import Captured
from fxshard.torch_internals import print_python, pytree


class Binding:
    """What a capture expects of a call.

    Attributes:
        parameters: of the model's ``forward``: its name, whether it is given by position only, its default.
        names: those that may be given by position.
        starred: whether it takes any number by position, which is not bound here.
        in_spec: the tree of a call.
        expected: of each input leaf the dtype and the sizes, a dynamic one by its name, else the value.
        holds: whether the capture serves these dynamic sizes.
    """

    def __init__(self, captured: Captured, multiples: Mapping[Any, int]) -> None:
        parameters = captured.signature.parameters
        kinds = inspect.Parameter
        self.parameters = tuple(
            (name, p.kind is kinds.POSITIONAL_ONLY, p.default)
            for name, p in parameters.items()
            if p.kind is not kinds.VAR_KEYWORD
        )
        by_position = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        self.names = tuple(name for name, p in parameters.items() if p.kind in by_position)
        self.starred = any(p.kind is kinds.VAR_POSITIONAL for p in parameters.values())
        self.in_spec = captured.in_spec
        self.expected, self.holds = _expectations(captured, multiples)

    def leaves_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The leaves of a call that the capture serves; None of any other.

        >>> from fxshard.capture.capture import capture
        >>> x = torch.ones(4, 3)
        >>> bound = Binding(capture(torch.nn.Linear(3, 2), (x,)), {})
        >>> bound.leaves_of((), {"input": x})[0] is x, bound.leaves_of((torch.ones(5, 3),), {})
        (True, None)
        """
        named = dict(zip(self.names, args, strict=False))
        named.update(kwargs)
        if len(args) > len(self.names) or len(named) != len(args) + len(kwargs):
            return None
        positional, rest = [], {}
        for name, only, default in self.parameters:
            if name in named:
                value = named.pop(name)
                if only:
                    positional.append(value)
                elif not is_default(value, default):
                    rest[name] = value
        for name in sorted(named):
            rest[name] = named[name]
        leaves, spec = pytree.tree_flatten((tuple(positional), rest))
        return leaves if spec == self.in_spec and self._fits(leaves) else None

    def _fits(self, leaves: list[Any]) -> bool:
        pairs: list[tuple[Any, int | str]] = []
        for leaf, (dtype, want) in zip(leaves, self.expected, strict=True):
            if dtype is not None:
                if not isinstance(leaf, torch.Tensor) or leaf.dtype != dtype or leaf.dim() != len(want):
                    return False
                pairs += list(zip(leaf.shape, want, strict=True))
            elif isinstance(want, str):
                pairs.append((leaf, want))
            elif type(leaf) is not type(want[0]) or leaf != want[0]:
                return False
        sizes: dict[str, Any] = {}
        for size, known in pairs:
            if isinstance(known, int):
                if size != known:
                    return False
            elif known not in sizes:
                sizes[known] = size
            elif size != sizes[known]:
                return False
        return self.holds(**sizes)


def _expectations(
    captured: Captured, multiples: Mapping[Any, int]
) -> tuple[tuple[tuple[torch.dtype | None, Any], ...], Callable[..., bool]]:
    """What is expected of each leaf, and of the dynamic sizes together: see ``Binding``."""
    expected: list[tuple[torch.dtype | None, Any]] = []
    conditions: list[Any] = list(captured.guards)
    names: dict[str, None] = {}

    def name_of(size: Any) -> Any:
        if isinstance(size, int):
            return size
        if not size.is_Symbol:  # a size that follows from others
            made = sympy.Symbol(f"derived_{len(names)}", integer=True)
            conditions.append(sympy.Eq(made, size, evaluate=False))
            size = made
        names[str(size)] = None
        return str(size)

    for index, info in enumerate(captured.example_inputs):
        if info.shape is not None:
            expected.append((info.dtype, tuple(map(name_of, info.shape))))
        else:
            expected.append((None, (captured.constants[index],) if info.symbol is None else name_of(info.symbol)))
    texts = [f"{low} <= {s} <= {high}" for s, (low, high) in captured.ranges.items() if str(s) in names]
    texts += [f"({print_python(c)})" for c in conditions if _symbols(c) <= names.keys()]  # others cannot be decided
    cut = [(size, parts) for size, parts in multiples.items() if _symbols(size) <= names.keys()]
    texts += [f"({print_python(size)}) % {parts} == 0" for size, parts in cut]
    source = f"lambda {', '.join(names)}: {' and '.join(texts) or True}"
    holds: Callable[..., bool] = eval(source, {"inf": math.inf, "math": math, "torch": torch})
    return tuple(expected), holds


def _symbols(expression: Any) -> set[str]:
    return {str(symbol) for symbol in expression.free_symbols}

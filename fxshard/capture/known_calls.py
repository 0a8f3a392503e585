"""Calls like one that was seen before: found again in one lookup, with no tree to flatten and nothing to check.

Which program serves a call, and whether its inputs fit, depends on the names of its arguments, the shapes and dtypes
of its tensors, its other values, and the mode of the model. Where all of that is as it was in an earlier call, the
answer is, too. Only calls whose arguments are tensors and plain values are remembered; what is nested goes the long
way.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from fxshard.capture.calls import canonical_call
from fxshard.capture.captured import Captured
from fxshard.capture.trees import flatten, reorder

__all__ = ["KnownCalls", "describe"]

T = TypeVar("T")
LIMIT = 1000
"""How many calls are remembered; of sizes that never come twice there may be any number."""

_TENSORS = (torch.Tensor, nn.Parameter)
_PLAIN = (type(None), bool, int, float, str)


class _Place:
    """Stands for the argument at a position."""

    def __init__(self, position: int) -> None:
        self.position = position


class KnownCalls(Generic[T]):
    """What served each call, and which argument is which leaf."""

    def __init__(self) -> None:
        self._served: dict[Hashable, tuple[T, list[Any]]] = {}

    def clear(self) -> None:
        """Forgets all: other programs may serve these calls now."""
        self._served.clear()

    def find(self, key: Hashable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[T, list[Any]] | None:
        """What served the call that ``describe`` gave this key, and this call's leaves; None where none did."""
        found = self._served.get(key)
        if found is None:
            return None
        values = (*args, *kwargs.values()) if kwargs else args
        return found[0], [values[x.position] if type(x) is _Place else x for x in found[1]]

    def add(
        self, key: Hashable, args: tuple[Any, ...], kwargs: Mapping[str, Any], served: T, captured: Captured
    ) -> None:
        """Remembers a call that fitted: ``served`` serves all that have this key."""
        places = [_Place(i) if isinstance(x, torch.Tensor) else x for i, x in enumerate((*args, *kwargs.values()))]
        named = dict(zip(kwargs, places[len(args) :], strict=True))
        tree = canonical_call(captured.signature, tuple(places[: len(args)]), named)
        leaves, spec = flatten(tree)
        if spec != captured.in_spec:
            leaves, spec = flatten(reorder(tree, captured.in_spec))
        if spec == captured.in_spec:
            if len(self._served) >= LIMIT:
                self.clear()
            self._served[key] = served, leaves


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any], mode: Hashable) -> Hashable | None:
    """All of a call that says what serves it; None where it is not told so simply.

    >>> describe((torch.ones(2),), {"causal": True}, "training")
    ('training', 1, ('causal',), ((torch.Size([2]), torch.float32), (<class 'bool'>, True)))
    >>> describe(([torch.ones(2)],), {}, "training")
    """
    described: list[Hashable] = []
    tensors: list[int] = []
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind in _TENSORS:
            described.append((value.shape, value.dtype))
            tensors.append(id(value))
        elif kind is float:
            described.append((kind, value.hex()))  # 0.0 == -0.0
        elif kind in _PLAIN:
            described.append((kind, value))
        else:
            return None
    pattern = () if len(set(tensors)) == len(tensors) else tuple(map(tensors.index, tensors))
    return mode, len(args), tuple(kwargs), (*described, *pattern)

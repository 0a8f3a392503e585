"""Calls of single operators, in text: from the samples that rules are proven on, and from PyTorch's own (OpInfo).

Only what a sample says of an operand is taken: shape, dtype and range. Its values are those of the program.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.rules.samples import all_samples

EACH = 6
"""Samples of one operator that are drawn from."""
NOT_DEFINED = ("empty", "resize", "sparse", "jiterator", "to_dlpack", "_refs", "_assert", "cauchy", "geometric_")
"""Parts of names of operators whose results no two runs share, or that are no business of programs."""


class UnfitError(Exception):
    """A sample cannot be written down."""


@dataclass(frozen=True)
class Call:
    """A function by name, its arguments, and whether the name is a method's."""

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def names() -> tuple[list[str], list[str]]:
    """Operators of the table of rules that have samples, and functions of PyTorch that OpInfo knows."""
    return list(_ruled()), list(_known())


@functools.cache
def _ruled() -> dict[str, Any]:
    return {n: m for n, m in all_samples().items() if "::" not in n and not any(bad in n for bad in NOT_DEFINED)}


@functools.cache
def _known() -> dict[str, Any]:
    if "expecttest" not in sys.modules:  # torch's own tests import it, and nothing here needs it
        stub: Any = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    from torch.testing._internal.common_methods_invocations import op_db

    found: dict[str, Any] = {}
    for op in op_db:
        fits = torch.float64 in op.dtypes and _resolves(op.name) and not any(bad in op.name for bad in NOT_DEFINED)
        if fits:
            found.setdefault(op.name, op)
    return found


def _resolves(name: str) -> bool:
    value: Any = torch
    for part in name.split("."):
        value = getattr(value, part, None)
    return callable(value)


@functools.cache
def calls(kind: str, name: str) -> tuple[Call, ...]:
    """Sample calls of an operator: the same in every process."""
    torch.manual_seed(0)
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(itertools.islice(_made(kind, name), EACH))


def _made(kind: str, name: str) -> Iterator[Call]:
    if kind == "rules":
        packet, _, overload = name.partition(".")
        for sample in _ruled()[name]():
            args, kwargs = (sample, {}) if isinstance(sample, tuple) else (sample.args, dict(sample.kwargs))
            if isinstance(sample, tuple) or sample.values:
                yield Call(f"torch.ops.aten.{packet}.{overload or 'default'}", args, kwargs)
    else:
        for given in _known()[name].sample_inputs("cpu", torch.float64, requires_grad=False):
            yield Call(f"torch.{name}", (given.input, *given.args), dict(given.kwargs))


def literal(value: Any) -> str:
    """Anything but a floating-point tensor, as Python text."""
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else f"float('{value}')"
    if isinstance(value, complex):
        return repr(value)
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value)
    if isinstance(value, slice):
        return f"slice({value.start}, {value.stop}, {value.step})"
    if value is Ellipsis:
        return "..."
    raise UnfitError(type(value).__name__)


def integers(value: torch.Tensor) -> str:
    """A tensor of integers or booleans: as it is where it is small, otherwise drawn from the same range."""
    if value.numel() <= 24:
        return f"torch.tensor({value.tolist()}, dtype={value.dtype})"
    if value.dtype == torch.bool:
        return f"(torch.rand({list(value.shape)}) < 0.5)"
    low, high = int(value.min()), int(value.max())
    return f"torch.randint({low}, {high + 1}, {list(value.shape)}, dtype={value.dtype})"


def in_range(text: str, value: torch.Tensor) -> str:
    """An expression of what the sample's values are like: positive ones, those above one, a symmetric matrix."""
    if value.dim() >= 2 and value.shape[-1] == value.shape[-2] > 1 and torch.equal(value, value.mT):
        return f"({text} @ {text}.mT + {value.shape[-1]} * torch.eye({value.shape[-1]}))"
    if not value.numel() or value.is_complex() or not value.isfinite().all():
        return text
    low, high = value.min().item(), value.max().item()
    if low > 1:
        return f"({text}.sigmoid() + {low + 0.1:.1f})"
    if low >= 0:
        return f"({text}.sigmoid() * 0.8 + 0.1)" if high <= 1 else f"({text}.abs() + 0.1)"
    return f"{text}.tanh()" if low >= -1 and high <= 1 else text

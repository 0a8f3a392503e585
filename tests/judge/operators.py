"""What the type checker is told of operators: its table has functions of torch, and programs call their entries, too.

An entry is taken to be as linear as the function of its name; and what is made of nothing is alike on all ranks. What
stands in no table is nonlinear to the checker: of parts it makes parts, and pending sums it refuses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("spmd_types")
table = pytest.importorskip("spmd_types._checker")
aten = torch.ops.aten

FACTORIES = ("zeros", "ones", "full", "arange", "scalar_tensor")
"""Operators that make the same on all ranks, of nothing."""

NEW = ("new_zeros", "new_ones", "new_full", "new_empty")
"""The same, of a tensor that says no more than dtype and device."""

SUMS = {
    aten.linear.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.matmul.default, aten.mean.dim,
    aten.sum.dim_IntList, aten.conv1d.default, aten.conv2d.default,
}  # fmt: skip
"""What makes a sum that is pending, of parts: products over the dim that is cut, and sums."""


def tell() -> None:
    """Adds to the checker's tables; what stands there already stays."""
    for known in (table._OP_REGISTRY, table._DECOMP_TYPE_RULES):
        for function, rule in [*known.items()]:
            for entry in entries(getattr(function, "__name__", "")):
                known.setdefault(entry, rule)
    table._DETERMINISTIC_FACTORIES.update(entry for name in FACTORIES for entry in entries(name))
    table._DETERMINISTIC_NEW_FACTORIES.update(entry for name in NEW for entry in entries(name))


def entries(name: str) -> list[Any]:
    """The entries of ``torch.ops.aten`` with a name."""
    if not name or name.startswith("_") or name.endswith("_") or not hasattr(aten, name):
        return []
    packet = getattr(aten, name)
    return [getattr(packet, overload) for overload in packet.overloads()]

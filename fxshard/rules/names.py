"""Names for the dims of a call: what rule functions are written with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeAlias

from fxshard.rules.recipe import Dim, Factor

Names: TypeAlias = list[tuple[str, ...]]
ONE: tuple[str, ...] = ("1",)
"""The name of a dim that takes no part."""


def right(count: int) -> Names:
    """Names of dims counted from the right, so that broadcasting aligns them.

    >>> right(2)
    [('d1',), ('d0',)]
    """
    return [(f"d{i}",) for i in reversed(range(count))]


def left(count: int) -> Names:
    """Names of dims counted from the left."""
    return [(f"d{i}",) for i in range(count)]


def whole(names: Sequence[tuple[str, ...]], dims: Collection[int]) -> dict[str, str]:
    """The marks that keep ``dims`` whole; a scalar, which has no dims, has a dim 0 for operators all the same."""
    return {names[d][0]: "!" for d in dims if names}


def lowered(
    factors: Sequence[Factor],
    lowering: str | None,
    names: Collection[str] | None = None,
    *,
    reduced: bool = False,
    plain: Collection[str] = (),
) -> tuple[Factor, ...]:
    """The factors, those of ``names`` (by default all) with a lowering; see ``Factor`` for the other two."""
    return tuple(
        replace(f, lowering=lowering, reduced=reduced, plain=f.name in plain) if names is None or f.name in names else f
        for f in factors
    )


def resized(factors: Sequence[Factor], name: str, size: Dim, lowering: str | None) -> tuple[Factor, ...]:
    """The factors, ``name`` with another size: the major factor of a compound dim has fewer units than the dim."""
    return tuple(replace(f, size=size, lowering=lowering) if f.name == name else f for f in factors)

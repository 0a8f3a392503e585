"""paths: the conversions that lead from the placements of a value to those that its reader needs, in order.

A conversion changes one axis at a time. Where several axes cut one dim, the outer one cut first: to change it, the
inner ones are undone first and done again afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxshard.ir.conversions import BETWEEN, FORWARD, kind_of
from fxshard.placement import REPLICATE, Placement, Placements, Shard, cut_within, is_partial, is_shard, same


@dataclass(frozen=True)
class Step:
    """One conversion on one axis: a function of ``runtime.collectives`` and the placements after it."""

    function: Any
    axis: int
    source: Placement
    after: Placements


def steps(source: Placements, target: Placements, sizes: Sequence[int]) -> list[Step]:
    """The conversions that lead from ``source`` to ``target``, in order; ``sizes`` are those of the axes.

    >>> from fxshard.placement import PARTIAL, Shard
    >>> [s.function.__name__ for s in steps((Shard(0), PARTIAL), (REPLICATE, Shard(0)), (2, 2))]
    ['all_reduce', 'all_gather', 'chunk']
    """
    now = list(source)
    redo = _to_redo(source, target, sizes)
    out: list[Step] = []

    def step(axis: int, after: Placement) -> None:
        before, now[axis] = now[axis], after
        out.append(Step(BETWEEN[kind_of(before), kind_of(after)], axis, before, tuple(now)))

    for axis in reversed(range(len(now))):
        have, want = now[axis], target[axis]
        if same(have, want) and axis not in redo:
            continue
        free = axis not in redo
        if is_shard(have):
            free = free and (not is_shard(want) or _exchanges(have, want, now, axis, sizes))
        elif not is_partial(have):
            continue
        after = want if (kind_of(have), kind_of(want)) in BETWEEN and (free or not is_shard(want)) else REPLICATE
        step(axis, after)
    for axis, want in enumerate(target):
        if not same(now[axis], want):
            assert same(now[axis], REPLICATE), (source, target)
            step(axis, want)
    return out


def _to_redo(source: Placements, target: Placements, sizes: Sequence[int]) -> set[int]:
    """The axes that cannot be changed directly, since another axis that changes cuts the same dim."""
    redo: set[int] = set()
    changing = [a for a in range(len(source)) if not same(source[a], target[a])]
    for a in changing:
        cuts = [p for p in (source[a], target[a]) if is_shard(p)]
        for b in changing:
            if b != a and {p.dim for p in cuts} & {p.dim for p in (source[b], target[b]) if is_shard(p)}:
                redo |= {a, b}
        inner = [b for b in range(a + 1, len(source)) if b not in changing]
        for p in cuts:
            if cut_within(p, [(source[b], sizes[b]) for b in inner]) is None:
                redo |= {a, *(b for b in inner if source[b].is_shard(p.dim))}
    return redo


def _exchanges(have: Shard, want: Shard, now: Sequence[Placement], axis: int, sizes: Sequence[int]) -> bool:
    """Whether one exchange leads from the one cut to the other: of two dims, neither with blocks, as the inner axes
    leave them.
    """
    if have.dim == want.dim:
        return False
    cuts = [cut_within(p, inside(now, axis, sizes)) for p in (have, want)]
    return all(cut is not None and cut.blocks == (1,) and cut.groups is None for cut in cuts)


def inside(placements: Sequence[Placement], axis: int, sizes: Sequence[int]) -> list[tuple[Placement, int]]:
    """The placements on the axes inside of ``axis``, with these axes' sizes."""
    return list(zip(placements, sizes, strict=True))[axis + 1 :]


def weigh(path: list[Step]) -> int:
    """How dear a path is: communicating steps first, then their number."""
    return sum(100 if s.function in FORWARD else 1 for s in path)


def how(placement: Shard, within: Sequence[tuple[Placement, int]] = ()) -> dict[str, Any]:
    """What a conversion is told of a shard beside its dim; ``localize`` makes lengths of the shares.

    Args:
        placement: the shard.
        within: the placements on the axes inside, with these axes' sizes.
    """
    cut = cut_within(placement, within)
    assert cut is not None, (placement, within)
    return ({"blocks": cut.blocks} if cut.blocks != (1,) else {}) | ({"lengths": cut.shares} if cut.shares else {})

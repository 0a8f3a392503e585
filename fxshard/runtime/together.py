"""What all ranks decide together: an error of one is an error of all, so that none waits for another for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fxshard.errors import CheckpointError
from fxshard.runtime.faults import guarded

T = TypeVar("T")


def is_spread() -> bool:
    """Whether several processes run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(value: Any) -> list[Any]:
    """What every rank brings, in rank order; collective."""
    if not is_spread():
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    with guarded(None, "all_gather_object", torch.empty(0)):
        dist.all_gather_object(out, value)
    return out


def refuse(problems: Iterable[str], what: str, fix: str) -> None:
    """Raises ``CheckpointError`` on all ranks where any of them has a problem; collective.

    Args:
        problems: this rank's, a line each.
        what: what cannot be done.
        fix: how to mend it.
    """
    every = list(dict.fromkeys(line for lines in gathered(list(problems)) for line in lines))
    if every:
        more = [f"... and {len(every) - 20} more"] if len(every) > 20 else []
        raise CheckpointError("\n".join([what, *(f"  - {line}" for line in [*every[:20], *more])]), fix=fix)


def on_first_rank(work: Callable[[], T]) -> T:
    """Runs ``work`` on rank 0; its result, or its error, is that of all ranks; collective."""
    if not is_spread():
        return work()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except Exception as error:
            told[1] = f"{type(error).__name__}: {error}"
            dist.broadcast_object_list(told, 0)
            raise
    dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise CheckpointError(f"rank 0 failed: {told[1]}")
    return told[0]  # type: ignore[no-any-return]

"""What all ranks decide together: an error of one is an error of all, so that none waits for another for ever."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fxshard.errors import CheckpointError
from fxshard.ranks.faults import guarded
from fxshard.ranks.session import said

T = TypeVar("T")


def is_spread() -> bool:
    """Whether several processes run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_rank(world_size: int) -> int:
    """This process's rank: torch.distributed's, or torchrun's where it has one of so many ranks, or 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    rank = int(os.environ.get("RANK", "0"))
    return rank if rank < world_size else 0


def is_one_of_several() -> bool:
    """Whether this process is one rank's: several run, or a launcher started it as one of them."""
    return is_spread() or "RANK" in os.environ


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


def on_every_rank(work: Callable[[], T], what: str, fix: str) -> T:
    """Runs ``work``, in which nothing is communicated, on all ranks; an error of one is an error of all; collective.

    Args:
        work: what to do.
        what: what cannot be done, where it fails.
        fix: how to mend it, where the error does not say.
    """
    problems: list[str] = []
    done: list[T] = []
    cause: Exception | None = None
    try:
        done.append(work())
    except CheckpointError as error:
        problems, fix, cause = [error.what], error.fix or fix, error
    except Exception as error:
        problems, cause = [said(error)], error
    if problems and is_spread():
        problems = [f"rank {dist.get_rank()}: {problem}" for problem in problems]
    try:
        refuse(problems, what, fix)
    except CheckpointError as error:
        raise error from cause
    return done[0]


def on_first_rank(work: Callable[[], T], what: str, fix: str) -> T:
    """Runs ``work`` on rank 0; its result, or its error, is that of all ranks; collective.

    Args:
        work: what to do.
        what: what cannot be done, where it fails.
        fix: how to mend it, where the error does not say.
    """
    told: list[Any] = [None, None, None]
    cause: Exception | None = None
    if not is_spread() or dist.get_rank() == 0:
        try:
            told[0] = work()
        except CheckpointError as error:
            told[1:], cause = (error.what, error.fix), error
        except Exception as error:
            told[1:], cause = (f"{what}: {said(error)}", fix), error
    if is_spread():
        with guarded(None, "broadcast_object_list", torch.empty(0)):
            dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise CheckpointError(told[1], fix=told[2]) from cause
    return told[0]  # type: ignore[no-any-return]

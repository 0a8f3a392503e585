"""The norm of the whole model's gradient, and clipping by it.

A rank holds parts of the gradients. What lies split along a mesh axis is different on each of its ranks; what is
replicated is equal on all of them, and must count once. So of every gradient only the ranks count that stand first on
each axis along which it is replicated:

    weight      tp: Shard(0)   dp: Replicate      the ranks (tp=0, dp=0) and (tp=1, dp=0), a half each
    norm        tp: Replicate  dp: Replicate      the rank  (tp=0, dp=0)

Each rank makes one number of what it counts, all ranks gather these numbers (the only collective), and each takes the
norm of the same numbers in the same order: it is equal on all ranks, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_ as clip_whole
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fxshard.errors import GradientError, InputError
from fxshard.placement import is_shard
from fxshard.program import ParallelModule
from fxshard.ranks.faults import guarded
from fxshard.torch_internals import foreach_norm, replace_clipping

LOW = (torch.float16, torch.bfloat16)
"""Measured in float32: a norm of float16 ends at 65504, and one of bfloat16 has eight bits, on each rank other ones."""


_programs: weakref.WeakSet[ParallelModule] = weakref.WeakSet()


def measure_parts_of(program: ParallelModule) -> None:
    """From now on ``torch.nn.utils.clip_grad_norm_`` and its parts know parts of this program's gradients."""
    if program.mesh.world_size > 1:
        _programs.add(program)
        replace_clipping(_total_norm, _of_other_ranks)


def _of_other_ranks(given: list[torch.Tensor]) -> list[torch.Tensor]:
    """What other simulated ranks hold of the parameters among ``given`` that are this rank's parts."""
    wanted, found = {id(tensor) for tensor in given}, list[torch.Tensor]()
    for program in list(_programs):
        here = list(_parameters_here(program))
        names = {name for name, parameter in here if id(parameter) in wanted}
        found += [parameter for name, parameter in here if name in names and id(parameter) not in wanted]
    return found


def _parameters_here(program: ParallelModule) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of each rank that this process holds, as far as there are any."""
    for rank in _ranks_here(program):
        if rank in program.ranks_made:
            yield from program.rank_module(rank).named_parameters()


@torch.no_grad()
def _total_norm(
    own: Callable[..., torch.Tensor], tensors: Any, norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> torch.Tensor:
    """Torch's norm of some tensors, of which some are the gradients of a program's parts: of the whole gradients."""
    given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    found: dict[ParallelModule, set[str]] = {}
    parts: set[int] = set()
    for program in list(_programs):
        named = {id(p.grad): name for name, p in _parameters_here(program) if p.grad is not None}
        names = {named[id(tensor)] for tensor in given if id(tensor) in named}
        if names:
            found[program] = names
            parts |= named.keys()
    if not found:
        return own(tensors, norm_type, error_if_nonfinite, foreach)
    order = _order(norm_type)
    others = [tensor for tensor in given if id(tensor) not in parts]
    norms = [own(others, order).double()] if others else []
    norms += [_norm_of_parts(program, order, names).double() for program, names in found.items()]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), order)
    if error_if_nonfinite and not torch.isfinite(total):
        raise _not_finite(next(iter(found)), total)
    return total.to(_dtype(next(iter(found))))


@torch.no_grad()
def grad_norm(program: nn.Module, norm_type: float = 2.0) -> torch.Tensor:
    """The norm of the whole model's gradient, as if all gradients were one vector; collective under torchrun.

    It is what ``torch.nn.utils.get_total_norm`` gives for the gradients of the model on one device, up to rounding, and
    the same number on all ranks. Parameters without a gradient are left out, and tied ones count once. Without a
    process group the gradients of all simulated ranks are read.

    Args:
        program: what ``parallelize`` returned; of another module, torch's own norm is taken.
        norm_type: the order of the norm: positive, ``inf`` included.

    Returns:
        A scalar in the dtype of the gradients, in float32 where they are of less precision.

    Raises:
        GradientError: when the gradients have no values, or wait to be summed (``no_sync``).
        InputError: when the order is not positive, or what is given is no module.

    >>> import fxshard
    >>> model = nn.Linear(4, 4, bias=False)
    >>> x = torch.eye(4)
    >>> program = fxshard.parallelize(model, {"weight": fxshard.Shard(0)}, (x,), mesh={"tp": 2})
    >>> losses = fxshard.simulate(program, x).backward(torch.sum)  # each gradient is 1
    >>> fxshard.grad_norm(program), fxshard.grad_norm(program, norm_type=1)
    (tensor(4.), tensor(16.))
    """
    order = _order(norm_type)
    if not isinstance(program, ParallelModule):
        grads = [p.grad for p in _module(program).parameters() if p.grad is not None]
        whole: torch.Tensor = get_total_norm(grads, order)
        return whole
    return _norm_of_parts(program, order).to(_dtype(program))


def _norm_of_parts(program: ParallelModule, order: float, names: Container[str] | None = None) -> torch.Tensor:
    """The norm of a program's whole gradient, or of those of some parameters; collective."""
    if program.unsummed:
        raise GradientError(
            "gradients of no_sync wait to be summed over the ranks: each rank has a norm of its own",
            fix="run the last backward pass outside of no_sync",
        )
    ranks = _ranks_here(program)
    parts = torch.stack([_norm(_counted(program, rank, names), order, program.computes_on) for rank in ranks])
    if len(ranks) < program.mesh.world_size:
        own = parts.to(program.computes_on)
        parts = own.new_empty(program.mesh.world_size)
        with guarded(None, "all_gather", own):
            dist.all_gather_single(parts, own)
    total: torch.Tensor = torch.linalg.vector_norm(parts, order)
    return total


@torch.no_grad()
def clip_grad_norm_(
    program: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Scales all gradients so that the norm of the whole model's gradient is at most ``max_norm``; collective.

    It scales by one factor on all ranks, torch's: ``min(1, max_norm / (norm + 1e-6))``. Without a process group it
    scales the gradients of all simulated ranks. ``torch.nn.utils.clip_grad_norm_(program.parameters(), ...)`` does the
    same.

    Args:
        program: what ``parallelize`` returned; of another module, torch's own function is called.
        max_norm: the largest norm that the gradient may have.
        norm_type: as for ``grad_norm``.
        error_if_nonfinite: raise where the norm is infinite or no number, on all ranks, and scale nothing.

    Returns:
        The norm before.

    Raises:
        GradientError: when the norm is not finite and ``error_if_nonfinite``.

    >>> import fxshard
    >>> model = nn.Linear(4, 4, bias=False)
    >>> x = torch.eye(4)
    >>> program = fxshard.parallelize(model, {"weight": fxshard.Shard(0)}, (x,), mesh={"tp": 2})
    >>> losses = fxshard.simulate(program, x).backward(torch.sum)
    >>> fxshard.clip_grad_norm_(program, max_norm=1.0), fxshard.grad_norm(program)
    (tensor(4.), tensor(1.0000))
    """
    order = _order(norm_type)
    if not isinstance(program, ParallelModule):
        return clip_whole(list(_module(program).parameters()), max_norm, order, error_if_nonfinite)
    total = grad_norm(program, order)
    if error_if_nonfinite and not torch.isfinite(total):
        raise _not_finite(program, total)
    for rank in _ranks_here(program):
        clip_grads_with_norm_(program.rank_module(rank).parameters(), max_norm, total)
    return total


def _order(norm_type: float) -> float:
    order = float(norm_type)
    if not order > 0:
        raise InputError(
            f"norm_type is {norm_type}: only norms of positive order are made of the norms of parts",
            fix="give 2.0, 1.0 or float('inf')",
        )
    return order


def _module(program: Any) -> nn.Module:
    if not isinstance(program, nn.Module):
        raise InputError(
            f"the gradients of a {type(program).__name__} cannot be measured: how parameters lie on the ranks is known "
            "of a program only",
            fix="give the program itself, not its parameters: clip_grad_norm_(program, max_norm)",
        )
    return program


def _ranks_here(program: ParallelModule) -> list[int]:
    """The ranks whose gradients this process holds."""
    world = program.mesh.world_size
    alone = dist.is_available() and dist.is_initialized() and world > 1
    return [program.rank] if alone else list(range(world))


def _counted(program: ParallelModule, rank: int, names: Container[str] | None = None) -> list[torch.Tensor]:
    """The gradients that ``rank`` counts, of ``names`` or of all: what several ranks hold alike, the first counts."""
    at = program.mesh.coordinate(rank)
    out = []
    for name, parameter in program.rank_module(rank).named_parameters():
        grad, placed = parameter.grad, program.placements_of(name)
        if grad is None or (names is not None and name not in names):
            continue
        if grad.is_meta:
            raise GradientError(
                "the gradients are on the meta device: they have no values, and no norm",
                fix="give parallelize a model with weights",
            )
        if grad.numel() and all(is_shard(p) or i == 0 for p, i in zip(placed, at, strict=True)):
            out.append(grad)
    return out


def _norm(grads: list[torch.Tensor], order: float, device: torch.device) -> torch.Tensor:
    """The norm of some gradients, in float64: the square of a norm of float32 may end neither at infinity nor at 0."""
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    alike: dict[torch.dtype, list[torch.Tensor]] = {}
    for grad in grads:
        alike.setdefault(grad.dtype, []).append(grad)
    norms = [
        torch.stack(foreach_norm(same, order, torch.float32 if dtype in LOW else None)).double()
        for dtype, same in alike.items()
    ]
    total: torch.Tensor = torch.linalg.vector_norm(torch.cat(norms), order)
    return total


def _dtype(program: ParallelModule) -> torch.dtype:
    """The dtype of the norm: of the parameters, not of the gradients that happen to be there, so equal on all ranks."""
    out = torch.float32
    for parameter in program.rank_module(program.rank).parameters():
        if parameter.requires_grad:
            out = torch.promote_types(out, parameter.dtype.to_real())
    return out


def _not_finite(program: ParallelModule, total: torch.Tensor) -> GradientError:
    found = [
        name
        for rank in _ranks_here(program)
        for name, parameter in program.rank_module(rank).named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    names = list(dict.fromkeys(found))
    here = f"of {len(names)} parameters, first {names[0]!r}," if names else "of other ranks"
    return GradientError(
        f"the norm of the gradient is {total.item()}: gradients {here} are infinite or no numbers",
        fix="look at the loss, or skip the step; without error_if_nonfinite all gradients would be scaled by that norm",
    )

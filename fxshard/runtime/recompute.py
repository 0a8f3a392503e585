"""Calls that keep their inputs only, and are computed anew in the backward pass: activation checkpointing.

The ranks communicate within such a call, so they communicate again when it is computed anew. They must do it in the
same order, among the collectives of the backward pass. Where all ranks run the same statements they do: what the call
kept is asked for at the same place on all of them, and the call stops, as soon as all that is needed is there again, at
the same place. Where a rank has nothing to compute, it might ask later or not at all, or stop earlier. There
(``together``) one node behind the call asks first, on all ranks alike, and the call is computed anew to its end.

Reference: Chen et al., 2016, Training Deep Nets with Sublinear Memory Cost; Korthikanti et al., 2022, section 5.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as checkpoint_whole

_state = threading.local()


@contextlib.contextmanager
def keeping_all() -> Iterator[None]:
    """Lets ``checkpoint`` in this thread keep all: the ranks of a simulation, which have one backward pass together."""
    before = getattr(_state, "keeps", False)
    _state.keeps = True
    try:
        yield
    finally:
        _state.keeps = before


def checkpoint(function: Callable[..., Any], *args: Any, draws: bool = False, together: bool = False) -> Any:
    """Calls ``function``, which is called again in the backward pass.

    Args:
        function: what is called; it must compute the same again.
        args: its arguments.
        draws: it draws random numbers, which must be the same again.
        together: the ranks run different statements.

    >>> x = torch.ones(2, requires_grad=True)
    >>> checkpoint(lambda x: x.exp().log(), x).sum().backward()
    >>> x.grad
    tensor([1., 1.])
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return function(*args)
    if torch.compiler.is_compiling():  # the ranks run the same statements there, and draw nothing
        return checkpoint_whole(function, *args, use_reentrant=False)
    if getattr(_state, "keeps", False):
        return function(*args)
    run = functools.partial(_asking_first, function) if together else function
    return checkpoint_whole(run, *args, use_reentrant=False, preserve_rng_state=draws)


def _asking_first(function: Callable[..., Any], *args: Any) -> Any:
    out = function(*args)
    results = list(out) if isinstance(out, tuple) else [out]
    places = [i for i, x in enumerate(results) if isinstance(x, torch.Tensor) and x.requires_grad]
    if not places:
        return out
    asked = _AskFirst.apply(*(results[i] for i in places))  # type: ignore[no-untyped-call]
    for i, x in zip(places, asked, strict=True):
        results[i] = x
    return tuple(results) if isinstance(out, tuple) else results[0]


class _AskFirst(torch.autograd.Function):
    """Does nothing, but that its backward, the first one of the call, asks for something that the call kept."""

    @staticmethod
    def forward(ctx: Any, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(xs[0])
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        assert ctx.saved_tensors
        return grads

"""Notes which operators a model calls within ``torch.utils.checkpoint``, while it is exported.

Export runs the checkpointed function as any other, and what asked for it would be lost. So during capture the two ways
in, with ``use_reentrant`` and without, are led through here: the function runs as it is, and every node that it makes
carries a mark, which ``recompute.py`` reads:

    checkpoint(self.mlp, x)      ->      linear = linear(x, w)      custom: {"fxshard_checkpoint_0": "Mlp"}
                                         relu = relu(linear)        custom: {"fxshard_checkpoint_0": "Mlp"}

The patches sit below the public function, so a reference to it that was taken earlier meets them too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import noop_context_fn

from fxshard.torch_internals import CHECKPOINT_MODULE, CHECKPOINT_STEPS, annotate, preserve_node_meta

__all__ = ["POLICY", "marked", "marks_of", "run_checkpointed"]

_MARK = "fxshard_checkpoint_"
POLICY = "!"
"""Ends the name of a function with a ``context_fn`` of the user's: a policy of what to keep."""
_numbers = itertools.count()


def marks_of(meta: Mapping[str, Any]) -> dict[int, str]:
    """The checkpoints that a node was made in, outermost first: number -> the function's name."""
    found = meta.get("custom") or {}
    return {int(key.removeprefix(_MARK)): found[key] for key in sorted(found) if key.startswith(_MARK)}


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Marks what runs in ``checkpoint(..., use_reentrant=False)``."""
    own = getattr(CHECKPOINT_MODULE, CHECKPOINT_STEPS)
    setattr(CHECKPOINT_MODULE, CHECKPOINT_STEPS, _steps)
    try:
        yield
    finally:
        setattr(CHECKPOINT_MODULE, CHECKPOINT_STEPS, own)


def run_checkpointed(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """Stands in for ``CheckpointFunction.apply``, that is for ``checkpoint(..., use_reentrant=True)``."""
    with _region(function):
        return function(*args)


def _steps(function: Callable[..., Any], *given: Any, **named: Any) -> Iterator[None]:
    """What ``checkpoint`` does before the function runs, and after; torch 2.14 names its options, 2.13 does not."""
    context_fn = given[1] if CHECKPOINT_STEPS == "_checkpoint_without_reentrant_generator" else named["context_fn"]
    if not torch.is_grad_enabled():
        yield
        return
    context, _ = context_fn()
    with _region(function, "" if context_fn is noop_context_fn else POLICY), context:
        yield


@contextlib.contextmanager
def _region(function: Callable[..., Any], policy: str = "") -> Iterator[None]:
    with preserve_node_meta(), annotate({f"{_MARK}{next(_numbers):09}": _name(function) + policy}):
        yield


def _name(function: Any) -> str:
    """What a function is called, whatever it is wrapped in; ``""`` where it has no name.

    >>> _name(functools.partial(torch.nn.Linear(1, 1).forward)), _name(lambda x: x)
    ('forward', '')
    """
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return name if name.isascii() and name.isidentifier() else ""

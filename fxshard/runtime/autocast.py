"""Autocast as a value: which devices compute in a lower precision, and in which.

A program has its casts written out, so its code runs without autocast, whatever surrounds the call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

State: TypeAlias = tuple[tuple[str, torch.dtype], ...]
"""The devices on which autocast is enabled, each with its dtype; empty where it is nowhere."""

DEVICES = ("cpu", "cuda")


def ambient() -> State:
    """The autocast that surrounds this place.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     ambient()
    (('cpu', torch.bfloat16),)
    """
    if not any(map(torch.is_autocast_enabled, DEVICES)):
        return ()
    return tuple((d, torch.get_autocast_dtype(d)) for d in DEVICES if torch.is_autocast_enabled(d))


def entered(state: State, device: str, dtype: torch.dtype | None, enabled: bool) -> State:
    """``state`` inside of ``torch.autocast(device, dtype, enabled)``.

    >>> entered((("cpu", torch.bfloat16),), "cpu", None, False)
    ()
    """
    inside = {**dict(state), device: dtype or torch.get_autocast_dtype(device)}
    return tuple(sorted((d, t) for d, t in inside.items() if enabled or d != device))


@contextlib.contextmanager
def using(state: State, cache: bool = False) -> Iterator[None]:
    """Autocast exactly as ``state`` says, whatever surrounds it; without the cache of cast weights, unless asked."""
    wanted = dict(state)
    devices = {*DEVICES, *wanted}
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    cached = torch.is_autocast_cache_enabled()
    try:
        for device in devices:
            torch.set_autocast_enabled(device, device in wanted)
            if device in wanted:
                torch.set_autocast_dtype(device, wanted[device])
        torch.set_autocast_cache_enabled(cache)
        yield
    finally:
        for device, enabled, dtype in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cached)


def under_autocast(state: State, operator: str, *args: Any, **kwargs: Any) -> Any:
    """Calls an operator of ``torch.ops`` under autocast: one whose casts cannot be written out in front of it.

    >>> x = torch.ones(2, 2)
    >>> under_autocast((("cpu", torch.bfloat16),), "aten.mm.default", x, x).dtype
    torch.bfloat16
    """
    with using(state):
        return operator_named(operator)(*args, **kwargs)


def operator_named(name: str) -> Any:
    """The operator of ``torch.ops`` at a dotted path."""
    return functools.reduce(getattr, name.split("."), torch.ops)

"""``x.random_(low, high)`` while a model is traced: the operator is ``random_.from``, which no Python code can name.

    x.random_(0, 5)          ->     x.copy_(torch.randint_like(x, 0, 5))

Both draw the same numbers, in the order of the memory of ``x``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from fxshard.errors import CaptureError

__all__ = ["without_keywords"]


@contextlib.contextmanager
def without_keywords() -> Iterator[None]:
    """Lets this thread draw from a range."""
    here, own = threading.get_ident(), torch.Tensor.random_

    def random_(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        bounds = [*args, *(kwargs[name] for name in ("from", "to") if name in kwargs)]
        if threading.get_ident() != here or kwargs.get("generator") is not None or len(bounds) + ("from" in kwargs) < 2:
            return own(self, *args, **kwargs)
        if len(bounds) < 2 or bounds[1] is None:
            raise CaptureError(
                "random_ draws from a range without an end, which torch.export cannot record",
                op="aten.random_.from",
                fix="give it the end too: x.random_(low, high)",
            )
        return self.copy_(torch.randint_like(self, *bounds))

    torch.Tensor.random_ = random_  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.random_

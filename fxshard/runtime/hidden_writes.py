"""Values that were written behind autograd's back: they are new, and their gradient is that of what was there before.

    y = x * w                                 y = x * w
    with torch.no_grad():             ->      c = clamp(y.detach(), 0, 1)
        y.clamp_(0, 1)                        y = hidden_write(c, y)
    z = y.sum()                               z = y.sum()          # its gradient goes to x * w, as if nothing was

That is what PyTorch does on one device: of a write under ``no_grad`` the tape knows nothing.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("fxshard::hidden_write", mutates_args=())
def hidden_write(value: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """``value``, whose gradient goes to ``before``."""
    return value.clone()


@hidden_write.register_fake
def _fake(value: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


def _pass_on(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
    return None, grad


hidden_write.register_autograd(_pass_on)
HIDDEN = "fxshard_hidden"
"""What is noted of a ``copy_`` that writes back what autograd knows nothing of."""
HIDDEN_WRITE = torch.ops.fxshard.hidden_write.default


def overwrite(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Writes to a parameter, or to an input behind autograd's back."""
    with torch.no_grad():
        target.copy_(value)
    return target

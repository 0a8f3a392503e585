"""Loss scaling for float16: all ranks skip the same steps."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fxshard.ranks.faults import guarded
from fxshard.torch_internals import AgreeingGradScaler


class GradScaler(AgreeingGradScaler):
    """``torch.amp.GradScaler`` for the ranks of a program: what one rank finds, all know.

    Gradients that overflow may lie in one rank's part alone. With torch's own scaler that rank would skip the step and
    halve its scale, and the others would not: from then on they train another model. This one asks all ranks, by one
    collective an optimizer, whether any of them found an infinity. All else, arguments included, is torch's.

    Without a process group there is nothing to agree on with: give one optimizer the parameters of all simulated ranks.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer, scaler = torch.optim.SGD([weight], lr=1.0), GradScaler("cpu", init_scale=4.0)
    >>> scaler.scale(torch.tensor(float("inf")) * weight.sum()).backward()
    >>> scaler.step(optimizer)  # skipped
    >>> scaler.update()
    >>> weight.tolist(), scaler.get_scale()
    ([1.0, 1.0], 2.0)
    """

    def agree(self, found: torch.Tensor) -> torch.Tensor:
        """1 where any rank found an infinity or what is no number; collective under torchrun."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            with guarded(None, "all_reduce", found):
                dist.all_reduce(found, dist.ReduceOp.MAX)
        return found

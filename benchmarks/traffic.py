"""What a step communicates: every collective that reaches a process group, whoever issues it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
QUIET = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "broadcast_")


class Traffic(TorchDispatchMode):
    """Counts collectives and their payload: the bytes of the whole tensor that a rank brings or gets.

    Attributes:
        counts: kind -> how many.
        num_bytes: kind -> how many bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        space, name = function.namespace, function._schema.name.split("::")[1]
        if space in ("c10d", "_c10d_functional") and name not in QUIET:
            kind = KINDS[name]
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            self.counts[kind] += 1
            self.num_bytes[kind] += max(t.numel() * t.element_size() for t in tensors)
        return out

    def __str__(self) -> str:
        parts = [f"{count} {kind}" for kind, count in sorted(self.counts.items())]
        return f"{', '.join(parts) or 'none'}; {sum(self.num_bytes.values()):,} bytes"

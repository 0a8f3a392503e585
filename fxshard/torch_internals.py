"""What fxshard uses of PyTorch that PyTorch does not promise to keep: every such name comes from here.

Tried with torch 2.13.0. With another version look first whether these are still there, and mean the same. (``capture``
names further modules of torch as text, to tell their warnings and frames from the user's.)
"""

from __future__ import annotations

import torch
from torch._C._distributed_c10d import PrefixStore, Store
from torch._export.passes import replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass
from torch._functorch import predispatch
from torch._ops import HigherOrderOperator, OperatorBase, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.distributed import distributed_c10d
from torch.export import _trace as exporter
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.functions import FloorDiv

__all__ = [
    "ENTER_VMAP",
    "EXIT_AUTOCAST",
    "LAZY_LOAD",
    "LEAVE_VMAP",
    "MODE_MARKS",
    "REGION_PASSES",
    "SET_GRAD",
    "FakeTensor",
    "FloorDiv",
    "HigherOrderOperator",
    "LazyGraphModule",
    "OpOverload",
    "OpOverloadPacket",
    "OperatorBase",
    "PrefixStore",
    "SingleLevelFunction",
    "Store",
    "TorchDispatchMode",
    "default_store",
    "default_timeout_s",
    "exporter",
    "has_kernel",
    "is_vmapped",
    "leave_vmaps",
    "pytree",
    "vmap_level",
]

SET_GRAD = torch._C._set_grad_enabled
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
MODE_MARKS = (SET_GRAD, torch.amp.autocast_mode._enter_autocast, EXIT_AUTOCAST)
"""The calls by which an exported graph switches gradients and autocast on and off."""
ENTER_VMAP, LEAVE_VMAP = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting
LAZY_LOAD = predispatch.lazy_load_decompositions
"""What ``torch.vmap`` leaves in an exported graph."""
REGION_PASSES = (
    (replace_set_grad_with_hop_pass, "replace_set_grad_with_hop_pass"),
    (replace_autocast_with_hop_pass, "replace_autocast_with_hop_pass"),
)
"""The passes of export that make regions of the marks: modules, and the names of their functions."""


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator, ``aten::add.Tensor``, has a kernel of its own for a dispatch key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key))


def default_store() -> Store:
    """The store in which the ranks of the default process group met."""
    return distributed_c10d._get_default_store()


def default_timeout_s() -> float:
    """The default process group's timeout: ``init_process_group`` gives it to the store, too."""
    return float(default_store().timeout.total_seconds())  # type: ignore[attr-defined]


def is_vmapped(value: object) -> bool:
    """Whether a tensor stands for one of many, inside ``torch.vmap``."""
    return isinstance(value, torch.Tensor) and bool(torch._C._functorch.is_batchedtensor(value))


def vmap_level() -> int:
    """How many ``torch.vmap`` surround this place."""
    return torch._C._functorch.maybe_current_level() or 0


def leave_vmaps(level: int) -> None:
    """Leaves those of them that an error left open: all above ``level``."""
    while vmap_level() > level:
        torch._C._functorch._vmap_decrement_nesting()

"""What fxshard uses of PyTorch that PyTorch does not promise to keep: every such name comes from here.

Tried with torch 2.13.0 and 2.14.1. With another version look first whether these are still there, and mean the same.
(``capture`` names further modules of torch as text, to tell their warnings and frames from the user's.)
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._C._distributed_c10d import PrefixStore, Store
from torch._export.passes import replace_autocast_with_hop_pass, replace_set_grad_with_hop_pass
from torch._functorch import predispatch
from torch._ops import HigherOrderOperator, OperatorBase, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.filesystem import _StoragePrefix as StoragePrefix
from torch.distributions import Distribution
from torch.export import _trace as exporter
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.traceback import annotate, preserve_node_meta
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.nn.utils import clip_grad
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as CHECKPOINT_MODULE
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.printers import PythonPrinter

__all__ = [
    "APPLY_OWNER",
    "AgreeingGradScaler",
    "CHECKPOINT_MODULE",
    "CHECKPOINT_STEPS",
    "ENTER_VMAP",
    "EXIT_AUTOCAST",
    "LAZY_LOAD",
    "LEAVE_VMAP",
    "MODE_MARKS",
    "REGION_PASSES",
    "SEES_EVERY_APPLY",
    "SET_GRAD",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "Graph",
    "HigherOrderOperator",
    "IncompatibleKeys",
    "OpOverload",
    "OpOverloadPacket",
    "OperatorBase",
    "PrefixStore",
    "StorageInfo",
    "StoragePrefix",
    "Store",
    "TorchDispatchMode",
    "after_backward",
    "backward_id",
    "annotate",
    "default_store",
    "default_timeout_s",
    "exporter",
    "foreach_norm",
    "has_kernel",
    "hooks_of",
    "is_only_reader",
    "is_recorded",
    "is_transformed",
    "is_vmapped",
    "leave_vmaps",
    "preserve_node_meta",
    "make_wrapper",
    "no_modes",
    "node_of",
    "print_python",
    "pytree",
    "record",
    "replace_clipping",
    "replaced",
    "saving_hooks",
    "set_element",
    "trusted_distributions",
    "unassigned_buffers",
    "vmap_level",
    "will_accumulate",
]

_STEPS = "_checkpoint_without_reentrant_generator"
CHECKPOINT_STEPS = f"{_STEPS}_impl" if hasattr(CHECKPOINT_MODULE, f"{_STEPS}_impl") else _STEPS  # since torch 2.14
"""What ``torch.utils.checkpoint.checkpoint`` does around the function: a generator of one step, in that module."""
APPLY_OWNER: Any = (
    torch.autograd.Function
    if isinstance(vars(torch.autograd.Function)["apply"], types.ClassMethodDescriptorType)  # since torch 2.14
    else SingleLevelFunction
)
"""The class at which the ``apply`` of all custom functions can be replaced."""
SEES_EVERY_APPLY = APPLY_OWNER is SingleLevelFunction
"""Whether the ``apply`` that somebody took before is replaced, too."""
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
no_modes = _disable_current_modes
"""A context in which tensors are real, though a tracer is at work."""
make_wrapper = torch.Tensor._make_wrapper_subclass
"""Makes a tensor subclass that has a shape and no memory."""


def print_python(expression: Any) -> str:
    """An expression or a condition of dynamic sizes as Python."""
    return str(PythonPrinter().doprint(expression))


def node_of(tensor: torch.Tensor) -> fx.Node | None:
    """The node by which the graph that is being traced knows a tensor; None where none is, or it is a constant."""
    mode = get_proxy_mode()
    slot = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    if slot is None or getattr(slot, "constant", None) is not None:
        return None
    node: fx.Node | None = getattr(getattr(slot, "proxy", None), "node", None)
    return node


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Within it a class or a module has other attributes; behind it those it had."""
    kept = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in kept:
                setattr(owner, name, kept[name])
            else:
                delattr(owner, name)


def replace_clipping(
    total_norm: Callable[..., torch.Tensor], others: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> None:
    """Lets ``torch.nn.utils.clip_grad_norm_``, ``get_total_norm`` and ``clip_grads_with_norm_`` ask us, once.

    Args:
        total_norm: is called as ``total_norm(torch's own, ...)``.
        others: the parameters that are to be scaled beside some.
    """
    own_norm, own_clip = clip_grad._get_total_norm, clip_grad._clip_grads_with_norm_
    if hasattr(own_norm, "fxshard"):
        return

    @functools.wraps(own_norm)
    def norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> torch.Tensor:
        return total_norm(own_norm, tensors, norm_type, error_if_nonfinite, foreach)

    @functools.wraps(own_clip)
    def clip(parameters: Any, max_norm: float, total_norm: torch.Tensor, foreach: bool | None = None) -> None:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        own_clip([*given, *others(given)], max_norm, total_norm, foreach)

    norm.fxshard = True  # type: ignore[attr-defined]
    clip_grad._get_total_norm = torch.nn.utils.get_total_norm = norm
    clip_grad._clip_grads_with_norm_ = torch.nn.utils.clip_grads_with_norm_ = clip


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


def is_recorded(x: torch.Tensor) -> bool:
    """Whether what is done with ``x`` must be told to autograd: it needs a gradient, or a transform of ``torch.func``
    or forward-mode differentiation is under way.
    """
    return (x.requires_grad and torch.is_grad_enabled()) or is_transformed()


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def record(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without what that does for transforms of ``torch.func`` where none is under way."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def vmap_level() -> int:
    """How many ``torch.vmap`` surround this place."""
    return torch._C._functorch.maybe_current_level() or 0


def leave_vmaps(level: int) -> None:
    """Leaves those of them that an error left open: all above ``level``."""
    while vmap_level() > level:
        torch._C._functorch._vmap_decrement_nesting()


def after_backward(run: Callable[[], None]) -> None:
    """Calls ``run`` at the end of the backward pass that is under way."""
    torch.autograd.Variable._execution_engine.queue_callback(run)


def backward_id() -> int:
    """A number of the backward pass that is under way; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def will_accumulate(node: Any, index: int = 0) -> bool:
    """Whether the backward pass at hand adds to ``.grad`` of a function's tensor input; ``autograd.grad`` does not."""
    accumulate = node.next_functions[index][0]
    try:
        return accumulate is not None and bool(torch._C._will_engine_execute_node(accumulate))
    except RuntimeError:  # "a leaf node was passed ... but we are currently running autograd.grad()"
        return False


def hooks_of(tensor: torch.Tensor) -> list[Any]:
    """The hooks on a tensor's gradient."""
    before, after = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    return [*(before.values() if before else ()), *(after.values() if after else ())]


def is_only_reader(tensor: torch.Tensor) -> bool:
    """Whether nothing else, neither a tensor nor an array, shares the memory of a tensor."""
    storage = tensor.untyped_storage()
    shares = torch._C._storage_Use_Count(storage._cdata) - 2  # but for the tensor, and the storage as Python has it
    holders = sys.getrefcount(storage) - 3  # but for this name, the argument, and torch's own
    return shares == holders == 0 and not tensor.is_shared()


def saving_hooks() -> tuple[Callable[[Any], Any], Callable[[Any], Any]] | None:
    """The hooks through which autograd saves tensors here: those of the innermost ``saved_tensors_hooks``."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else (hooks[0], hooks[1])


@contextlib.contextmanager
def unassigned_buffers() -> Iterator[None]:
    """Export does not look for buffers that a model assigns; it would find those of the outermost module only."""
    name = "register_buffer_assignment_hook"
    own = getattr(exporter, name)
    setattr(exporter, name, lambda mod, assigned: own(torch.nn.Module(), assigned))
    try:
        yield
    finally:
        setattr(exporter, name, own)


@contextlib.contextmanager
def trusted_distributions() -> Iterator[None]:
    """``torch.distributions`` take their parameters unasked; torch has a setter for this, but nothing to read it by."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def foreach_norm(tensors: Sequence[torch.Tensor], order: float, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """The norm of each tensor, in few kernels; what low precisions hold is summed in ``dtype``."""
    return list(torch._foreach_norm(list(tensors), order, dtype))


class Graph(fx.Graph):
    """torch's graph, in which a node is written in half the time.

    ``fx.Graph`` walks through the arguments of every new node to warn of symbolic sizes that are no nodes, and sorts
    the node anew under its operator when it gets its meta. Here it is made without either, and given both.
    """

    def create_node(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        """As ``fx.Graph`` does."""
        node = super().create_node(op, target, None, None, name, type_expr)
        if args or kwargs:
            node._update_args_kwargs(args or (), kwargs or {})
        return node

    def node_copy(self, node: fx.Node, arg_transform: Callable[[fx.Node], Any] = lambda x: x) -> fx.Node:
        """As ``fx.Graph`` does."""
        args, kwargs = fx.map_arg(node.args, arg_transform), fx.map_arg(node.kwargs, arg_transform)  # may write nodes
        copy = super().create_node(node.op, node.target, None, None, node.name, node.type)
        if args or kwargs:
            copy._update_args_kwargs(args, kwargs)
        copy.meta.update(node.meta)
        return copy


class AgreeingGradScaler(torch.amp.GradScaler):
    """torch's scaler, with a place at which ranks agree on what they found.

    Every way to ``step`` looks for infinities by one method, which says for each device whether there were any.
    """

    def agree(self, found: torch.Tensor) -> torch.Tensor:
        """What all ranks know, of what this one found: a scalar, above 0 where there was an infinity."""
        raise NotImplementedError

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        here = [each.to(found_inf.device) for each in found.values()]
        known = self.agree(torch.stack([found_inf, *here]).amax())  # also where a rank has no gradient at all
        return {device: known.to(device) for device in found} or {known.device: known}

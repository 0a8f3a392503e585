"""A custom ``autograd.Function`` as one operator: its forward and its own backward stay together.

``torch.export`` would record the operators of its forward, whose gradient is not what the user wrote. So during
capture each call of ``apply`` becomes a call of an operator made for it, which does nothing but call ``apply``:

    y = Scale.apply(x, 2.0)      ->      y = torch.ops.fxshard_function.mylib_Scale.default(x)     # 2.0 is in it

Where its forward and its backward are seen to treat every element alone, it has the rule of such operators. Else it has
none: its operands are gathered, every rank computes the whole, and the report names it. ``register_rule`` may teach
fxshard how to split it, as any operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from fxshard.errors import CaptureError
from fxshard.rules.table import find_rule, register_rule
from fxshard.torch_internals import TorchDispatchMode, pytree

__all__ = ["NAMESPACE", "call_whole"]

NAMESPACE = "fxshard_function"
"""Where the operators are made."""

_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_operators: dict[Any, Any] = {}


@dataclass(frozen=True)
class _Hole:
    """Stands for a tensor among the arguments."""


def call_whole(cls: type, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call the operator that stands for ``cls.apply`` with these constants.

    Args:
        cls: the ``autograd.Function``.
        apply: its own ``apply``.
        args: tensors and constants.

    Raises:
        CaptureError: an argument or a result cannot be part of a graph.
    """
    template = tuple(_Hole() if isinstance(arg, torch.Tensor) else arg for arg in args)
    strange = [type(arg).__qualname__ for arg in template if not isinstance(arg, (_Hole, *_CONSTANTS))]
    if strange:
        raise _refused(cls, f"is given a {strange[0]}, which a graph cannot hold")
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    count, draws = _results(cls, apply, args)
    key = (cls, count, draws, *((type(item), item) for item in template))
    if key not in _operators:
        _operators[key] = _make(cls, apply, template, count, draws)
        name = f"{NAMESPACE}::{_operators[key].__name__}"
        if not draws and find_rule(_operators[key].default) is None and _is_pointwise(apply, args):
            register_rule(name, "@pointwise")
    return _operators[key](*tensors)


class _Draws(TorchDispatchMode):
    """Notes whether random numbers are drawn."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _results(cls: type, apply: Callable[..., Any], args: tuple[Any, ...]) -> tuple[int | None, bool]:
    """How many tensors a call returns in a tuple (None where it returns one by itself), and whether it draws."""
    with disable_proxy_modes_tracing(), torch.no_grad(), _Draws() as seen:  # type: ignore[no-untyped-call]
        own = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        tensors = [arg for arg in own if isinstance(arg, torch.Tensor)]
        before = [tensor._version for tensor in tensors]
        out = apply(*own)
    if [tensor._version for tensor in tensors] != before:
        raise _refused(cls, "changes its operands in place")
    items = out if isinstance(out, tuple) else (out,)
    if not all(isinstance(item, torch.Tensor) for item in items):
        raise _refused(cls, "returns something else than tensors")
    return len(items) if isinstance(out, tuple) else None, seen.found


class _Elements(TorchDispatchMode):
    """Notes every operator that is called, and whether each treats every element of tensors of one shape alone."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.alone = shape, True
        self.called: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs or {}))
        every = [leaf for leaf in (*leaves, *pytree.tree_leaves(out)) if isinstance(leaf, torch.Tensor)]
        if func.namespace == "prim":  # asks for a device
            return out
        known = torch.Tag.pointwise in func.tags or func._schema.name in _COPIES
        self.alone = self.alone and known and all(tensor.shape == self.shape for tensor in every)
        self.called.append((func, *(leaf for leaf in leaves if isinstance(leaf, bool | int | float | torch.dtype))))
        return out


_COPIES = {
    f"aten::{name}"
    for name in ("alias", "clone", "detach", "_to_copy", "copy_", "ones_like", "zeros_like", "full_like", "fill_")
}


def _is_pointwise(apply: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a Function's forward and backward treat every element alone, by the same numbers at any size."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) != 1 or not all(tensor.is_floating_point() for tensor in tensors) or not tensors[0].dim():
        return False
    runs = []
    try:
        for times in (1, 2):
            shape = torch.Size(size * times for size in tensors[0].shape)
            with disable_proxy_modes_tracing(), torch.enable_grad():
                own = [arg.new_empty(shape).requires_grad_() if isinstance(arg, torch.Tensor) else arg for arg in args]
                with _Elements(shape) as seen:
                    outs = apply(*own)
                    outs = outs if isinstance(outs, tuple) else (outs,)
                    given = [x for x in own if isinstance(x, torch.Tensor)]
                    flows = [out for out in outs if out.requires_grad]
                    if flows:
                        torch.autograd.grad(flows, given, [torch.ones_like(out) for out in flows], allow_unused=True)
            if not seen.alone or any(out.shape != shape for out in outs):
                return False
            runs.append(seen.called)
    except Exception:  # whatever it is, it is not known to be pointwise
        return False
    return bool(runs[0] == runs[1])


def _make(cls: type, apply: Callable[..., Any], template: tuple[Any, ...], count: int | None, draws: bool) -> Any:
    """Define the operator."""

    def run(*tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        return apply(*(next(rest) if isinstance(item, _Hole) else item for item in template))

    name = re.sub(r"[\W_]+", "_", f"{cls.__module__}.{cls.__qualname__}".replace("<locals>.", "")).strip("_")
    same = sum(1 for other in _operators.values() if re.fullmatch(rf"{name}(_\d+)?", other.__name__))
    name = f"{name}_{same}" if same else name
    holes = sum(isinstance(item, _Hole) for item in template)
    tags = (torch.Tag.nondeterministic_seeded,) if draws else ()
    results = "Tensor" if count is None else f"({', '.join(['Tensor'] * count)})"
    _library.define(f"{name}({', '.join(f'Tensor x{i}' for i in range(holes))}) -> {results}", tags=tags)
    _library.impl(name, run, "CompositeImplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _refused(cls: type, why: str) -> CaptureError:
    return CaptureError(
        f"{cls.__qualname__} is a custom autograd.Function; it {why}",
        fix="write it with torch operators, or as a torch.library.custom_op with register_autograd",
    )

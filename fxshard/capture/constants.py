"""Inputs whose values decide shapes, declared to be constants: each set of values is a capture of its own.

    parallelize(model, plan, kwargs=batch, constants=("image_grid_thw",))

The grids of Qwen2-VL say how many patches an image has: a graph cannot be made of the number 3 that stands in a tensor.
So at each call such a tensor is turned into a text, which the capture holds as it holds any number or flag; and where
the model is run, into a tensor again, with which Python can count:

    for t, h, w in grid_thw:                      h is 4
        pos = torch.arange(h)                     computed at capture: 0, 1, 2, 3
        x = x + table[pos]                        the graph reads the constant [0, 1, 2, 3]
"""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxshard.capture.calls import DECLARED, canonical_call, is_declared
from fxshard.errors import PlanError
from fxshard.torch_internals import make_wrapper, no_modes, pytree

__all__ = ["as_declared", "check_constants", "declared", "handed_out"]


def check_constants(names: Sequence[str], signature: inspect.Signature) -> None:
    """Raises ``PlanError`` where a name is none of an input."""
    known = [name for name in signature.parameters if name != "self"]
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    for name in names:
        if not free and not fnmatch.filter(known, name):
            raise PlanError(f"constants names {name!r}, which is no input of forward{signature}", fix=f"one of {known}")


def declared(
    names: Sequence[str], signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call whose tensors of these names are texts."""
    args, kwargs = canonical_call(signature, args, kwargs)
    order = [name for name, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]

    def as_text(name: str, value: Any) -> Any:
        chosen = any(fnmatch.fnmatchcase(name, each) for each in names)
        return pytree.tree_map_only(torch.Tensor, _written, value) if chosen else value

    given = [as_text(order[min(i, len(order) - 1)] if order else "", value) for i, value in enumerate(args)]
    return tuple(given), {name: as_text(name, value) for name, value in kwargs.items()}


def as_declared(leaf: Any, constant: Any) -> Any:
    """A leaf of a call, as a text where the capture has one in its place."""
    return _written(leaf) if is_declared(constant) and isinstance(leaf, torch.Tensor) else leaf


def _written(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{DECLARED}{dtype} {list(tensor.shape)} {tensor.detach().reshape(-1).tolist()!r}"


def _read(text: str, device: torch.device | None) -> torch.Tensor:
    dtype, rest = text.removeprefix(DECLARED).split(" ", 1)
    shape, _, values = rest.partition("] ")
    numbers = ast.literal_eval(values)
    return torch.tensor(numbers, dtype=getattr(torch, dtype), device=device).reshape(ast.literal_eval(f"{shape}]"))


@contextlib.contextmanager
def handed_out(model: nn.Module, traced: bool, device: torch.device | None = None) -> Iterator[None]:
    """Within it the model is given tensors for such texts; while it is ``traced``, ones that Python can count with."""

    def give(module: nn.Module, args: Any, kwargs: Any) -> Any:
        def tensor(value: Any) -> Any:
            if not is_declared(value):
                return value
            with no_modes():
                made = _read(value, device)
                return _Counted(made) if traced else made

        if not any(map(is_declared, pytree.tree_leaves((args, kwargs)))):
            return None  # containers stay the caller's, who may be waiting for what is put into them
        return pytree.tree_map(tensor, (args, kwargs))

    handle = model.register_forward_pre_hook(give, prepend=True, with_kwargs=True)
    try:
        with _Counting() if traced else contextlib.nullcontext():
            yield
    finally:
        handle.remove()


class _Counting(TorchFunctionMode):
    """Lets functions that take numbers take known tensors, too: ``torch.arange(h)``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(leaf, _Counted) for leaf in pytree.tree_leaves((args, kwargs))):
            return _Counted.__torch_function__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


class _Counted(torch.Tensor):
    """A tensor whose values are known while a graph is made: what is computed of such alone is no part of it."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> _Counted:
        """Knows ``value``."""
        made: _Counted = make_wrapper(cls, value.shape, dtype=value.dtype, device=value.device)
        made.value = value
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sized = getattr(func, "__name__", "") in _SIZED
        return _run(func, args, kwargs or {}, lambda tensor: _traced(tensor, sized))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {}, lambda tensor: _traced(tensor, False))


def _run(func: Any, args: Any, kwargs: Any, traced: Callable[[_Counted], Any]) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    if all(isinstance(leaf, _Counted) for leaf in leaves if isinstance(leaf, torch.Tensor)):
        with no_modes(), torch._C.DisableTorchFunction():
            args, kwargs = pytree.tree_map_only(_Counted, lambda tensor: tensor.value, (args, kwargs))
            return pytree.tree_map_only(torch.Tensor, _Counted, func(*args, **kwargs))
    args, kwargs = pytree.tree_map_only(_Counted, traced, (args, kwargs))
    return func(*args, **kwargs)


_SIZED = {
    "view", "reshape", "expand", "repeat", "tile", "split", "split_with_sizes", "narrow", "unflatten", "new_zeros",
    "new_ones", "new_full", "new_empty", "chunk", "roll", "select",
}  # fmt: skip
"""Functions of a tensor and of sizes."""


def _traced(tensor: _Counted, is_size: bool) -> Any:
    """A known tensor as the graph has it; one number, as a size."""
    with no_modes(), torch._C.DisableTorchFunction():
        values: Any = tensor.value.tolist()
    if is_size and isinstance(values, int):
        return values
    return torch.tensor(values, dtype=tensor.value.dtype, device=tensor.value.device)

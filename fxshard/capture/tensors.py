"""A model's parameters and buffers as a program needs them: each by itself, without hooks, and always the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxshard.capture.calls import in_words
from fxshard.errors import CaptureError

__all__ = ["Kinds", "check_own_memory", "check_same", "kinds_of"]

Kinds = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def kinds_of(tensors: Sequence[tuple[str, torch.Tensor]]) -> Kinds:
    """Shape and dtype of each, by name."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors}


def check_same(now: Kinds, then: Kinds) -> None:
    """Raises where a model has other parameters or buffers than it had.

    >>> check_same({"a": ((2,), torch.float32)}, {"a": ((3,), torch.float32)})
    Traceback (most recent call last):
        ...
    fxshard.errors.CaptureError: a of the model was ...[3] when the program was made, and is ...[2]
      fix     ...
    """
    for name in {**then, **now}:
        a, b = (in_words(kinds[name][1], kinds[name][0]) if name in kinds else "not there" for kinds in (then, now))
        if a != b:
            raise CaptureError(
                f"{name} of the model was {a} when the program was made, and is {b}",
                fix="a program's weights are those of its first capture: parallelize the model again",
            )


def check_own_memory(tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Raises where parameters share memory without being one, or have hooks, which parts of them would not have.

    Raises:
        CaptureError: then.
    """
    spans: dict[int, list[tuple[Any, Any, str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        if isinstance(tensor, nn.Parameter) and any(getattr(tensor, hooks, None) for hooks in _HOOKS):
            raise CaptureError(
                f"the parameter {name} has a hook on its gradient, which the program's parts of it would not run",
                fix="give the hook to the program's own parameter (program.get_parameter), which may be a part; or "
                "take it away before parallelize",
            )
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
            start, length = (
                tensor.storage_offset(),
                1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)),
            )
            spans.setdefault(tensor.untyped_storage()._cdata, []).append((start, start + length, name, tensor))
    for each in spans.values():
        for i, (start, end, name, tensor) in enumerate(each):
            for low, high, other, there in each[:i]:
                parameter = isinstance(tensor, nn.Parameter) or isinstance(there, nn.Parameter)
                if tensor is not there and parameter and low < end and start < high:
                    raise CaptureError(
                        f"{other} and {name} share memory, and are two tensors: as parts they would be apart",
                        fix="tie them by being one parameter (self.a.weight = self.b.weight), and transpose where it "
                        "is used",
                    )

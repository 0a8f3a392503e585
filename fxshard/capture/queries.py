"""What a model's code asks while it is traced, beside values of its inputs: each answer is part of the capture.

torch.is_grad_enabled()         whether gradients are enabled, or inference mode is
x.requires_grad, x.grad_fn      what requires one
x.stride(), x.is_contiguous()   how a tensor lies in memory
self.step.item()                a number inside a tensor that is no input, parameter or buffer
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxshard.capture.code_names import begin_running, end_running, is_settled
from fxshard.torch_internals import FakeTensor, replaced

__all__ = ["Questions", "in_inference_mode", "outside_inference_mode", "told_of_inference_mode"]

_CALLERS: ContextVar[bool] = ContextVar("fxshard_inference_mode", default=False)
_NEEDS = frozenset(("requires_grad", "grad_fn", "is_leaf", "grad"))
_LAYOUT = frozenset(("stride", "is_contiguous", "as_strided", "storage_offset", "dim_order"))
_NUMBERS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy")
_PASSED_THROUGH = (
    "torch.overrides", "torch.fx.", "torch._export.", "torch.utils._stats", "torch._compile", "torch._dynamo.",
    "torch.utils._device", "torch.export.", "fxshard.",
)  # fmt: skip
"""Modules that stand between the one who asks and the one who is asked."""


class Questions:
    """Notes what is asked.

    Attributes:
        grad: whether somebody asked if gradients are enabled.
        needs: whether somebody asked what requires one.
        layout: whether somebody asked how a tensor lies in memory.
        tensors: whose values were asked for.
        inference: how many inference modes surround the code, of which the graph knows nothing: the caller's, and
            those of the model's.
    """

    def __init__(self) -> None:
        self.grad = self.needs = self.layout = False
        self.tensors: dict[int, torch.Tensor] = {}
        self.inference = int(in_inference_mode())

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within it, what this thread asks is noted."""
        here = threading.get_ident()

        def mode(own: Callable[[], bool]) -> Callable[[], bool]:
            def ask() -> bool:
                if threading.get_ident() == here and _by_the_model():
                    self.grad = True
                return own()

            return ask

        def number(own: Callable[..., Any]) -> Callable[..., Any]:
            def ask(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() == here and not isinstance(tensor, FakeTensor) and _by_the_model():
                    self.tensors[id(tensor)] = tensor
                return own(tensor, *args, **kwargs)

            return ask

        modes = {
            "is_grad_enabled": mode(torch.is_grad_enabled),
            "is_inference_mode_enabled": mode(lambda: self.inference > 0),
        }
        numbers = {name: number(getattr(torch.Tensor, name)) for name in _NUMBERS}
        with replaced(torch, **modes), replaced(torch.Tensor, **numbers), _Getters(self):
            yield


class _Getters(TorchFunctionMode):
    """Sees what is asked of tensors."""

    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__.__name__ in _NEEDS and _by_the_model():
            self.questions.needs = True
        elif name in _LAYOUT and _by_the_model():
            self.questions.layout = True
        if any(map(callable, args)) or any(map(callable, kwargs.values())) or not all(map(_is_torchs, types)):
            return func(*args, **kwargs)  # it may call the model's code
        running = end_running()
        try:
            return func(*args, **kwargs)
        finally:
            if running:
                begin_running()


def in_inference_mode() -> bool:
    """Whether inference mode is on, here or where ``outside_inference_mode`` was entered."""
    return torch.is_inference_mode_enabled() or _CALLERS.get()


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Within it, tensors are such as autograd knows; gradients are enabled or not, as before."""
    token = _CALLERS.set(in_inference_mode())
    try:
        grad = torch.set_grad_enabled(torch.is_grad_enabled())  # inference_mode(False) would enable them
        with torch.inference_mode(False), grad:
            yield
    finally:
        _CALLERS.reset(token)


@contextlib.contextmanager
def told_of_inference_mode() -> Iterator[None]:
    """Within it, the model's code that asks for inference mode is told of the caller's."""
    here, own = threading.get_ident(), torch.is_inference_mode_enabled

    def ask() -> bool:
        return own() or (threading.get_ident() == here and _CALLERS.get() and _by_the_model())

    with replaced(torch, is_inference_mode_enabled=ask):
        yield


def _is_torchs(cls: type) -> bool:
    return is_settled(cls.__module__)


def _by_the_model() -> bool:
    """Whether the code that asks is the model's: the user's, or a layer of torch's."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_PASSED_THROUGH):
        frame = frame.f_back  # type: ignore[assignment]
    name = frame.f_globals.get("__name__", "") if frame is not None else "torch"
    return name.startswith("torch.nn.") or not is_settled(name)

"""Run ``torch.export`` on an unmodified module: quietly, with readable errors, and all global state put back."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from fxshard.errors import CaptureError, FxshardError
from fxshard.passes.checkpoints import marked, run_checkpointed
from fxshard.passes.functions import call_whole
from fxshard.passes.origins import TORCH_DIR
from fxshard.passes.trees import flatten
from fxshard.torch_internals import REGION_PASSES, SingleLevelFunction, exporter, pytree, trusted_distributions

__all__ = ["Outputs", "export", "fits_graph", "has_meta", "quiet"]

_PACKAGE_DIR = str(Path(__file__).parent.parent)
_GRAPH_CONSTANTS = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout)
# torch's own machinery for wrapping operators: what it wraps is recorded whole, with its gradient.
_HARMLESS_FUNCTIONS = ("torch._higher_order_ops", "torch._functorch", "torch._dynamo", "torch._library", "torch._C")
_NOISY_LOGGERS = ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "torch._functorch", "torch._subclasses")


class Outputs:
    """A forward hook that gives export the tensors of an output, and keeps all else for us.

    So an output may be of any type that :func:`flatten` takes apart, and hold constants of any type.
    """

    def __init__(self) -> None:
        """Make a hook that has seen no output."""
        self.spec: pytree.TreeSpec | None = None
        self.constants: dict[int, Any] = {}

    def __call__(self, module: nn.Module, args: Any, output: Any) -> tuple[Any, ...]:
        """Return the tensors and dynamic numbers among the leaves of ``output``."""
        leaves, self.spec = flatten(output)
        traced = {i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat)}
        self.constants = {i: leaf for i, leaf in enumerate(leaves) if i not in traced}
        for leaf in self.constants.values():
            if _hides_tensors(leaf):
                raise CaptureError(
                    f"the model returns a {type(leaf).__qualname__}, whose tensors cannot be found",
                    fix="return tensors in tuples, lists, dicts or dataclasses, or register the class with "
                    "torch.utils._pytree.register_pytree_node",
                )
        return tuple(leaves[i] for i in sorted(traced))

    def merge(self, traced: Any) -> tuple[Any, ...]:
        """Put the constants back among the values that export returned."""
        values = iter(traced)
        total = len(self.constants) + len(traced)
        return tuple(self._constant(i) if i in self.constants else next(values) for i in range(total))

    def _constant(self, index: int) -> Any:
        value = self.constants[index]
        return value if fits_graph(value) else None


def fits_graph(value: Any) -> bool:
    """Whether a graph can hold a value that is not computed in it."""
    return type(value) in _GRAPH_CONSTANTS


def _hides_tensors(value: Any) -> bool:
    return any(isinstance(item, torch.Tensor) for item in getattr(value, "__dict__", {}).values())


def export(
    model: nn.Module, tree: Any, shapes: Any, outputs: Outputs, device: torch.device | None
) -> torch.export.ExportedProgram:
    """Run torch.export, with every error turned into one of ours, and all global state put back.

    Args:
        model: the model.
        tree: its inputs.
        shapes: as ``torch.export`` takes them.
        outputs: what the model returns goes there, too.
        device: where the model and its inputs are shown to export; None where they are.
    """
    args, kwargs = _distinct(tree, device)
    handle = model.register_forward_hook(outputs)
    drawn = random.getstate()
    try:
        with (
            quiet(),
            _seen_on(model, device),
            _whole_functions(model),
            marked(),
            _flat_regions(),
            trusted_distributions(),  # which would decide by values whether to raise
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except FxshardError as error:
        raise error.with_traceback(None) from None
    except Exception as error:
        raise _capture_error(model, error) from None
    finally:
        handle.remove()
        drew, _ = random.getstate() != drawn, random.setstate(drawn)
    if drew:
        warnings.warn(
            "the model draws from Python's random module; the draw made at capture is frozen into the graph: draw "
            "with torch instead",
            stacklevel=3,
        )
    return program


def _distinct(tree: Any, device: torch.device | None) -> Any:
    """Make every tensor an object of its own: export takes two inputs that are one tensor for one input."""
    met: set[int] = set()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if device is not None and tensor.device != device:
            return _stand_in(tensor, device)
        if id(tensor) in met:
            return tensor.detach().requires_grad_(tensor.requires_grad)
        met.add(id(tensor))
        return tensor

    return pytree.tree_map_only(torch.Tensor, own, tree)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and log records of torch's exporter, and the graph that it prints; those of the user pass."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.(export|_export|fx|_dynamo|_functorch|_subclasses|_logging)")
        warnings.filterwarnings("ignore", module=r"(copyreg|contextlib|torch\.utils\._pytree)")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        exporter.print = _print_nothing  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del exporter.print  # type: ignore[attr-defined]
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _print_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``print`` in the exporter's module."""


def has_meta(model: nn.Module) -> bool:
    """Whether a model has tensors without storage, on device ``meta``."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _stand_in(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor like another one, on a device, without memory."""
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if not like.is_meta:
        like.untyped_storage().resize_(0)
    parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(like, tensor.requires_grad) if parameter else like.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _seen_on(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Show export all tensors of the model on one device: no operator takes a mixture. None: as they are."""
    if device is None:
        yield
        return
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.device != device:
                    swapped.append((table, name, tensor))
    stand_ins = {id(tensor): _stand_in(tensor, device) for _, _, tensor in swapped}
    try:
        for table, name, tensor in swapped:
            table[name] = stand_ins[id(tensor)]
        yield
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


@contextlib.contextmanager
def _whole_functions(model: nn.Module) -> Iterator[None]:
    """Keep a custom autograd.Function whole where a gradient would go through it: export records its forward only.

    The hook sits below ``Function.apply``, so that a reference to ``apply`` which was taken earlier meets it too.
    """
    inside = [False]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        own = super(SingleLevelFunction, cls).apply  # type: ignore[misc]
        differentiable = torch.is_grad_enabled() and any(getattr(arg, "requires_grad", False) for arg in args)
        if cls is CheckpointFunction and differentiable:
            return run_checkpointed(*args)
        if inside[0] or not differentiable or cls.__module__.startswith(_HARMLESS_FUNCTIONS):
            return own(*args, **kwargs)
        inside[0] = True
        try:
            return call_whole(cls, own, args)
        except CaptureError as error:
            error.module, error.source = _where(model, _live_frames())
            raise
        finally:
            inside[0] = False

    SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del SingleLevelFunction.apply  # type: ignore[attr-defined]


@contextlib.contextmanager
def _flat_regions() -> Iterator[None]:
    """Let regions without gradient and of autocast stay what was traced: calls that enter and leave them.

    Export would make each a graph of its own. In doing so it forgets a ``no_grad`` inside of an autocast.
    """
    replaced = [(module, name, getattr(module, name)) for module, name in REGION_PASSES]
    for module, name, _ in replaced:
        setattr(module, name, lambda graph_module, signature: (graph_module, signature))
    try:
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


# --- errors ----------------------------------------------------------------------------------------------------------

_FIXES = (
    (
        r"data-dependent|GuardOnDataDependent|\.item\(\)|is_nonzero",
        "the forward decides by values inside a tensor: use torch.where or torch.cond, or pass the value as a number",
    ),
    (
        r"[Cc]onstraints? violated|marked .* as dynamic|dynamic_shapes|Detected mismatch",
        "leave that dim out of dynamic_shapes, or change the forward so that it works for every size",
    ),
    (
        r"not a known type|Unsupported input type|pytree",
        "pass and return tensors in tuples, lists, dicts or dataclasses, or register the class with "
        "torch.utils._pytree.register_pytree_node",
    ),
    (r"assigned during export|registered as buffers", "keep that state in a buffer: self.register_buffer(...)"),
)


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """Say in one readable error why export failed: the cause's first line, the user's line, the module, a fix."""
    frames: list[tuple[types.FrameType, int]] = []
    link: BaseException | None = error
    while link is not None and not frames:
        trace = link.__traceback__
        while trace is not None:
            frames.append((trace.tb_frame, trace.tb_lineno))
            trace = trace.tb_next
        link = link.__cause__ or link.__context__
    module, source = _where(model, reversed(frames))
    text = str(error)
    name = type(error).__name__
    fix = next((fix for pattern, fix in _FIXES if re.search(pattern, f"{name}: {text}")), None)
    return CaptureError(
        f"the model cannot be captured: {name}: {_first_lines(text)}",
        module=module,
        source=source,
        fix=fix
        or "check that the model runs on these inputs by itself; if it does, torch.export(strict=False) refuses"
        " what that line does",
    )


def _first_lines(text: str) -> str:
    """Return the first meaningful line, and the first reason that follows a heading."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [re.sub(r" ?For more information, run with TORCH_LOGS.*", "", line) for line in lines] or ["no message"]
    reason = next((line.removeprefix("- ") for line in lines[1:] if line.startswith("- ")), "")
    return f"{lines[0]} {reason}".strip()[:400]


def _live_frames() -> Iterator[tuple[types.FrameType, int]]:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _where(model: nn.Module, frames: Any) -> tuple[str, str]:
    """Return the innermost module and the innermost line of the user, given frames from the innermost outwards."""
    names = {id(module): name for name, module in model.named_modules()}
    module = source = ""
    for frame, line in frames:
        file = frame.f_code.co_filename
        if file == __file__ and frame.f_code.co_name == "export":
            break
        if not source and not file.startswith((TORCH_DIR, _PACKAGE_DIR, "<")) and "contextlib" not in file:
            source = f"{file.rsplit('/', 1)[-1]}:{line} in {frame.f_code.co_name}"
        owner = frame.f_locals.get("self")
        if not module and isinstance(owner, nn.Module):
            module = names.get(id(owner), "")
    return module, source

"""Run ``torch.export`` on an unmodified module: quietly, with readable errors, and all global state put back."""

from __future__ import annotations

import contextlib
import dis
import gc
import logging
import re
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import CheckpointFunction

from fxshard.capture.checkpoint_regions import marked, run_checkpointed
from fxshard.capture.code_names import begin_running, content_of, end_running, is_settled
from fxshard.capture.constants import handed_out
from fxshard.capture.custom_functions import call_whole
from fxshard.capture.decisions import Decisions
from fxshard.capture.held_values import is_plain
from fxshard.capture.host_random import host_state, is_same_state, put_back_host_state
from fxshard.capture.queries import Questions
from fxshard.capture.random_from import without_keywords
from fxshard.capture.trees import flatten, without_unchanged
from fxshard.capture.writes import Before, Written, unchanged
from fxshard.errors import CaptureError, FxshardError
from fxshard.ir.origins import TORCH_DIR
from fxshard.torch_internals import (
    APPLY_OWNER,
    REGION_PASSES,
    exporter,
    pytree,
    replaced,
    trusted_distributions,
    unassigned_buffers,
)

__all__ = ["Outputs", "export", "fits_graph", "has_meta", "quiet"]

_PACKAGE_DIR = str(Path(__file__).parent.parent)
_GRAPH_CONSTANTS = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout)
# torch's own machinery for wrapping operators: what it wraps is recorded whole, with its gradient.
_HARMLESS_FUNCTIONS = ("torch._higher_order_ops", "torch._functorch", "torch._dynamo", "torch._library", "torch._C")
_NOISY_LOGGERS = ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "torch._functorch", "torch._subclasses")


class Outputs:
    """A forward hook that gives export the tensors of an output, and keeps all else for us.

    So an output may be of any type that :func:`flatten` takes apart, and hold constants of any type. What the model
    made of its inputs (a dict, a cache) is an output, too, where it is not what it was given.

    Attributes:
        spec: the tree of the output, and where inputs changed, of the pair of the output and ``(args, kwargs)``.
        constants: the place of a leaf that is not a tensor -> its value.
        changes_inputs: whether what is in the inputs' containers is other than before.
        written: what the model assigned to attributes of its modules.
        assigned: the names of the buffers that it replaced.
        asks_needs: whether what is computed depended on what requires a gradient.
        questions: what the model's code asked.
        drew: the modules of random numbers outside of torch that it drew from.
    """

    def __init__(self) -> None:
        """Make a hook that has seen no output."""
        self.spec: pytree.TreeSpec | None = None
        self.constants: dict[int, Any] = {}
        self.changes_inputs = False
        self.written: tuple[Written, ...] = ()
        self.assigned: list[str] = []
        self.asks_needs = False
        self.questions = Questions()
        self.drew: tuple[str, ...] = ()
        self._given: tuple[list[Any], pytree.TreeSpec | None] = [], None
        self._before: Before | None = None

    def prepare(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the model runs: what it is given, and what it holds."""
        self._given = flatten((args, kwargs))
        self._before = Before(module)
        begin_running()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[Any, ...]:
        """Return the tensors and dynamic numbers among the leaves of ``output``."""
        end_running()
        assert self._before is not None
        self.written = self._before.written()
        leaves, spec = flatten((args, kwargs))
        before, was = self._given
        assert was is not None
        self.changes_inputs = spec != was or not all(map(_unchanged, leaves, before))
        if self.changes_inputs:
            given = pytree.tree_unflatten(before, was)
            output = output, without_unchanged((args, kwargs), given, _unchanged)
        leaves, self.spec = flatten(output)
        leaves, self.assigned = self._before.write_back(leaves)
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
    """Whether a value that is no container for pytree holds tensors, or what cannot be looked through."""
    pending, met = [value], dict[int, Any]()
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor | Iterator):
            return True
        if id(item) in met or isinstance(item, type | types.ModuleType | nn.Module) or is_plain(item):
            continue
        met[id(item)] = item
        if isinstance(item, types.FunctionType):
            pending += [*map(content_of, item.__closure__ or ()), *(item.__defaults__ or ())]
        elif len(met) < 1000:
            pending += gc.get_referents(item)
    return False


def export(
    model: nn.Module,
    tree: Any,
    shapes: Any,
    outputs: Outputs,
    device: torch.device | None,
    grad: bool = True,
    decisions: Decisions | None = None,
) -> torch.export.ExportedProgram:
    """Run torch.export, with every error turned into one of ours, and all global state put back.

    Args:
        model: the model.
        tree: its inputs.
        shapes: as ``torch.export`` takes them.
        outputs: what the model returns goes there, too.
        device: where the model and its inputs are shown to export; None where they are.
        grad: whether gradients are enabled where the model is called, for one that asks.
        decisions: answers what the model asks of values.
    """
    with torch.inference_mode(False):
        args, kwargs = _stand_ins(tree, device)
    drawn = host_state()
    try:
        with (
            quiet(),
            unchanged(model),
            _hooked(model, outputs),
            handed_out(model, True, device),
            _seen_on(model, device),
            _whole_functions(model, outputs),
            _unmoved(model),
            marked(),
            _flat_regions(),
            unassigned_buffers(),  # what is assigned is written back by ``Outputs``
            outputs.questions.noted(),
            _without_inference_mode(outputs.questions),
            (decisions or Decisions()).answering(),
            without_keywords(),
            trusted_distributions(),  # which would decide by values whether to raise
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
        ):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except FxshardError as error:
        raise error.with_traceback(None) from None
    except Exception as error:
        raise _capture_error(model, error) from None
    finally:
        outputs.drew = tuple(name for name, state in host_state().items() if not is_same_state(state, drawn[name]))
        put_back_host_state(drawn)
    return program


@contextlib.contextmanager
def _without_inference_mode(questions: Questions) -> Iterator[None]:
    """Lets the model's own ``inference_mode`` be what it computes: ``no_grad``, which a graph can hold."""
    cls, here = torch.inference_mode, threading.get_ident()
    own_enter, own_exit = cls.__enter__, cls.__exit__

    def enter(self: torch.inference_mode) -> None:
        if threading.get_ident() != here or not self.mode:
            own_enter(self)
            return
        self.__dict__["_fxshard"] = torch.no_grad()
        self.__dict__["_fxshard"].__enter__()
        questions.inference += 1

    def leave(self: torch.inference_mode, *error: Any) -> None:
        mine = self.__dict__.pop("_fxshard", None)
        if mine is None:
            own_exit(self, *error)
        else:
            questions.inference -= 1
            mine.__exit__(*error)

    with replaced(cls, __enter__=enter, __exit__=leave):
        yield


@contextlib.contextmanager
def _hooked(model: nn.Module, outputs: Outputs) -> Iterator[None]:
    """Lets ``outputs`` see what the model is given and returns."""
    handles = (
        model.register_forward_pre_hook(outputs.prepare, prepend=True, with_kwargs=True),
        model.register_forward_hook(outputs, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stand_ins(tree: Any, device: torch.device | None) -> Any:
    """The inputs without memory: leaves of autograd, normal tensors, and each an object of its own.

    Export takes two inputs that are one tensor for one input, and what was done with the caller's tensors (views under
    ``no_grad``, ``inference_mode``) is none of its business.
    """
    return pytree.tree_map_only(torch.Tensor, lambda tensor: _stand_in(tensor, device or tensor.device), tree)


def _unchanged(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and is_plain(then) and now == then)


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
    """A tensor like another one, on a device, without memory; itself, if it is of another kind."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        return tensor
    shape, strides, start = tensor.shape, tensor.stride(), tensor.storage_offset()
    like = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=device)
    if start:
        like = torch.empty(0, dtype=tensor.dtype, device=device).set_(_memory(like, start), start, shape, strides)
    if not like.is_meta:
        like.untyped_storage().resize_(0)
    parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(like, tensor.requires_grad) if parameter else like.requires_grad_(tensor.requires_grad)


def _memory(like: torch.Tensor, start: Any) -> torch.UntypedStorage:
    """Memory for a tensor that begins at ``start``."""
    num_bytes = like.untyped_storage().nbytes() + start * like.element_size()
    return torch.UntypedStorage(num_bytes, device=like.device)


@contextlib.contextmanager
def _seen_on(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Show export all tensors of the model on one device: no operator takes a mixture. None: where they are.

    Tensors that were made in ``inference_mode`` have stand-ins, too: autograd refuses them.
    """
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and (tensor.is_inference() or device not in (None, tensor.device)):
                    swapped.append((table, name, tensor))
    with torch.inference_mode(False):
        stand_ins = {id(tensor): _stand_in(tensor, device or tensor.device) for _, _, tensor in swapped}
    try:
        for table, name, tensor in swapped:
            table[name] = stand_ins[id(tensor)]
        yield
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


@contextlib.contextmanager
def _whole_functions(model: nn.Module, outputs: Outputs) -> Iterator[None]:
    """Keep a custom autograd.Function whole where a gradient would go through it: export records its forward only.

    The hook sits below ``Function.apply``, so that a reference to ``apply`` which was taken earlier meets it too.
    """
    inside, here = [False], threading.get_ident()

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        own = super(APPLY_OWNER, cls).apply
        if threading.get_ident() != here:
            return own(*args, **kwargs)
        differentiable = torch.is_grad_enabled() and any(map(_may_need_gradient, args))  # whatever needs one now
        if cls is CheckpointFunction:
            outputs.asks_needs = True
            needed = torch.is_grad_enabled() and any(getattr(arg, "requires_grad", False) for arg in args)
            return run_checkpointed(*args) if needed else own(*args, **kwargs)
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

    kept = vars(APPLY_OWNER).get("apply")
    APPLY_OWNER.apply = classmethod(apply)
    try:
        yield
    finally:
        if kept is None:
            del APPLY_OWNER.apply
        else:
            APPLY_OWNER.apply = kept


def _may_need_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


@contextlib.contextmanager
def _unmoved(model: nn.Module) -> Iterator[None]:
    """Modules that forward moves to where they are already stay as they are; others are refused."""
    here, before = threading.get_ident(), nn.Module._apply

    def apply(self: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if threading.get_ident() != here:
            moved: nn.Module = before(self, function, recurse)  # type: ignore[no-untyped-call]
            return moved
        tensors = [*self.parameters(recurse), *self.buffers(recurse)]
        for tensor in tensors:
            like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            made = function(like)
            if (made.dtype, made.device) != (like.dtype, like.device):
                module, source = _where(model, _live_frames())
                raise CaptureError(
                    f"forward moves {module or type(self).__name__} from {like.dtype} on {like.device} to {made.dtype} "
                    f"on {made.device}",
                    module=module,
                    source=source,
                    fix="move it before parallelize, and take that line out of forward",
                )
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


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
_PLACES: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    (
        "nn/utils/rnn.py",
        lambda local: True,
        "the model packs sequences (torch.nn.utils.rnn): how their rows lie follows from values, which no graph knows",
        "give the recurrent layer padded sequences, and mask what it makes of the padding",
    ),
    (
        "nn/modules/rnn.py",
        lambda local: isinstance(local.get("orig_input"), PackedSequence),
        "a recurrent layer is given a packed sequence: how its rows lie follows from values, which no graph knows",
        "give it padded sequences, and mask what it makes of the padding",
    ),
    (
        "nn/modules/batchnorm.py",
        lambda local: getattr(local.get("self"), "momentum", 0) is None,
        "a batch norm with momentum=None weighs each batch by how many it has counted, which is a value in a buffer",
        "give it a momentum: BatchNorm(..., momentum=0.1)",
    ),
)
"""Where torch itself fails on what no graph holds: its file, what its names say, what to say, and the mending."""


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
    for frame, _ in reversed(frames):
        for file, is_such, what, mending in _PLACES:
            if frame.f_code.co_filename.endswith(file) and is_such(frame.f_locals):
                return CaptureError(what, module=module, source=source, fix=mending)
    text = str(error)
    name = type(error).__name__
    fix = next((fix for pattern, fix in _FIXES if re.search(pattern, f"{name}: {text}")), None)
    made = CaptureError(
        f"the model cannot be captured: {name}: {_first_lines(text)}",
        module=module,
        source=source,
        fix=fix
        or "check that the model runs on these inputs by itself; if it does, torch.export(strict=False) refuses"
        " what that line does",
    )
    made.by_the_model = _raised_by_the_model(error)
    return made


def _raised_by_the_model(error: Exception) -> bool:
    """Whether a ``raise`` or an ``assert`` in the model's own code, or a check that it calls, made an error."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    if code.co_code[trace.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    return not is_settled(trace.tb_frame.f_globals.get("__name__")) or code.co_name.startswith(("_check", "_assert"))


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

"""fidelity: does the capture compute what the model computes?

Some models take another path while they are traced: a mask that is built differently, a random choice that is drawn
once and frozen. Export does not notice, and everything behind it would be faithfully wrong. So the model and its
capture are run once on the example inputs, where these hold values, and their outputs and buffers are compared.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointFunction

from fxshard.capture.captured import Captured
from fxshard.capture.constants import handed_out
from fxshard.capture.host_random import host_state, put_back_host_state, seed_host
from fxshard.capture.queries import told_of_inference_mode
from fxshard.capture.writes import unchanged
from fxshard.errors import CaptureError, FxshardError
from fxshard.ir.info import values_of
from fxshard.ruler import TOLERANCE, compare
from fxshard.rules.effects import base_of
from fxshard.rules.recipe import written as written_by
from fxshard.runtime.autocast import ambient, using
from fxshard.runtime.draws import copy_as_it_lies
from fxshard.runtime.module import find
from fxshard.torch_internals import pytree

T = TypeVar("T")


def check_fidelity(
    model: nn.Module, captured: Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any], backward: bool = True
) -> bool:
    """Runs the model and its capture on the example inputs, forward and backward; both leave all as it was.

    Args:
        model: what was captured.
        captured: the capture.
        args: the inputs.
        kwargs: likewise, by name.
        backward: whether gradients are compared, too.

    Returns:
        Whether they could be compared: False without values.

    Raises:
        CaptureError: when an output, what the inputs hold afterwards, a buffer or a gradient differs.
    """
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    tensors = [t for t in (*model.parameters(), *model.buffers(), *leaves) if isinstance(t, torch.Tensor)]
    if any(t.is_meta for t in tensors) or len({t.device.type for t in tensors}) > 1:
        return False
    root = captured.root
    copied = copy_as_it_lies if captured.asks_layout else _values_of
    backward = backward and not any(t.is_inference() for t in tensors)

    def replay(args: Any, kwargs: Any) -> Any:
        return captured.unflatten_outputs(root(*captured.flatten_inputs(args, kwargs)), (args, kwargs))

    written = [find(root, name) for name in _overwritten(root.graph)]

    def both(backward: bool) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        device = next((t.device for t in tensors), None)
        with unchanged(model), handed_out(model, False, device), told_of_inference_mode():
            want = _run(model, model, lambda a, k: model(*a, **k), args, kwargs, written, backward, copied)
        try:
            return want, _run(model, root, replay, args, kwargs, written, backward, copied)
        except FxshardError:
            raise
        except Exception as error:
            raise CaptureError(
                f"what torch.export captured does not run, where the model does: {type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}",
                fix="write the line that it names with other operators, or report it to PyTorch",
            ) from error

    want, got = both(backward)
    if want is None or got is None:  # the backward pass of the model itself fails
        want, got = both(backward=False)
    assert want is not None
    assert got is not None
    names = [name for name in want if not name.startswith("buffer ") or name in got]
    rows = [(name, got.get(name), want[name]) for name in names]
    rows += [(name, value, None) for name, value in got.items() if name not in want and name.startswith("gradient")]

    def again() -> list[Any] | None:
        def run(dtype: torch.dtype) -> dict[str, Any] | None:
            copied = copy.deepcopy(model).to(dtype)
            stack.enter_context(handed_out(copied, False, next((t.device for t in tensors), None)))
            given = pytree.tree_map_only(
                torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, dict(kwargs))
            )
            return _run(copied, copied, lambda a, k: copied(*a, **k), *given)

        with contextlib.ExitStack() as stack:
            other = other_precision(model.parameters(), run)
        return None if other is None else [other.get(name) for name, _, _ in rows]

    compared = compare(rows, tolerance_of(root.graph), again)
    wrong = [(each.name, each.error) for each in compared if not each.ok]
    if wrong:
        name, error = wrong[0]
        raise CaptureError(
            f"what torch.export captured computes something else than the model: {name} differs by {error:.1e}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            fix="the model decides differently while it is traced (is_compiling(), is_tracing()), or draws numbers "
            "outside of torch: give it the inputs that settle the choice (a mask, say), or change that place",
        )
    return True


def other_precision(weights: Iterable[torch.Tensor], run: Callable[[torch.dtype], T]) -> T | None:
    """What ``run`` gives in float64, or for weights of that, in float32, without autocast; None where it fails."""
    dtypes = {weight.dtype for weight in weights if weight.is_floating_point()}
    try:
        with using(()):
            return run(torch.float32 if dtypes == {torch.float64} else torch.float64)
    except Exception:  # whatever forbids it, there is no second measure then
        return None


def _values_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _run(
    model: nn.Module,
    owner: nn.Module,
    call: Callable[[Any, Any], Any],
    args: Any,
    kwargs: Any,
    written: Sequence[torch.Tensor] = (),
    backward: bool = True,
    copied: Callable[[torch.Tensor], torch.Tensor] = _values_of,
) -> dict[str, Any] | None:
    """What one run gives, by names, as it does for the caller; buffers and ``written`` are put back.

    Returns:
        The outputs, what the inputs are afterwards, the buffers, and the gradients; None if the backward pass fails.
    """
    saved = [(each, each.detach().clone()) for each in (*model.buffers(), *written)]
    own: dict[int, torch.Tensor] = {}  # what is given twice is one tensor

    def _own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in own:
            own[id(tensor)] = copied(tensor).requires_grad_(tensor.requires_grad)
        return own[id(tensor)]

    own_args, own_kwargs = pytree.tree_map_only(torch.Tensor, _own, (args, dict(kwargs)))
    drawn = host_state()
    seed_host(len(saved) + 1)  # what a capture froze of these is drawn anew
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    wanted: dict[str, torch.Tensor] = {
        f"gradient of {name}": p for name, p in model.named_parameters() if p.requires_grad
    }
    given = enumerate(pytree.tree_leaves((own_args, own_kwargs)))
    wanted |= {f"gradient of input {i}": x for i, x in given if isinstance(x, torch.Tensor) and x.requires_grad}
    try:
        with (
            _at_once(),
            torch.random.fork_rng(cuda),
            torch.set_grad_enabled(backward),
            using(ambient(), cache=True),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # said of this run only
            outputs = pytree.tree_leaves(call(own_args, own_kwargs))
            found = {f"output {i}": value for i, value in enumerate(outputs)}
            after = pytree.tree_leaves((own_args, own_kwargs))
            found |= {f"input {i} afterwards": value for i, value in enumerate(after)}
            found |= {f"buffer {name}": buffer.detach().clone() for name, buffer in owner.named_buffers()}
            loss = loss_of(outputs) if backward else None
            if loss is not None and loss.requires_grad and wanted:
                grads = _gradients(loss, list(wanted.values()))
                if grads is None:
                    return None
                found |= {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    finally:
        for each, value in saved:
            with torch.inference_mode(each.is_inference()), torch.no_grad():
                each.copy_(value)
        put_back_host_state(drawn)
    return found


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """What is checkpointed with reentrant autograd keeps its values: such a backward pass gives no gradients out."""
    own = CheckpointFunction.apply
    here = threading.get_ident()

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        needed = torch.is_grad_enabled() and any(getattr(arg, "requires_grad", False) for arg in args)
        if needed and threading.get_ident() == here:
            return function(*args)
        return own(function, preserve_rng_state, *args)  # type: ignore[no-untyped-call]

    CheckpointFunction.apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply


def _gradients(loss: torch.Tensor, of: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...] | None:
    try:
        return torch.autograd.grad(loss, of, allow_unused=True)
    except Exception:  # a model may have no backward pass
        return None


def loss_of(leaves: list[Any]) -> torch.Tensor | None:
    """A fixed random weighting of all outputs that carry a gradient, so that no gradient is there by symmetry."""
    total: torch.Tensor | None = None
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            part = (leaf * weight_of(index, leaf)).sum()
            total = part if total is None else total + part
    return total


def weight_of(index: int, leaf: torch.Tensor) -> torch.Tensor:
    """The weights of an output in ``loss_of``."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(leaf.shape, generator=generator, dtype=torch.float32).to(leaf.device, leaf.dtype)


def _overwritten(graph: fx.Graph) -> list[str]:
    """The names of what a graph holds and may write to, itself or through views."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        for target in written_by(node).values():
            target = base_of(target)
            if target.op == "get_attr":
                found[str(target.target)] = None
    return list(found)


def tolerance_of(graph: fx.Graph) -> float:
    """The tolerance of the lowest precision in which a graph computes: no result of it is nearer than that."""
    values = [value for node in graph.nodes for value in values_of(node) if isinstance(value, torch.Tensor)]
    return max((TOLERANCE.get(value.dtype, 0.0) for value in values), default=0.0)

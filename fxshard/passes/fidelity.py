"""fidelity: does the capture compute what the model computes?

Some models take another path while they are traced: a mask that is built differently, a random choice that is drawn
once and frozen. Export does not notice, and everything behind it would be faithfully wrong. So the model and its
capture are run once on the example inputs, where these hold values, and their outputs and buffers are compared.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from fxshard.errors import CaptureError
from fxshard.passes.capture import Captured
from fxshard.passes.typing import values_of
from fxshard.runtime.autocast import ambient, using
from fxshard.torch_internals import pytree

TOLERANCE = {
    torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2,
    torch.complex128: 1e-9, torch.complex64: 1e-4,
}  # fmt: skip
"""Largest difference that counts as equal, relative to the largest magnitude of the tensor (or to 1)."""


def check_fidelity(model: nn.Module, captured: Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Runs the model and its capture on the example inputs; both leave random state and buffers as they were.

    Raises:
        CaptureError: when an output, or a buffer afterwards, differs.
    """
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, dict(kwargs)))]
    devices = {t.device.type for t in tensors if isinstance(t, torch.Tensor)}
    if "meta" in devices or len(devices) > 1:
        return
    want, want_buffers = _run(model, model, lambda a, k: model(*a, **k), args, kwargs)
    root = captured.root
    got, got_buffers = _run(model, root, lambda a, k: root(*captured.flatten_inputs(a, k)), args, kwargs)
    for index, value in captured.output_constants.items():
        got[index] = value
    rows = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got, want, strict=True))]
    rows += [(f"buffer {n}", got_buffers[n], b) for n, b in want_buffers.items() if n in got_buffers]
    tolerance = tolerance_of(root.graph)
    wrong = [(name, *difference(a, b, tolerance)) for name, a, b in rows if isinstance(b, torch.Tensor)]
    wrong = [row for row in wrong if not row[2]]
    if wrong:
        name, error, _ = wrong[0]
        raise CaptureError(
            f"what torch.export captured computes something else than the model: {name} differs by {error:.1e}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            fix="the model decides differently while it is traced (is_compiling(), is_tracing()), or draws numbers "
            "outside of torch: give it the inputs that settle the choice (a mask, say), or change that place",
        )


def _run(
    model: nn.Module, owner: nn.Module, call: Any, args: Any, kwargs: Any
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The outputs of one run, and the buffers after it; the model's own are put back."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    own_args, own_kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, dict(kwargs)))
    numpy = sys.modules.get("numpy")  # not ours: a model may draw from it
    drawn = random.getstate(), numpy.random.get_state() if numpy else None
    random.seed(len(saved) + 1)  # what a capture froze of these is drawn anew
    if numpy:
        numpy.random.seed(len(saved) + 1)
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(cuda), torch.no_grad(), using(ambient(), cache=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # it would be said of this run only
        out = call(own_args, own_kwargs)
        buffers = {name: buffer.detach().clone() for name, buffer in owner.named_buffers()}
        for buffer, value in saved:
            buffer.copy_(value)
    random.setstate(drawn[0])
    if numpy:
        numpy.random.set_state(drawn[1])
    return pytree.tree_leaves(out), buffers


def tolerance_of(graph: fx.Graph) -> float:
    """The tolerance of the lowest precision in which a graph computes: no result of it is nearer than that."""
    values = [value for node in graph.nodes for value in values_of(node) if isinstance(value, torch.Tensor)]
    return max((TOLERANCE.get(value.dtype, 0.0) for value in values), default=0.0)


def difference(got: Any, want: torch.Tensor, tolerance: float = 0.0) -> tuple[float, bool]:
    """The largest absolute difference, and whether it is within the tolerance of the dtype, or ``tolerance``."""
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        return float("inf"), False
    if want.numel() == 0 or want.is_meta:
        return 0.0, True
    if not (want.dtype.is_floating_point or want.dtype.is_complex):
        return float((got != want).sum()), bool(torch.equal(got, want))
    got, want = got.detach(), want.detach()
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(same, torch.zeros_like(want), got - want).abs().max().item()
    finite = want[want.isfinite()]
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    return error, error <= max(TOLERANCE[want.dtype], tolerance) * scale

"""The public functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.placement_types import Placement

from fxshard.errors import MeshError, PlanError
from fxshard.gradients import measure_parts_of
from fxshard.inspect.coverage import Coverage
from fxshard.mesh import Mesh
from fxshard.passes.pipeline import Options
from fxshard.plan.formats import axis_for, is_style, read_styles
from fxshard.plan.plan import MEASURE, Plan
from fxshard.program import ParallelModule
from fxshard.ranks.watch import current
from fxshard.runtime.process_groups import check_world
from fxshard.training.buckets import BUCKET_BYTES


def parallelize(
    model: nn.Module,
    plan: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mesh: Any = None,
    dynamic_shapes: Any = None,
    reduce_dtype: torch.dtype | None = None,
    randomness: str = "single_device",
    bucket_bytes: int = BUCKET_BYTES,
    regather: bool = True,
    checkpoint: str | Sequence[str] = (),
    compare: str = "first_call",
    cache: str | os.PathLike[str] | None = None,
    overlap: int = 0,
    constants: str | Sequence[str] = (),
) -> ParallelModule:
    """Compiles an unmodified model for a mesh.

    Args:
        model: any module that ``torch.export`` can capture; it may live on the meta device.
        plan: a ``Plan``, a preset such as ``tensor_parallel(2)``, several joined with ``|``, or a dict from globs of
            parameter or module names to placements, to styles of Hugging Face (``"colwise"``), or to styles of
            ``torch.distributed.tensor.parallel`` (``ColwiseParallel()``).
        args: example inputs, as ``torch.export`` takes them. Without any, the model is captured at the first call.
        kwargs: example inputs by name.
        mesh: a torch ``DeviceMesh``, a ``Mesh`` or a dict of axis sizes, where the plan does not say.
        dynamic_shapes: as ``torch.export`` takes it: which dims of the inputs may change.
        reduce_dtype: the least precision in which sums over the ranks are made, of results and of gradients.
            Low-precision values are summed in their own by default; ``torch.float32`` rounds once, for twice the bytes.
        randomness: ``"single_device"``: dropout drops what one device would drop, mask for mask. Every rank draws the
            whole mask for that, and attention with dropout is written out. ``"independent"``: each rank draws for its
            own part, and attention stays fused; what is replicated is dropped alike on all ranks.
        bucket_bytes: the gradients of weights that every rank holds whole are summed over the ranks in buckets of so
            many bytes, while the backward pass goes on. 0 sums each by itself. Weights of at most so many bytes that
            are stored in parts (``zero``) are gathered ahead, small ones together; with 0 each when it is asked for.
        regather: weights that are stored in parts and gathered for use (``zero``) are not kept for the backward pass,
            which gathers them once more: less memory, more traffic. Where a rank has no rows of a batch they are kept.
        checkpoint: names or globs of modules, such as ``"model.layers.*"``, whose calls keep nothing for the backward
            pass but their inputs, and are computed anew in it. Of modules inside one another the outermost is taken.
            Calls of ``torch.utils.checkpoint`` in the model are kept without being named.
        compare: when real ranks compare what they are about to run (plan, inputs, weights, collectives), so that one
            that differs is an error. ``"first_call"``: before the first call of each capture. ``"every_call"``: also
            before all others, to find a rank that is given other inputs later. ``"metadata"``: as ``"first_call"``,
            but not the values of the inputs: for ranks that load only the rows that their part of the plan reads.
        cache: a folder in which captures are kept, so that the next start need not capture again; by default that of
            the environment variable FXSHARD_CACHE, if it is set. A capture is taken from there only if nothing changed
            that it depends on; captures with ``dynamic_shapes`` are not kept. Who may write there may run code here.
        overlap: in how many pieces products at the edge of what is split are computed, each beside the collective of
            the one before, and weights' gradients beside the sum of the input's (asynchronous tensor parallelism).
            With 1 only the latter. 0: one after the other.
        constants: names or globs of inputs whose values decide shapes, such as ``"image_grid_thw"`` of Qwen2-VL: they
            are read when the model is captured, and a call with other values is captured for itself. Reading them at
            each call waits for the device that they are on.

    Returns:
        A module that is called like the model, with the same whole inputs on every rank.

    Raises:
        PlanError: when the plan does not fit the model or the mesh; all offending entries are listed.
        CaptureError: when the model cannot be exported.

    >>> import torch, fxshard
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    >>> program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (torch.randn(4, 8),))
    >>> print(program.plan)
    Plan on {tp: 2}
      params       0.weight  tp: Shard(0)
      params       0.bias    tp: Shard(0)
      params       2.weight  tp: Shard(1)
    >>> [(c.kind, c.phase, c.num_bytes) for c in program.collectives()]
    [('all_reduce', 'forward', 128)]

    Reference: GSPMD (Xu et al., 2021); Megatron-LM (Shoeybi et al., 2019).
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"model is a {type(model).__name__}, not an nn.Module", fix="pass the module itself")
    current()  # from here on the other ranks can ask where this one is
    asked = _plan(plan, mesh, model)
    check_world(asked.mesh)
    device_mesh = mesh if hasattr(mesh, "get_group") else None
    if reduce_dtype is not None and not reduce_dtype.is_floating_point:
        raise PlanError(f"reduce_dtype is {reduce_dtype}, in which nothing can be summed", fix="give torch.float32")
    if randomness not in ("single_device", "independent"):
        raise PlanError(f"randomness is {randomness!r}", fix="give 'single_device' or 'independent'")
    if bucket_bytes < 0:
        raise PlanError(f"bucket_bytes is {bucket_bytes}", fix="give a number of bytes, or 0 for no buckets")
    if compare not in ("first_call", "every_call", "metadata"):
        raise PlanError(f"compare is {compare!r}", fix="give 'first_call', 'every_call' or 'metadata'")
    if overlap < 0:
        raise PlanError(f"overlap is {overlap}", fix="give a number of pieces, or 0 for no overlap")
    asked_anew = (checkpoint,) if isinstance(checkpoint, str) else tuple(checkpoint)
    options = Options(
        reduce_dtype,
        randomness == "independent",
        bucket_bytes,
        regather,
        asked_anew,
        compare,
        overlap,
        (constants,) if isinstance(constants, str) else tuple(constants),
    )
    folder = cache if cache is not None else os.environ.get("FXSHARD_CACHE")
    program = ParallelModule(model, asked, device_mesh, dynamic_shapes, options, Path(folder) if folder else None)
    measure_parts_of(program)
    if args or kwargs:
        program.capture(tuple(args), kwargs)
        program._captures.fixed = True
    return program


def _coverage(plan: Plan, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Coverage:
    if not args and not kwargs:
        raise PlanError("coverage needs example inputs", fix="plan.coverage(model, args, kwargs)")
    return parallelize(model, plan, args, kwargs).coverage()


MEASURE[:] = [_coverage]


def _plan(plan: Any, mesh: Any, model: nn.Module) -> Plan:
    if isinstance(plan, Mapping):
        if not all(isinstance(p, (Placement, Mapping)) or is_style(p) for p in plan.values()):
            raise PlanError(
                f"cannot read the plan {plan!r}",
                fix="give {glob: Shard(dim) or {axis: placement}}, or {glob: 'colwise' or ColwiseParallel()}",
            )
        if any(map(is_style, plan.values())):
            plan = Plan(mesh, **read_styles(model, plan, axis_for(mesh)))
        else:
            plan = Plan(mesh, params=dict(plan))
    if not isinstance(plan, Plan):
        raise PlanError(
            f"cannot read the plan {plan!r}", fix="give a Plan, a preset such as tensor_parallel(2), or a dict"
        )
    if plan.mesh is None and mesh is None:
        raise MeshError("the plan does not say on which mesh", fix="pass mesh={'tp': 2}")
    if mesh is None:
        return plan
    given = Mesh.of(mesh)
    if plan.mesh is not None:
        extra = [name for name in plan.mesh.names if name not in given.names]
        if extra:
            raise MeshError(f"the plan uses the mesh axes {extra}, which the mesh {given} does not have")
    return plan.on(given)
